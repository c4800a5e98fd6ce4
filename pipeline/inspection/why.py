"""Explains why a cache is stale: which inputs differ from the parameters, and how many rows must be extracted again.

Inputs are weights, transform, view policy, batch norm, dataset rows and dtype. Codec, chunk and shard sizes change the
stored bytes, not the values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from h2t.cache.format.spec import sha256
from h2t.cache.reader import Cache
from h2t.pipeline.base.text import counted, some
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.recorded import ingredients
from h2t.pipeline.extraction.reuse import NAMES, Wanted, changes, kept_statistics, origins
from h2t.pipeline.extraction.row_plan import recorded_groups
from h2t.pipeline.networks.trained import backbone_facts, backbone_identity
from h2t.pipeline.stages import extract

EXAMPLES = 3  # image names shown for each kind of change


@dataclass(frozen=True)
class Reason:
    """An input that differs. `every` is True if it changes every row."""

    ingredient: str
    detail: str
    every: bool


@dataclass(frozen=True)
class Verdict:
    """How a cache differs from the parameters, and what extract would compute now: `rows` out of `of` rows.

    `unknown` lists what could not be compared, `layout` differences in stored bytes alone. `source` is the cache that
    `extract.statistics_from` names; the other rows are taken from it. Without a source, `possible` counts the rows to
    extract if `extract.statistics_from` named this cache. `obstacles` says why none of the source's rows can be taken.
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
        """The verdict as text: one line per difference, then one line on the cost."""
        texts = [f"{r.ingredient}: {r.detail}" for r in self.reasons]
        texts += [f"not compared: {what}" for what in self.unknown]
        texts += [f"layout: {what} (same values, other bytes)" for what in self.layout]
        return [*texts, self._cost()]

    def _cost(self) -> str:
        """Which rows must be extracted again."""
        if not self.reasons and not self.layout:
            return "no other difference" if self.unknown else "the cache matches the parameters"
        if self.source is None:
            less = f"; {self._share(self.possible)} with extract.statistics_from set to this cache"
            return f"to extract again: all {counted(self.of, 'row')}" + (less if self.possible < self.of else "")
        why = f" ({'; '.join(self.obstacles)})" if self.obstacles else ""
        return f"to extract again: {self._share(self.rows)}; the others are taken from {self.source}{why}"

    def _share(self, rows: int) -> str:
        """`rows` out of all, with its percentage."""
        return f"{rows:,} of {counted(self.of, 'row')} ({100 * rows / self.of:.1f} %)" if rows else "none"


def why(
    cache: Cache,
    params: extract.Params,
    samples: Samples | None,
    backbone_dir: Path | None,
    seed: int,
    previous: Cache | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Verdict:
    """Compares `cache` with what extract would write now.

    `samples` and `backbone_dir` may be None: then their part is not compared. `previous` is the cache that
    `extract.statistics_from` names; `settings` are the settings of forward passes on this machine, which decide whether
    its rows can be taken. Raises UserError for a pooled or imported cache.
    """
    recorded = ingredients(cache.files, cache.spec)
    reasons: list[Reason] = []
    unknown: list[str] = []
    asked: dict[str, Any] = {}
    if backbone_dir is not None:
        asked["backbone"] = {**backbone_identity(backbone_dir), "tap": extract.TAP}
        facts = backbone_facts(backbone_dir)
        params = extract.with_recipes_of(params, facts)
        samples = None if samples is None else samples.with_input(facts.input)
    else:
        unknown.append("weights (no backbone here)")
    if samples is not None:
        everything = extract.fingerprint_inputs(params, samples, {}, seed)
        asked |= {k: v for k, v in everything.items() if k not in ("backbone", "dataset")}
    else:
        unknown.append("dataset and transform (no prepared samples here)")
    for name, value in asked.items():
        differ = changes(_without_statistics(recorded.get(name)), value)
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
    planned = extract.planned_rows(params, samples)
    rows = planned.table()
    wanted = Wanted(planned, asked, params.dtype, samples.facts["dataset"], settings or {})
    names = planned.plan.statistics
    kept = kept_statistics(previous, asked, names)[0] if previous is not None else {}
    reasons += _statistics(cache, names, kept) + _dataset(cache.rows, rows, bool(kept))
    if recorded_groups(cache.spec.provenance) != recorded_groups(planned.test_groups):
        reasons.append(Reason("dataset", "other groups of test images", False))
    if not reasons and not layout:
        return Verdict([], unknown, 0, len(rows))
    missing, hindered = _to_extract(previous or cache, wanted)
    if previous is None:
        return Verdict(reasons, unknown, len(rows), len(rows), layout, possible=missing)
    return Verdict(reasons, unknown, missing, len(rows), layout, str(previous.files), obstacles=hindered)


def _to_extract(source: Cache, wanted: Wanted) -> tuple[int, list[str]]:
    """How many rows must be computed if `source` gives statistics and rows; and why, in words."""
    kept, _ = kept_statistics(source, wanted.inputs, wanted.rows.plan.statistics)
    origin, reasons = origins(source, wanted, {*kept, "stage1"})
    return int((origin < 0).sum()), reasons


def _statistics(cache: Cache, names: list[str], kept: batchnorm.Statistics) -> list[Reason]:
    """Reports batch-norm statistics that are kept from another cache but differ, or that are no longer kept."""
    origin = cache.spec.provenance.get("statistics_from")
    detail = ""
    if sorted(kept) == names:
        differ = changes(cache.spec.fingerprint_inputs["batchnorm"].get("statistics"), sha256(batchnorm.to_bytes(kept)))
        detail = f"{differ[0]}, kept from another cache" if differ else ""
    elif origin is not None and not kept:
        detail = f"were kept from the cache {origin[:12]}, would be estimated again"
    return [Reason("batch norm", f"statistics {detail}", False)] if detail else []


def _training(table: pa.Table) -> set[tuple[Any, ...]]:
    """The training samples of a row table, without regard to their order."""
    columns = [table[k].to_pylist() for k in ("split", "label", "source", "digest")]
    return {line for line in zip(*columns, strict=True) if line[0] == "train"}


def _stale(have: pa.Table, wanted: pa.Table) -> set[str]:
    """The statistics to estimate again because the training samples changed."""
    if _training(have) == _training(wanted):
        return set()
    return {*batchnorm.SAMPLERS, "mixture"} & set(wanted["statistics"].unique().to_pylist())


def _dataset(have: pa.Table, wanted: pa.Table, kept: bool) -> list[Reason]:
    """Reports samples that were added, removed or changed (image, label or split)."""
    old, new = (_samples(table) for table in (have, wanted))
    parts = {
        "added": sorted(set(new) - set(old)),
        "removed": sorted(set(old) - set(new)),
        "changed": sorted(s for s in set(old) & set(new) if old[s] != new[s]),
    }
    if not any(parts.values()):
        return []
    detail = ", ".join(f"{counted(len(v), 'image')} {k} ({some(v, EXAMPLES)})" for k, v in parts.items() if v)
    stale = set() if kept else _stale(have, wanted)
    if stale:
        detail += f"; training images differ, so the {', '.join(sorted(stale))} statistics would be estimated again"
    return [Reason("dataset", detail, False)]


def _samples(table: pa.Table) -> dict[str, tuple[Any, ...]]:
    """Source -> (split, label, digest)."""
    columns = (table[k].to_pylist() for k in ("source", "split", "label", "digest"))
    return {source: tuple(rest) for source, *rest in zip(*columns, strict=True)}


def _without_statistics(value: Any) -> Any:
    """`value` without the digest of statistics, which follow from the other inputs."""
    return {k: v for k, v in value.items() if k != "statistics"} if isinstance(value, Mapping) else value


def _concerns_every(name: str, changes: list[str]) -> bool:
    """Whether these changes concern every row. A changed view policy or recipe list only adds and removes rows."""
    keeps = ("max ", "target ", "recipes ")
    return not (name in ("views", "batchnorm") and all(c.startswith(keeps) for c in changes))


def _layout(cache: Cache, params: extract.Params) -> list[str]:
    """Differences in codec, rows per chunk and rows per shard."""
    spec = cache.spec
    chunk_rows, shard_rows = extract.layout(params, spec.largest_row_bytes, spec.rows)
    asked = {"codec": params.codec, "chunk_rows": chunk_rows, "shard_rows": shard_rows}
    return [f"{k} {spec.layout[k]} -> {v}" for k, v in asked.items() if spec.layout[k] != v]
