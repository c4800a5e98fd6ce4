"""Loads trained heads from disk and builds the `Head` object that computes with their state."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.features import load_pool
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.host import Context, GradientHost
from h2t.pipeline.networks.frozen import FrozenPart, from_file
from h2t.pipeline.networks.weights import load_weights


@dataclass(frozen=True)
class HeadParts:
    """The plug-ins of a stack's heads with their options. `where` is the host's place in params.yaml, for messages."""

    host: str
    loss: dict[str, Any]
    classifier: str
    scale: float
    pool: str
    pool_options: dict[str, Any]
    where: str


def build_head(
    parts: HeadParts, context: Context, channels: int | None = None, frozen: FrozenPart | None = None
) -> Head:
    """The head for one task, with what lies between pool and classifier, if anything.

    `channels`: C of the maps; by default the features that the classifier gets. Raises UserError for options that a
    plug-in does not accept, and for a host that needs several numbers per channel behind a frozen part.
    """
    hosts = plugins.load("hosts", parts.host)
    loss = build(hosts.Loss, f"{parts.where}.loss", parts.loss)
    host = hosts.Host(loss, parts.classifier, parts.scale, context)
    pool = load_pool(parts.pool, parts.pool_options, f"{parts.where}.pool_options", channels or context.channels)
    if pool.numbers != host.numbers:
        raise UserError(
            f"{parts.where}.pool: host {parts.host} needs {counted(host.numbers, 'number')} per channel, pool "
            f"{parts.pool} gives {pool.numbers}; use pool: {'moments' if host.numbers == 2 else 'gap'}"
        )
    if frozen is not None and host.numbers > 1:
        raise UserError(
            f"{parts.where}.host: {parts.host} needs maps right before its classifier, and this backbone has layers "
            "between; choose another host or another backbone"
        )
    if frozen is not None and isinstance(host, GradientHost) and host.augments:
        raise UserError(
            f"{parts.where}.host: {parts.host} changes what its classifier gets before fusion, and this backbone has "
            "layers between pooling and classifier; choose another host or another backbone"
        )
    return Head(host, pool, frozen)


@dataclass(frozen=True)
class Heads:
    """A trained stack of K heads. `state`: name -> (K, ...). `table`: a line per head. `about`: the host's settings.

    `frozen` is what lies between pool and classifier, the same for all heads.
    """

    state: dict[str, torch.Tensor]
    table: pa.Table
    about: dict[str, Any]
    frozen: FrozenPart | None = None

    @property
    def parts(self) -> HeadParts:
        return HeadParts(**{f.name: self.about[f.name] for f in fields(HeadParts)})

    @property
    def context(self) -> Context:
        counts, *rest = (self.about[f.name] for f in fields(Context))
        return Context(torch.tensor(counts), *rest)

    def head(self, device: torch.device) -> Head:
        """What computes, on `device`, with the state of one head. Raises UserError for options that do not fit."""
        frozen = None if self.frozen is None else self.frozen.to(device)
        return build_head(self.parts, self.context, self.about.get("map_channels"), frozen)


def load_heads(folder: Path) -> Heads:
    """The heads that train_classifier wrote into `folder`. Raises UserError if they are missing or unreadable."""
    path = folder / "heads.safetensors"
    tensors, described = load_weights(path)
    state, frozen = from_file(tensors, described, str(path))
    try:
        table = pq.ParquetFile(folder / "heads.parquet").read()  # `read_table` imports pandas
        about = json.loads(table.schema.metadata[b"h2t"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: heads.parquet is missing or unreadable ({error}); run train_classifier again"
        ) from None
    return Heads(state, table, about, frozen)
