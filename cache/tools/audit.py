"""Work on a whole cache in bounded memory: what it holds, and the range of its values.

`verify` and `pooled` have files of their own and are imported from here.
"""

import math
from typing import Any

import numpy as np

from h2t.cache.format.spec import FORMAT, RECORD, to_float32
from h2t.cache.reader import Cache
from h2t.cache.tools.pooled import pooled
from h2t.cache.tools.verify import Fault, verify

__all__ = ["Fault", "describe", "pooled", "stats", "verify"]

BLOCK_BYTES = 8 * 1024 * 1024  # of stored values read at a time; about six times as much memory is needed


def describe(cache: Cache) -> dict[str, Any]:
    """The content of `cache` as a JSON object; sizes in bytes. Reads only the commit record and the row table."""
    spec, index = cache.spec, cache.index
    return {
        "format": FORMAT,
        "fingerprint": spec.fingerprint,
        "fingerprint_inputs": dict(spec.fingerprint_inputs),
        "rows": spec.rows,
        "samples": len(np.unique(index.samples)),
        "classes": len(np.unique(index.labels)),
        "views": len(index.views),
        "experts": [{"shape": list(shape)} for shape in spec.maps],
        "dtype": spec.dtype,
        "codec": spec.codec,
        "chunk_rows": spec.chunk_rows,
        "shard_rows": spec.shard_rows,
        "shards": spec.shards * spec.experts,
        "files": len(cache.commit.files) + 1,
        "bytes": sum(size for size, _ in cache.commit.files.values()) + cache.files.size(RECORD),
        "value_bytes": spec.value_bytes,
        "splits": [{"split": p.split, "statistics": p.statistics, "rows": p.stop - p.start} for p in index.parts],
        "provenance": dict(spec.provenance),
    }


def stats(cache: Cache) -> list[dict[str, Any]]:
    """Statistics of the values of each expert, as one JSON object per expert.

    `sparsity` is the share of values that are 0; `values`, `nan` and `inf` are counts; `classes` lists the rows and the
    mean L2 norm of the maps of each class. `min`, `max`, `mean` and norms are over finite values; `min`, `max` and
    `mean` are None if there are none.
    """
    labels, spec = cache.rows["label"].to_numpy(), cache.spec
    table = []
    for expert, shape in enumerate(spec.maps):
        zeros = nan = finite_values = 0
        low, high, total = np.inf, -np.inf, 0.0
        norms = np.zeros(labels.max() + 1)
        step = max(1, BLOCK_BYTES // (spec.row_bytes(expert) * spec.chunk_rows)) * spec.chunk_rows
        for start in range(0, spec.rows, step):
            stored = cache.read(np.arange(start, min(start + step, spec.rows)), expert=expert)
            values = to_float32(stored, spec.dtype).reshape(len(stored), -1).astype(np.float64)
            finite = np.isfinite(values)
            zeros += int((values == 0).sum())
            nan += int(np.isnan(values).sum())
            finite_values += int(finite.sum())
            low = min(low, values.min(where=finite, initial=np.inf))
            high = max(high, values.max(where=finite, initial=-np.inf))
            values[~finite] = 0
            total += float(values.sum())
            norm = np.sqrt(np.einsum("ij,ij->i", values, values))
            norms += np.bincount(labels[start : start + step], norm, len(norms))
        count, rows = spec.rows * math.prod(shape), np.bincount(labels)
        table.append(
            {
                "expert": expert,
                "shape": list(shape),
                "values": count,
                "sparsity": zeros / count,
                "min": float(low) if finite_values else None,
                "max": float(high) if finite_values else None,
                "mean": total / finite_values if finite_values else None,
                "nan": nan,
                "inf": count - finite_values - nan,
                "classes": [
                    {"label": label, "rows": int(rows[label]), "mean_l2": float(norms[label] / rows[label])}
                    for label in np.flatnonzero(rows).tolist()
                ],
            }
        )
    return table
