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
from h2t.pipeline.heads.host import Context
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


def build_head(parts: HeadParts, context: Context) -> Head:
    """The head for one task. Raises UserError for options that a plug-in does not accept."""
    hosts = plugins.load("hosts", parts.host)
    loss = build(hosts.Loss, f"{parts.where}.loss", parts.loss)
    host = hosts.Host(loss, parts.classifier, parts.scale, context)
    pool = load_pool(parts.pool, parts.pool_options, f"{parts.where}.pool_options", context.channels)
    if pool.numbers != host.numbers:
        raise UserError(
            f"{parts.where}.pool: host {parts.host} needs {counted(host.numbers, 'number')} per channel, pool "
            f"{parts.pool} gives {pool.numbers}; use pool: {'moments' if host.numbers == 2 else 'gap'}"
        )
    return Head(host, pool)


@dataclass(frozen=True)
class Heads:
    """A trained stack of K heads. `state`: name -> (K, ...). `table`: a line per head. `about`: the host's settings."""

    state: dict[str, torch.Tensor]
    table: pa.Table
    about: dict[str, Any]

    @property
    def parts(self) -> HeadParts:
        return HeadParts(**{f.name: self.about[f.name] for f in fields(HeadParts)})

    @property
    def context(self) -> Context:
        counts, *rest = (self.about[f.name] for f in fields(Context))
        return Context(torch.tensor(counts), *rest)


def load_heads(folder: Path) -> Heads:
    """The heads that train_classifier wrote into `folder`. Raises UserError if they are missing or unreadable."""
    state, _ = load_weights(folder / "heads.safetensors")
    try:
        table = pq.ParquetFile(folder / "heads.parquet").read()  # `read_table` imports pandas
        about = json.loads(table.schema.metadata[b"h2t"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: heads.parquet is missing or unreadable ({error}); run train_classifier again"
        ) from None
    return Heads(state, table, about)
