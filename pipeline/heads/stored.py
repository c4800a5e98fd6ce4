"""Loads trained heads from disk and builds the `Head` object that computes with their state."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
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
from h2t.pipeline.networks.frozen import FrozenPart, load_classifier

LOSS = "loss."  # prefix of the constants of a loss among those of a head


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

    def of(self, constants: Iterable[tuple[str, Any]]) -> "HeadParts":
        """The parts of a head with `constants` of its own, as in `HeadSetting`."""
        own = dict(constants)
        loss = {name.removeprefix(LOSS): value for name, value in own.items() if name.startswith(LOSS)}
        return replace(self, loss={**self.loss, **loss}, scale=own.get("scale", self.scale))


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
    """K trained heads of a host. `state`: name -> (K, ...). `table`: a line per head. `about`: the host's settings.

    `frozen` is what lies between pool and classifier, the same for all heads. Columns of `table` that are named in
    `constants` hold constants in which heads differ from the host's settings.
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

    @property
    def constants(self) -> list[str]:
        return list(self.about.get("constants", []))

    def of(self, numbers: Sequence[int]) -> "Heads":
        """The heads `numbers` alone, numbered anew from 0."""
        table = self.table.take(pa.array(numbers, pa.int64()))
        renumbered = table.set_column(0, "number", pa.array(range(len(numbers)), pa.int64()))
        return Heads({k: t[list(numbers)] for k, t in self.state.items()}, renumbered, self.about, self.frozen)

    def parts_of(self, number: int) -> HeadParts:
        """The plug-ins and options of one head, with its own constants."""
        return self.parts.of((name, self.table[name][number].as_py()) for name in self.constants)

    def kinds(self, device: torch.device) -> list[tuple[list[int], Head]]:
        """What computes, on `device`, with the states of which heads; heads of equal constants share it.

        Raises UserError for options that do not fit.
        """
        frozen = None if self.frozen is None else self.frozen.to(device)
        alike: dict[str, list[int]] = {}
        for number in range(len(self.table)):
            alike.setdefault(repr(self.parts_of(number)), []).append(number)
        channels = self.about.get("map_channels")
        return [
            (numbers, build_head(self.parts_of(numbers[0]), self.context, channels, frozen))
            for numbers in alike.values()
        ]


def load_heads(folder: Path) -> Heads:
    """The heads that train_classifier wrote into `folder`. Raises UserError if they are missing or unreadable."""
    state, frozen, _ = load_classifier(folder / "heads.safetensors")
    try:
        table = pq.ParquetFile(folder / "heads.parquet").read()  # `read_table` imports pandas
        about = json.loads(table.schema.metadata[b"h2t"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: heads.parquet is missing or unreadable ({error}); run train_classifier again"
        ) from None
    return Heads(state, table, about, frozen)
