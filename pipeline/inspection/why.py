"""Why a cache is stale: which ingredient of its fingerprint is not what the parameters ask for, and what that costs.

Ingredients: weights, transform, view policy, batch norm, dataset rows, dtype. Codec and sizes change bytes, not values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from h2t.cache.format.spec import sha256
from h2t.cache.reader import Cache
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.recorded import ingredients
from h2t.pipeline.extraction.reuse import NAMES, Wanted, changes, kept_statistics, origins
from h2t.pipeline.networks.trained import backbone_identity
from h2t.pipeline.stages import extract

EXAMPLES = 3


@dataclass(frozen=True)
class Reason:
    """One ingredient that differs; `every` says whether it makes every row another one."""

    ingredient: str
    detail: str
    every: bool


@dataclass(frozen=True)
class Verdict:
    """Why a cache is not what is asked for, and what extract would compute now: `rows` of the `of` that are wanted.

    `source` is the cache that gives the others (`extract.statistics_from`). Where there is none, `possible` counts the
    rows to extract if it were this cache. `obstacles`: why none of the source's rows can be taken.
    """

    reasons: list[Reason]
    unknown: list[str]
    rows: int
    of: int
    layout: list[str] = field(default_factory=list)
    source: str | None = None
    possible: int = 0
    obstacles: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """In words, one line each."""
        found = [f"{r.ingredient}: {r.detail}" for r in self.reasons]
        found += [f"not compared: {what}" for what in self.unknown]
        found += [f"layout: {what} (the same values in other bytes)" for what in self.layout]
        return [*found, self._cost()]

    def _cost(self) -> str:
        if not self.reasons and not self.layout:
            return "nothing else differs" if self.unknown else "this is the cache that is asked for"
        if self.source is None:
            less = f"; {self._share(self.possible)} with extract.statistics_from set to this cache"
            return f"to extract again: all {self.of} rows" + (less if self.possible < self.of else "")
        why = f" ({'; '.join(self.obstacles)})" if self.obstacles else ""
        return f"to extract again: {self._share(self.rows)}, the others are taken from {self.source}{why}"

    def _share(self, rows: int) -> str:
        return f"{rows} of {self.of} rows ({100 * rows / self.of:.1f} %)" if rows else "none"


def why(
    cache: Cache,
    params: extract.Params,
    samples: Samples | None,
    backbone_dir: Path | None,
    seed: int,
    previous: Cache | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Verdict:
    """Compares `cache` with what extract would write now. What is None is not compared. Raises UserError.

    `previous` is the cache that `extract.statistics_from` names, `settings` what forward passes would run under here.
    """
    found = ingredients(cache.files, cache.spec)
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
        differ = changes(_without_statistics(found.get(name)), value)
        reasons += [Reason(NAMES[name], "; ".join(differ), _concerns_every(name, differ))] if differ else []
    if params.dtype != cache.spec.dtype:
        reasons.append(Reason("dtype", f"{cache.spec.dtype} -> {params.dtype}", True))
    computed = cache.spec.provenance.get("precision", params.precision)
    if computed != params.precision:
        reasons.append(Reason("precision", f"{computed} -> {params.precision}", True))
    layout = _layout(cache, params)
    if samples is None:
        of = cache.spec.rows
        stale = of if reasons or layout else 0
        return Verdict(reasons, unknown, stale, of, layout, possible=stale)
    rows = extract.row_table(params, samples)
    wanted = Wanted(rows, asked, params.dtype, samples.facts["dataset"], settings or {})
    kept = kept_statistics(previous, asked, _names(rows))[0] if previous is not None else {}
    reasons += _statistics(cache, _names(rows), kept) + _dataset(cache.rows, rows, bool(kept))
    if not reasons and not layout:
        return Verdict([], unknown, 0, len(rows))
    missing, hindered = _to_extract(previous or cache, wanted)
    if previous is None:
        return Verdict(reasons, unknown, len(rows), len(rows), layout, possible=missing)
    return Verdict(reasons, unknown, missing, len(rows), layout, str(previous.files), obstacles=hindered)


def _to_extract(source: Cache, wanted: Wanted) -> tuple[int, list[str]]:
    """How many rows must be computed where `source` gives statistics and rows; and why, in words."""
    kept, _ = kept_statistics(source, wanted.inputs, _names(wanted.rows))
    origin, reasons = origins(source, wanted, {*kept, "stage1"})
    return int((origin < 0).sum()), reasons


def _names(rows: pa.Table) -> list[str]:
    return sorted(set(rows["statistics"].unique().to_pylist()))


def _statistics(cache: Cache, names: list[str], kept: batchnorm.Statistics) -> list[Reason]:
    """Batch-norm statistics `names` that are kept now and were others then, or were kept then and are not now."""
    origin = cache.spec.provenance.get("statistics_from")
    detail = ""
    if sorted(kept) == names:
        differ = changes(cache.spec.fingerprint_inputs["batchnorm"].get("statistics"), sha256(batchnorm.to_bytes(kept)))
        detail = f"{differ[0]}, kept from another cache" if differ else ""
    elif origin is not None and not kept:
        detail = f"were kept from the cache {origin[:12]}, would be estimated anew"
    return [Reason("batch norm", f"statistics {detail}", False)] if detail else []


def _training(table: pa.Table) -> set[tuple[Any, ...]]:
    columns = [table[k].to_pylist() for k in ("split", "label", "source", "digest")]
    return {line for line in zip(*columns, strict=True) if line[0] == "train"}


def _stale(have: pa.Table, wanted: pa.Table) -> set[str]:
    """The statistics that are estimated on training samples, if these changed."""
    if _training(have) == _training(wanted):
        return set()
    return {*batchnorm.SAMPLERS, "mixture"} & set(wanted["statistics"].unique().to_pylist())


def _dataset(have: pa.Table, wanted: pa.Table, kept: bool) -> list[Reason]:
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
    stale = set() if kept else _stale(have, wanted)
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


def _layout(cache: Cache, params: extract.Params) -> list[str]:
    spec = cache.spec
    chunk_rows, shard_rows = extract.layout(params, max(spec.row_bytes(e) for e in range(spec.experts)))
    asked = {"codec": params.codec, "chunk_rows": chunk_rows, "shard_rows": shard_rows}
    return [f"{k} {spec.layout[k]} -> {v}" for k, v in asked.items() if spec.layout[k] != v]
