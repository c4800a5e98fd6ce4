"""Work on a whole cache in bounded memory: what it holds, and the range of its values.

`verify` and `pooled` have files of their own and are imported from here.
"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from h2t.cache.format.spec import FORMAT, RECORD, to_float32
from h2t.cache.reader import Cache
from h2t.cache.tools.pooled import pooled
from h2t.cache.tools.verify import Fault, verify

__all__ = ["Fault", "describe", "pooled", "stats", "verify"]

WORKERS = min(4, os.cpu_count() or 1)
BLOCK_BYTES = 8 * 1024 * 1024  # of stored values; a worker needs about six times as much memory


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
