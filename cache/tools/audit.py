"""Whole-cache work, out of core: what a cache holds, its value ranges, what two caches differ in.

The larger rooms have files of their own and are entered from here: `verify`, `advise`, `pooled`.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from h2t.cache.format.spec import FORMAT, RECORD, CacheSpec, to_float32
from h2t.cache.reader import Cache
from h2t.cache.tools.advice import advise
from h2t.cache.tools.pooled import pooled
from h2t.cache.tools.verify import Fault, verify

__all__ = ["Fault", "advise", "describe", "diff", "pooled", "stats", "verify"]

WORKERS = min(4, os.cpu_count() or 1)
BLOCK_BYTES = 8 * 1024 * 1024  # of stored values; a worker needs about six times as much memory
IDENTITY = ["split", "statistics", "source", "view"]


def describe(cache: Cache) -> dict[str, Any]:
    """The content of `cache` as a JSON object; sizes in bytes. Reads only the commit record and the row table."""
    spec, rows = cache.spec, cache.rows
    # `group_by` imports pandas where it is installed, 0.2 s.
    counts = Counter(zip(rows["split"].to_pylist(), rows["statistics"].to_pylist(), strict=True))
    return {
        "format": FORMAT,
        "fingerprint": spec.fingerprint,
        "fingerprint_inputs": dict(spec.fingerprint_inputs),
        "rows": spec.rows,
        "samples": pc.count_distinct(rows["sample"]).as_py(),
        "classes": pc.count_distinct(rows["label"]).as_py(),
        "views": pc.count_distinct(rows["view"]).as_py(),
        "experts": [{"shape": list(shape)} for shape in spec.maps],
        "dtype": spec.dtype,
        "codec": spec.codec,
        "chunk_rows": spec.chunk_rows,
        "shard_rows": spec.shard_rows,
        "shards": spec.shards * spec.experts,
        "files": len(cache.commit.files) + 1,
        "bytes": sum(size for size, _ in cache.commit.files.values()) + cache.files.size(RECORD),
        "value_bytes": spec.value_bytes,
        "splits": [{"split": a, "statistics": b, "rows": count} for (a, b), count in sorted(counts.items())],
        "provenance": dict(spec.provenance),
    }


@dataclass(slots=True)
class _Sums:
    """Sums over rows of one expert; `norms` is label -> (rows, sum of L2 norms)."""

    values: int = 0
    zeros: int = 0
    nan: int = 0
    inf: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    norms: dict[int, tuple[int, float]] | None = None

    def add(self, other: "_Sums") -> None:
        self.values += other.values
        self.zeros += other.zeros
        self.nan += other.nan
        self.inf += other.inf
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)
        self.total += other.total
        self.norms = self.norms or {}
        for label, (rows, norm) in (other.norms or {}).items():
            have = self.norms.get(label, (0, 0.0))
            self.norms[label] = (have[0] + rows, have[1] + norm)


def _block(cache: Cache, expert: int, start: int, stop: int, labels: np.ndarray) -> _Sums:
    stored = cache.read(np.arange(start, stop), expert=expert)
    values = to_float32(stored, cache.spec.dtype).reshape(len(stored), -1).astype(np.float64)
    finite = np.isfinite(values)
    sums = _Sums(values=values.size, zeros=int((values == 0).sum()), nan=int(np.isnan(values).sum()))
    sums.inf = int(finite.size - finite.sum()) - sums.nan
    if finite.any():
        sums.low = float(values.min(where=finite, initial=np.inf))
        sums.high = float(values.max(where=finite, initial=-np.inf))
    values[~finite] = 0
    sums.total = float(values.sum())
    norm = np.sqrt(np.einsum("ij,ij->i", values, values))
    present, which = np.unique(labels, return_inverse=True)
    rows, norms = np.bincount(which), np.bincount(which, norm)
    sums.norms = {int(label): (int(n), float(s)) for label, n, s in zip(present, rows, norms, strict=True)}
    return sums


def stats(cache: Cache, *, workers: int = WORKERS) -> list[dict[str, Any]]:
    """Statistics of the values of each expert, as one JSON object per expert.

    `sparsity` is the share of values that are 0; `values`, `nan` and `inf` are counts; `classes` lists the rows and the
    mean L2 norm of the maps of each class. `min`, `max`, `mean` and norms are over finite values; `min`, `max` and
    `mean` are None if there are none. Memory depends on the number of workers, not on the size of the cache.
    """
    import dask

    labels = cache.rows["label"].to_numpy()
    spec = cache.spec
    table = []
    for expert, shape in enumerate(spec.maps):
        step = max(1, BLOCK_BYTES // (spec.row_bytes(expert) * spec.chunk_rows)) * spec.chunk_rows
        blocks = [(start, min(start + step, spec.rows)) for start in range(0, spec.rows, step)]
        tasks = [dask.delayed(_block, pure=False, traverse=False)(cache, expert, a, b, labels[a:b]) for a, b in blocks]
        sums = _Sums()
        for part in dask.compute(*tasks, scheduler="threads", num_workers=workers):
            sums.add(part)
        finite = sums.values - sums.nan - sums.inf
        table.append(
            {
                "expert": expert,
                "shape": list(shape),
                "values": sums.values,
                "sparsity": sums.zeros / sums.values,
                "min": sums.low if finite else None,
                "max": sums.high if finite else None,
                "mean": sums.total / finite if finite else None,
                "nan": sums.nan,
                "inf": sums.inf,
                "classes": [
                    {"label": label, "rows": rows, "mean_l2": norm / rows}
                    for label, (rows, norm) in sorted((sums.norms or {}).items())
                ],
            }
        )
    return table


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested JSON value as dotted key -> leaf."""
    if isinstance(value, Mapping) and value:
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()
        }
    if isinstance(value, list) and value:
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{prefix}[{i}]").items()}
    return {prefix: value}


def _changes(old: Any, new: Any) -> list[dict[str, Any]]:
    """Keys that differ, each with `old` and `new`; one of the two is absent where the key is."""
    a, b = _flat(old), _flat(new)
    keys = [key for key in sorted({*a, *b}) if key not in a or key not in b or a[key] != b[key]]
    return [{"key": k, **({"old": a[k]} if k in a else {}), **({"new": b[k]} if k in b else {})} for k in keys]


def _layout(spec: CacheSpec) -> dict[str, Any]:
    return {**spec.layout, "experts": [list(shape) for shape in spec.maps]}


def diff(a: Cache, b: Cache, *, examples: int = 10) -> dict[str, Any]:
    """What changed from `a` to `b`: fingerprint ingredients, layout, and rows.

    Rows are matched by (split, statistics, source, view); a matched row is `changed` if its image's digest or its
    label differs. Each of added, removed and changed has a `count` and at most `examples` rows.
    """
    left, right = (
        cache.rows.select([*IDENTITY, "label", "digest"]).append_column(
            f"in_{side}", pa.array([True] * len(cache.rows))
        )
        for side, cache in (("a", a), ("b", b))
    )
    joined = left.join(right, IDENTITY, join_type="full outer", right_suffix="_b")
    here, there = pc.is_valid(joined["in_a"]), pc.is_valid(joined["in_b"])
    both = pc.and_(here, there)
    same = pc.and_(pc.equal(joined["digest"], joined["digest_b"]), pc.equal(joined["label"], joined["label_b"]))
    parts = {
        "added": pc.invert(here),
        "removed": pc.invert(there),
        "changed": pc.and_(both, pc.fill_null(pc.invert(same), False)),
    }
    rows: dict[str, Any] = {"old": len(a.rows), "new": len(b.rows)}
    for name, mask in parts.items():
        found = joined.filter(mask)
        first = found.sort_by([(key, "ascending") for key in IDENTITY]).slice(0, examples).select(IDENTITY)
        rows[name] = {"count": len(found), "rows": first.to_pylist()}
    return {
        "same_values": a.spec.fingerprint == b.spec.fingerprint,
        "fingerprint": _changes(
            {"inputs": a.spec.fingerprint_inputs, "dtype": a.spec.dtype},
            {"inputs": b.spec.fingerprint_inputs, "dtype": b.spec.dtype},
        ),
        "layout": _changes(_layout(a.spec), _layout(b.spec)),
        "provenance": _changes(a.spec.provenance, b.spec.provenance),
        "rows": rows,
    }
