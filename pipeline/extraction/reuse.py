"""Which rows of a previous cache need no forward pass, and whether its batch-norm statistics can be kept.

A row is what decides its bytes, wherever it stands: backbone, transform, dtype, batch-norm statistics, what computes it
(device, batch size, threads, versions) and its image's digest; for an augmented view also seed, source and view.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.cache.write.carry import Carrier, Source, broken_shards
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.batchnorm import Statistics
from h2t.pipeline.extraction.recorded import ingredients

#: Ingredient of the fingerprint -> how people call it.
NAMES = {"backbone": "weights", "transform": "transform", "views": "view policy", "batchnorm": "batch norm"}


@dataclass(frozen=True)
class Wanted:
    """What decides the bytes of the rows that are wanted. What `inputs` or `settings` lack is not compared.

    `rows` is their table, `inputs` the fingerprint's, `dataset` its plug-in, `settings` those of the forward passes.
    """

    rows: pa.Table
    inputs: Mapping[str, Any]
    dtype: str
    dataset: str
    settings: Mapping[str, Any]


def kept_statistics(previous: Source, inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[Statistics, str]:
    """The statistics `names` of `previous` that can be kept, and in words why others cannot.

    They belong to a backbone, and are what the parameters ask for if passes and seed are the same. Raises UserError for
    a cache that no extraction wrote, CacheError if the statistics are damaged.
    """
    found = ingredients(f"extract.statistics_from: {previous.files}", previous.spec)
    differ = _differ("backbone", found, inputs)
    for key in ("passes", "seed"):
        differ += [f"batch norm: {c}" for c in changes(found["batchnorm"], inputs["batchnorm"], [key])]
    have = {} if differ else batchnorm.from_bytes(previous.statistics)
    kept = {name: have[name] for name in names if name in have}
    lost = [name for name in names if name not in have and name in (*batchnorm.SAMPLERS, "mixture")]
    if not lost:
        return kept, ""
    why = "; ".join(differ) or "it has none"
    return kept, f"the {', '.join(lost)} statistics are estimated anew, not kept from {previous.files} ({why})"


def same_statistics(previous: Source, now: Statistics) -> set[str]:
    """Names of the statistics that have the same values in `previous`."""
    have = batchnorm.from_bytes(previous.statistics)
    return {
        name
        for name, own in now.items()
        if have.get(name, {}).keys() == own.keys() and all(torch.equal(own[k], have[name][k]) for k in own)
    }


def origins(previous: Source, wanted: Wanted, same: Collection[str]) -> tuple[np.ndarray, list[str]]:
    """For every wanted row its row in `previous`, int64, -1 where it must be extracted; and, in words, why some must.

    `same` names the statistics that have the same values there.
    """
    spec, rows = previous.spec, wanted.rows
    everything = obstacles(spec, wanted)
    if everything:
        return np.full(len(rows), -1, np.int64), everything
    views_hold = spec.fingerprint_inputs["views"]["seed"] == wanted.inputs["views"]["seed"]
    there = {key: row for row, key in enumerate(_keys(previous.rows))}
    origin = np.array(
        [there.get(key, -1) if key[0] in same and (views_hold or key[1] == 0) else -1 for key in _keys(rows)],
        np.int64,
    )
    return origin, _reasons(previous, wanted, same)


def obstacles(spec: CacheSpec, wanted: Wanted) -> list[str]:
    """Why no row of a cache of `spec` can be taken, in words; nothing if rows can."""
    found: list[str] = []
    for name in ("backbone", "transform"):
        found += _differ(name, spec.fingerprint_inputs, wanted.inputs)
    if spec.dtype != wanted.dtype:
        found.append(f"dtype: {spec.dtype} -> {wanted.dtype}")
    settings = {**wanted.settings, "dataset": wanted.dataset}
    return found + changes(spec.provenance, settings, sorted(settings))


def carrier(
    previous: Source, wanted: Wanted, statistics: Statistics, spec: CacheSpec, pending: Sequence[int]
) -> tuple[Carrier | None, str]:
    """What completes the shards `pending` of the cache of `spec` with rows of `previous`, and in words what it does.

    None if `previous` gives no row. Whatever is to be taken is held against its checksums first.
    """
    origin, reasons = origins(previous, wanted, same_statistics(previous, statistics))
    waiting = np.isin(np.arange(spec.rows) // spec.shard_rows, pending)
    damaged = broken_shards(previous, origin[waiting & (origin >= 0)])
    if damaged:
        lost = np.isin(origin // previous.spec.shard_rows, list(damaged)) & (origin >= 0)
        more = f" and {len(damaged) - 1} shards more" if len(damaged) > 1 else ""
        reasons.append(f"DAMAGED: {next(iter(damaged.values()))}{more}, {(lost & waiting).sum()} rows not taken")
        origin[lost] = -1
    anew = int((waiting & (origin < 0)).sum())
    of = int(waiting.sum())
    why = f" ({'; '.join(reasons)})" if reasons else ""
    said = f"{anew} of {of} rows are extracted, {of - anew} taken from {previous.files}{why}"
    return (Carrier(previous, spec, origin) if anew < of else None), said


def _keys(table: pa.Table) -> list[tuple[Any, ...]]:
    """(statistics, view, digest, source) of every row; view 0 hangs on the image alone, so its source is left out."""
    columns = (table[k].to_pylist() for k in ("statistics", "view", "digest", "source"))
    return [(name, view, digest, source if view else "") for name, view, digest, source in zip(*columns, strict=True)]


def _reasons(previous: Source, wanted: Wanted, same: Collection[str]) -> list[str]:
    """Why some rows must be extracted although nothing forbids to take rows, in words."""
    found = []
    known = set(previous.rows["digest"].unique().to_pylist())
    images = dict(zip(wanted.rows["source"].to_pylist(), wanted.rows["digest"].to_pylist(), strict=True))
    if new := sum(digest not in known for digest in images.values()):
        found.append(f"{new} images are new or changed")
    if other := sorted(set(wanted.rows["statistics"].unique().to_pylist()) - set(same)):
        found.append(f"the {', '.join(other)} statistics are others")
    return found + _differ("views", previous.spec.fingerprint_inputs, wanted.inputs)


def _differ(name: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The ingredient `name` in one line if it differs and is known."""
    lines = changes(found.get(name), asked[name]) if name in asked else []
    return [f"{NAMES[name]}: {', '.join(lines)}"] if lines else []


def changes(old: Any, new: Any, keys: Sequence[str] | None = None) -> list[str]:
    """`key old -> new` for every key (or those of `keys`) that differs; `old -> new` for what is no mapping."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [] if old == new else [f"{_short(old)} -> {_short(new)}"]
    found = []
    for key in sorted({*old, *new}) if keys is None else keys:
        a, b = old.get(key), new.get(key)
        if a != b:
            nested = changes(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else None
            found += [f"{key} {n}" for n in nested] if nested else [f"{key} {_short(a)} -> {_short(b)}"]
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
