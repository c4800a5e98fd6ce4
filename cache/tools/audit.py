"""Work on a whole cache in bounded memory: what it holds, and the range of its values."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import FORMAT, RECORD, to_float32
from h2t.cache.reader import Cache
from h2t.cache.tools.verify import WHOLE
from h2t.cache.write.parts import Part

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
    return merged_stats([partial_stats(cache)])


def partial_stats(cache: Cache, part: Part = WHOLE) -> dict[str, Any]:
    """What `stats` needs to know of the shards of `part`, as a JSON object for `merged_stats`."""
    spec, shards = cache.spec, part.shards(cache.spec)
    rows = range(shards.start * spec.shard_rows, min(shards.stop * spec.shard_rows, spec.rows))
    found = [_sums(cache, expert, rows) for expert in range(spec.experts)]
    return {"fingerprint": spec.fingerprint, "part": [part.number, part.of], "experts": found}


def merged_stats(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The result of `stats` from what `partial_stats` found for each part, in any order.

    Sums depend on how many parts there are, in their last digits. Raises CacheError `mismatch` unless these are all
    parts of one cache, each once.
    """
    try:
        ordered = sorted(parts, key=lambda part: part["part"])
        caches = {(part["fingerprint"], part["part"][1]) for part in ordered}
        numbers = [part["part"][0] for part in ordered]
        if len(caches) != 1 or numbers != list(range(1, ordered[0]["part"][1] + 1)):
            listed = ", ".join("{}/{}".format(*part["part"]) for part in ordered)
            raise CacheError("mismatch", f"parts must be all parts of one cache, each once; got {listed or 'none'}")
        return [
            _described(expert, each) for expert, each in enumerate(zip(*(p["experts"] for p in ordered), strict=True))
        ]
    except (KeyError, TypeError, ValueError, IndexError):
        raise CacheError("mismatch", "parts must be what h2t cache stats --part K/N printed; they are not") from None


def _sums(cache: Cache, expert: int, rows: range) -> dict[str, Any]:
    """Counts, sums and extremes of the values of `rows`; of each class its rows and the sum of its norms."""
    index, spec = cache.index, cache.spec
    zeros = nan = finite_values = 0
    low, high, total = np.inf, -np.inf, 0.0
    norms: Counter[int] = Counter()
    counts: Counter[int] = Counter()
    step = max(1, BLOCK_BYTES // (spec.row_bytes(expert) * spec.chunk_rows)) * spec.chunk_rows
    for start in range(rows.start, rows.stop, step):
        numbers = np.arange(start, min(start + step, rows.stop))
        stored = cache.read(numbers, expert=expert)
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
        labels, places = np.unique(index.labels_of(numbers), return_inverse=True)
        counts.update(dict(zip(labels.tolist(), np.bincount(places).tolist(), strict=True)))
        norms.update(dict(zip(labels.tolist(), np.bincount(places, norm).tolist(), strict=True)))
    return {
        "shape": list(spec.maps[expert]),
        "values": len(rows) * math.prod(spec.maps[expert]),
        "zeros": zeros,
        "nan": nan,
        "finite": finite_values,
        "min": float(low) if finite_values else None,
        "max": float(high) if finite_values else None,
        "total": total,
        "classes": [[label, counts[label], norms[label]] for label in sorted(counts)],
    }


def _described(expert: int, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count, zeros, nan, finite, total = (
        sum(part[name] for part in parts) for name in ("values", "zeros", "nan", "finite", "total")
    )
    rows: Counter[int] = Counter()
    norms: Counter[int] = Counter()
    for label, of_class, norm in (line for part in parts for line in part["classes"]):
        rows[label] += of_class
        norms[label] += norm
    return {
        "expert": expert,
        "shape": parts[0]["shape"],
        "values": count,
        "sparsity": zeros / count,
        "min": min((part["min"] for part in parts if part["finite"]), default=None),
        "max": max((part["max"] for part in parts if part["finite"]), default=None),
        "mean": total / finite if finite else None,
        "nan": nan,
        "inf": count - finite - nan,
        "classes": [
            {"label": label, "rows": rows[label], "mean_l2": norms[label] / rows[label]} for label in sorted(rows)
        ],
    }
