"""Heads on disk, and the host and pool objects that give them meaning."""

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
from h2t.pipeline.heads.host import Context
from h2t.pipeline.networks.weights import load_weights


@dataclass(frozen=True)
class HeadParts:
    """Which plug-ins a stack's heads are made of, with their options; `where` is the host's place in params.yaml."""

    host: str
    loss: dict[str, Any]
    classifier: str
    scale: float
    pool: str
    pool_options: dict[str, Any]
    where: str


def head_parts(parts: HeadParts, context: Context) -> tuple[Any, Any]:
    """(host, pool) for one task. Raises UserError for options they refuse."""
    hosts, pools = plugins.load("hosts", parts.host), plugins.load("pools", parts.pool)
    loss = build(hosts.Loss, f"{parts.where}.loss", parts.loss)
    options = build(pools.Options, f"{parts.where}.pool_options", parts.pool_options)
    host, pool = hosts.Host(loss, parts.classifier, parts.scale, context), pools.Pool(options, context.channels)
    if getattr(pool, "numbers", 1) != host.numbers:
        raise UserError(
            f"{parts.where}.pool: host {parts.host} needs {host.numbers} numbers a channel, pool {parts.pool} gives "
            f"{getattr(pool, 'numbers', 1)}; use pool: {'moments' if host.numbers == 2 else 'gap'}"
        )
    return host, pool


@dataclass(frozen=True)
class Heads:
    """A trained stack: `state` name -> (K, ...), `table` one line per head, `about` the host's settings."""

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
    """What train_classifier wrote into `folder`. Raises UserError."""
    state, _ = load_weights(folder / "heads.safetensors")
    try:
        table = pq.read_table(folder / "heads.parquet")
        about = json.loads(table.schema.metadata[b"h2t"])
    except (FileNotFoundError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: heads.parquet is missing or unreadable ({error}); train the heads again") from None
    return Heads(state, table, about)
