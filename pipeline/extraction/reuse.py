"""Finds rows of a previous cache that need no forward pass, and batch-norm statistics of it that can be kept.

A row is identified by what determines its bytes, not by its position: backbone, transform, dtype, batch-norm
statistics, the settings of its forward pass (device, batch size, threads, versions) and the digest of its image; an
augmented view also by seed, source and view number.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.cache.write.carry import Carrier, Source, broken_shards
from h2t.pipeline.base.text import counted
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.batchnorm import Statistics
from h2t.pipeline.extraction.recorded import ingredients

#: Key of `fingerprint_inputs` -> what messages call it.
NAMES = {"backbone": "weights", "transform": "transform", "views": "view policy", "batchnorm": "batch norm"}


@dataclass(frozen=True)
class Wanted:
    """What determines the bytes of the rows to write. Keys missing from `inputs` or `settings` are not compared.

    `rows`: table of the rows. `inputs`: of the fingerprint. `dataset`: name of the plug-in. `settings`: of the forward
    passes (`forward.settings`).
    """

    rows: pa.Table
    inputs: Mapping[str, Any]
    dtype: str
    dataset: str
    settings: Mapping[str, Any]


def kept_statistics(previous: Source, inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[Statistics, str]:
    """(statistics of `previous` among `names` that can be kept, a sentence on those that cannot or "").

    Statistics can be kept if backbone, passes and seed are the same. Raises UserError if `h2t extract` did not write
    the cache, CacheError if its statistics are damaged.
    """
    recorded = ingredients(f"extract.statistics_from: {previous.files}", previous.spec)
    differ = _differ("backbone", recorded, inputs)
    for key in ("passes", "seed"):
        differ += [f"batch norm: {c}" for c in changes(recorded["batchnorm"], inputs["batchnorm"], [key])]
    have = {} if differ else batchnorm.from_bytes(previous.statistics)
    kept = {name: have[name] for name in names if name in have}
    lost = [name for name in names if name not in have and name in (*batchnorm.SAMPLERS, "mixture")]
    if not lost:
        return kept, ""
    why = "; ".join(differ) or "it has none"
    return kept, f"the {', '.join(lost)} statistics are estimated again, not taken from {previous.files} ({why})"


def same_statistics(previous: Source, now: Statistics) -> set[str]:
    """Names of the statistics in `now` that have equal values in `previous`."""
    have = batchnorm.from_bytes(previous.statistics)
    return {
        name
        for name, own in now.items()
        if have.get(name, {}).keys() == own.keys() and all(torch.equal(own[k], have[name][k]) for k in own)
    }


def origins(previous: Source, wanted: Wanted, same: Collection[str]) -> tuple[np.ndarray, list[str]]:
    """(for each wanted row its row in `previous`, -1 if it must be extracted, int64; reasons, one sentence each).

    `same`: names of the statistics that have equal values in `previous`.
    """
    spec, rows = previous.spec, wanted.rows
    reasons = obstacles(spec, wanted)
    if reasons:
        return np.full(len(rows), -1, np.int64), reasons
    same_views = spec.fingerprint_inputs["views"]["seed"] == wanted.inputs["views"]["seed"]
    row_of = {key: row for row, key in enumerate(_keys(previous.rows))}
    origin = np.array(
        [row_of.get(key, -1) if key[0] in same and (same_views or key[1] == 0) else -1 for key in _keys(rows)],
        np.int64,
    )
    return origin, _reasons(previous, wanted, same)


def obstacles(spec: CacheSpec, wanted: Wanted) -> list[str]:
    """Why no row can be taken from a cache with `spec`, one sentence per reason; empty if rows can be taken."""
    reasons: list[str] = []
    for name in ("backbone", "transform"):
        reasons += _differ(name, spec.fingerprint_inputs, wanted.inputs)
    if spec.dtype != wanted.dtype:
        reasons.append(f"dtype: {spec.dtype} -> {wanted.dtype}")
    settings = {**wanted.settings, "dataset": wanted.dataset}
    return reasons + changes(spec.provenance, settings, sorted(settings))


def carrier(
    previous: Source, wanted: Wanted, statistics: Statistics, spec: CacheSpec, pending: Sequence[int]
) -> tuple[Carrier | None, str]:
    """(carrier that fills the shards `pending` of the new cache with rows of `previous`, a sentence on what it does).

    The carrier is None if no row can be taken. Shards to take rows from are verified first, and rows of damaged shards
    are not taken.
    """
    origin, reasons = origins(previous, wanted, same_statistics(previous, statistics))
    waiting = np.isin(np.arange(spec.rows) // spec.shard_rows, pending)
    damaged = broken_shards(previous, origin[waiting & (origin >= 0)])
    if damaged:
        lost = np.isin(origin // previous.spec.shard_rows, list(damaged)) & (origin >= 0)
        more = f" and {counted(len(damaged) - 1, 'more shard')}" if len(damaged) > 1 else ""
        not_taken = counted(int((lost & waiting).sum()), "row")
        reasons.append(f"DAMAGED: {next(iter(damaged.values()))}{more}, {not_taken} not taken")
        origin[lost] = -1
    extracted = int((waiting & (origin < 0)).sum())
    total = int(waiting.sum())
    why = f" ({'; '.join(reasons)})" if reasons else ""
    said = f"extracts {extracted:,} of {counted(total, 'row')}, takes {total - extracted:,} from {previous.files}{why}"
    return (Carrier(previous, spec, origin) if extracted < total else None), said


def _keys(table: pa.Table) -> list[tuple[Any, ...]]:
    """(statistics, view, digest, source) of every row. View 0 depends on the image alone, so its source is left out."""
    columns = (table[k].to_pylist() for k in ("statistics", "view", "digest", "source"))
    return [(name, view, digest, source if view else "") for name, view, digest, source in zip(*columns, strict=True)]


def _reasons(previous: Source, wanted: Wanted, same: Collection[str]) -> list[str]:
    """Why some rows must be extracted although others can be taken, one sentence per reason."""
    reasons = []
    known = set(previous.rows["digest"].unique().to_pylist())
    images = dict(zip(wanted.rows["source"].to_pylist(), wanted.rows["digest"].to_pylist(), strict=True))
    if new := sum(digest not in known for digest in images.values()):
        reasons.append(f"{counted(new, 'image')} {'is' if new == 1 else 'are'} new or changed")
    if other := sorted(set(wanted.rows["statistics"].unique().to_pylist()) - set(same)):
        reasons.append(f"the {', '.join(other)} statistics differ")
    return reasons + _differ("views", previous.spec.fingerprint_inputs, wanted.inputs)


def _differ(name: str, recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One line on the key `name` of the fingerprint's inputs, if it is asked for and differs; else none."""
    lines = changes(recorded.get(name), asked[name]) if name in asked else []
    return [f"{NAMES[name]}: {', '.join(lines)}"] if lines else []


def changes(old: Any, new: Any, keys: Sequence[str] | None = None) -> list[str]:
    """`key old -> new` for each key, or each of `keys`, that differs; `old -> new` if one of both is no mapping."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [] if old == new else [f"{_short(old)} -> {_short(new)}"]
    lines = []
    for key in sorted({*old, *new}) if keys is None else keys:
        a, b = old.get(key), new.get(key)
        if a != b:
            nested = changes(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else None
            lines += [f"{key} {n}" for n in nested] if nested else [f"{key} {_short(a)} -> {_short(b)}"]
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
