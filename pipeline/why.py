"""Why a cache is stale: which ingredient of its fingerprint is not what the parameters ask for, and what that costs.

Ingredients: weights, transform, view policy, batch norm, dataset rows, dtype. Codec and sizes change bytes, not values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache.reader import Cache
from pipeline import batchnorm
from pipeline.errors import UserError
from pipeline.network import NONE, backbone_identity
from pipeline.samples import Samples
from pipeline.stages import extract

EXAMPLES = 3
NAMES = {"backbone": "weights", "transform": "transform", "views": "view policy", "batchnorm": "batch norm"}


@dataclass(frozen=True)
class Reason:
    """One ingredient that differs; `every` says whether it makes every row another one."""

    ingredient: str
    detail: str
    every: bool


@dataclass(frozen=True)
class Verdict:
    """Why a cache is not what is asked for; `rows` counts rows to extract again, of `of` that are wanted."""

    reasons: list[Reason]
    unknown: list[str]
    rows: int
    of: int
    layout: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """In words, one line each."""
        found = [f"{r.ingredient}: {r.detail}" for r in self.reasons]
        found += [f"not compared: {what}" for what in self.unknown]
        found += [f"layout: {what} (the same values in other bytes)" for what in self.layout]
        if self.rows:
            share = f"{100 * self.rows / self.of:.1f} %"
            return [*found, f"to extract again: {self.rows} of {self.of} rows ({share})"]
        if self.layout:
            return [*found, "to extract again: nothing; to write again: every shard"]
        return [*found, "to extract again: nothing" if self.reasons else "this is the cache that is asked for"]


def why(cache: Cache, params: extract.Params, samples: Samples | None, backbone_dir: Path | None, seed: int) -> Verdict:
    """Compares `cache` with what extract would write now. What is None is not compared. Raises UserError."""
    found = cache.spec.fingerprint_inputs
    if "parent" in found:
        raise UserError(f"{cache.files}: is a pooled copy of {found['parent'][:12]}; ask of the cache it was made from")
    if found.get("backbone", {}).get("weights") == NONE:
        raise UserError(f"{cache.files}: was imported; no parameters lead to it")
    reasons: list[Reason] = []
    unknown: list[str] = []
    asked: dict[str, Any] = {}
    if backbone_dir is not None:
        asked["backbone"] = {**backbone_identity(backbone_dir), "tap": extract.TAP}
    else:
        unknown.append("weights (no backbone here)")
    if samples is not None:
        everything = extract.fingerprint_inputs(params, samples, {}, seed)
        asked |= {k: v for k, v in everything.items() if k not in ("backbone", "dataset")}
    else:
        unknown.append("dataset and transform (no prepared samples here)")
    for name, value in asked.items():
        changes = _changes(_without_statistics(found.get(name)), value)
        reasons += [Reason(NAMES[name], "; ".join(changes), _concerns_every(name, changes))] if changes else []
    if params.dtype != cache.spec.dtype:
        reasons.append(Reason("dtype", f"{cache.spec.dtype} -> {params.dtype}", True))
    rows, of = cache.spec.rows, cache.spec.rows
    if samples is not None:
        wanted = extract.row_table(params, samples)
        of = len(wanted)
        reasons += _dataset(cache.rows, wanted, params)
        rows = of if any(r.every for r in reasons) else len(rows_to_extract(cache.rows, wanted, params))
    elif not any(r.every for r in reasons):
        rows = 0
    return Verdict(reasons, unknown, rows, of, _layout(cache, params))


def rows_to_extract(have: pa.Table, wanted: pa.Table, params: extract.Params) -> list[int]:
    """Rows of `wanted` that the cache with the row table `have` cannot give, all else being equal.

    A row is given by its (statistics, source, view) and its image's digest. Where training samples changed, statistics
    that are estimated on them change, and with them every row under them, unless they are kept (`statistics_from`).
    """
    stale = set() if getattr(params, "statistics_from", None) else _stale(have, wanted)
    known = set(_keys(have))
    return [
        row
        for row, (key, name) in enumerate(zip(_keys(wanted), wanted["statistics"].to_pylist(), strict=True))
        if name in stale or key not in known
    ]


def _keys(table: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(table[k].to_pylist() for k in ("statistics", "source", "view", "digest")), strict=True))


def _training(table: pa.Table) -> set[tuple[Any, ...]]:
    columns = [table[k].to_pylist() for k in ("split", "label", "source", "digest")]
    return {line for line in zip(*columns, strict=True) if line[0] == "train"}


def _stale(have: pa.Table, wanted: pa.Table) -> set[str]:
    """The statistics that are estimated on training samples, if these changed."""
    if _training(have) == _training(wanted):
        return set()
    return {*batchnorm.SAMPLERS, "mixture"} & set(wanted["statistics"].unique().to_pylist())


def _dataset(have: pa.Table, wanted: pa.Table, params: extract.Params) -> list[Reason]:
    """Samples that were added, removed or changed (another image, label or split)."""
    old, new = (_samples(table) for table in (have, wanted))
    parts = {
        "added": sorted(set(new) - set(old)),
        "removed": sorted(set(old) - set(new)),
        "changed": sorted(s for s in set(old) & set(new) if old[s] != new[s]),
    }
    if not any(parts.values()):
        return []
    detail = ", ".join(f"{len(v)} images {k}" + _some(v) for k, v in parts.items() if v)
    stale = set() if getattr(params, "statistics_from", None) else _stale(have, wanted)
    if stale:
        detail += f"; training images differ, so the {', '.join(sorted(stale))} statistics would be estimated anew"
    return [Reason("dataset", detail, False)]


def _samples(table: pa.Table) -> dict[str, tuple[Any, ...]]:
    columns = (table[k].to_pylist() for k in ("source", "split", "label", "digest"))
    return {source: tuple(rest) for source, *rest in zip(*columns, strict=True)}


def _some(sources: list[str]) -> str:
    more = f", and {len(sources) - EXAMPLES} more" if len(sources) > EXAMPLES else ""
    return f" ({', '.join(sources[:EXAMPLES])}{more})"


def _without_statistics(value: Any) -> Any:
    """Statistics follow from the other ingredients."""
    return {k: v for k, v in value.items() if k != "statistics"} if isinstance(value, Mapping) else value


def _concerns_every(name: str, changes: list[str]) -> bool:
    """Another view policy or list of recipes adds and removes rows and leaves the others as they are."""
    keeps = ("max ", "target ", "recipes ")
    return not (name in ("views", "batchnorm") and all(c.startswith(keeps) for c in changes))


def _changes(old: Any, new: Any) -> list[str]:
    """`key old -> new` for every key that differs."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [] if old == new else [f"{_short(old)} -> {_short(new)}"]
    keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    return [f"{k} {_short(old.get(k))} -> {_short(new.get(k))}" for k in keys]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def _layout(cache: Cache, params: extract.Params) -> list[str]:
    spec = cache.spec
    chunk_rows, shard_rows = extract.layout(params, max(spec.row_bytes(e) for e in range(spec.experts)))
    asked = {"codec": params.codec, "chunk_rows": chunk_rows, "shard_rows": shard_rows}
    return [f"{k} {spec.layout[k]} -> {v}" for k, v in asked.items() if spec.layout[k] != v]
