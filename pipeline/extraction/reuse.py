"""Finds rows of a previous cache that need no forward pass, and batch-norm statistics of it that can be kept.

A row is identified by what determines its bytes, not by its position: backbone, transform, dtype, batch-norm
statistics, the settings of its forward pass (device, batch size, threads, versions) and the digest of its image; an
augmented view also by seed, source and view number.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.cache.format.rows import GROUP_ROWS
from h2t.cache.format.spec import CacheSpec
from h2t.cache.write.carry import Carrier, Source, broken_shards
from h2t.pipeline.base.text import counted
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.batchnorm import Statistics
from h2t.pipeline.extraction.recorded import ingredients
from h2t.pipeline.extraction.row_plan import PlannedRows

#: Key of `fingerprint_inputs` -> what messages call it.
NAMES = {"backbone": "weights", "transform": "transform", "views": "view policy", "batchnorm": "batch norm"}

KEY = ("statistics", "view", "digest", "source")
HASH_BYTES = 16  # two of 10^10 keys share a hash with a probability of 10^-19
PIECE_ROWS = 2**16  # rows whose texts are Python objects at a time


@dataclass(frozen=True)
class Wanted:
    """What determines the bytes of the rows to write. Keys missing from `inputs` or `settings` are not compared.

    `rows`: the row table that will be written. `inputs`: of the fingerprint. `dataset`: name of the plug-in.
    `settings`: of the forward passes (`forward.settings`).
    """

    rows: PlannedRows
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

    `same`: names of the statistics that have equal values in `previous`. Of rows with equal keys the last is taken.
    In 40 bytes of memory for each row of `previous`, and 8 for each wanted row.
    """
    spec, rows = previous.spec, wanted.rows
    reasons = obstacles(spec, wanted)
    origin = np.full(len(rows), -1, np.int64)
    if reasons:
        return origin, reasons
    same_views = spec.fingerprint_inputs["views"]["seed"] == wanted.inputs["views"]["seed"]
    hashes = _hashes(_keys(_groups(previous, KEY)), spec.rows)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    at = 0
    for piece in _pieces(rows.groups()):
        own = _hashes(_keys([piece]), len(piece))
        last = np.searchsorted(hashes, own, side="right") - 1
        usable = np.array([name in same for name in piece["statistics"].to_pylist()])
        if not same_views:
            usable &= np.asarray(piece["view"]) == 0
        found = usable & (last >= 0) & (hashes[last] == own)
        origin[at : at + len(piece)][found] = order[last[found]]
        at += len(piece)
    del hashes, order
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
    waiting = np.isin(np.arange(spec.shards), pending).repeat(spec.shard_rows)[: spec.rows]
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


def _groups(source: Source, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yields these columns of the row table, a row group at a time."""
    for start in range(0, source.spec.rows, GROUP_ROWS):
        yield source.lines(np.arange(start, min(start + GROUP_ROWS, source.spec.rows)), columns)


def _pieces(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yields the same rows in tables of at most `PIECE_ROWS`."""
    return (table.slice(start, PIECE_ROWS) for table in tables for start in range(0, len(table), PIECE_ROWS))


def _keys(tables: Iterable[pa.Table]) -> Iterator[str]:
    """Yields what identifies each row, as a text. View 0 depends on the image alone, so its source is left out."""
    for piece in _pieces(tables):
        for name, view, digest, source in zip(*(piece[column].to_pylist() for column in KEY), strict=True):
            yield f"{name}\0{view}\0{digest}\0{source if view else ''}"


def _digests(tables: Iterable[pa.Table]) -> Iterator[str]:
    """Yields the column `digest`."""
    for piece in _pieces(tables):
        yield from piece["digest"].to_pylist()


def _hashes(texts: Iterable[str], size: int) -> np.ndarray:
    """A hash of each of `size` texts, as bytes (size,)."""
    kind = f"S{HASH_BYTES}"
    return np.fromiter((blake2b(text.encode(), digest_size=HASH_BYTES).digest() for text in texts), kind, size)


def _reasons(previous: Source, wanted: Wanted, same: Collection[str]) -> list[str]:
    """Why some rows must be extracted although others can be taken, one sentence per reason."""
    reasons = []
    known = _hashes(_digests(_groups(previous, ["digest"])), previous.spec.rows)
    known.sort()
    new = 0
    for piece in _pieces([wanted.rows.samples.select(["digest"])]):
        own = _hashes(_digests([piece]), len(piece))
        new += int((known[np.minimum(np.searchsorted(known, own), len(known) - 1)] != own).sum())
    if new:
        reasons.append(f"{counted(new, 'image')} {'is' if new == 1 else 'are'} new or changed")
    if other := sorted(set(wanted.rows.plan.statistics) - set(same)):
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
