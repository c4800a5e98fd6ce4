"""Which codec and which chunk size, measured on the maps of a cache itself."""

import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numcodecs.blosc
import numpy as np

from h2t.cache.format import shard as shard_layout
from h2t.cache.format.codecs import CODECS, PYTHON_ONLY, Codec, codec
from h2t.cache.format.spec import chunk_rows_for
from h2t.cache.read.plan import MAX_GAP_BYTES
from h2t.cache.reader import Cache

SAMPLE_BYTES = 16 * 1024 * 1024
TRIES = 3  # of which the fastest counts
GOOD_ENOUGH = 0.9  # of the best rate; among those, the fewest bytes win


def advise(
    cache: Cache,
    *,
    disk_gbps: float = 2.0,
    link_gbps: float = 0.125,
    cores: int | None = None,
    sample_bytes: int = SAMPLE_BYTES,
) -> list[dict[str, Any]]:
    """Every codec at several rows per chunk, best first, one of them `recommended` with its `reason`.

    `disk_gbps` and `link_gbps` are GB/s (10^9 bytes) that the disk below training and the link to colleagues give;
    `cores` decode side by side (by default all). Measured, on evenly spaced runs of rows of the largest expert:
    `ratio` (values to stored bytes), `encode_gbps` and `decode_gbps` (values per second and core, checksum included).
    Derived: `scan_gbps` (all rows in order), `row_gbps` (single rows at random, in wanted values: a row costs its
    whole chunk and a seek worth 16 KiB), `pull_seconds` (the whole cache over the link).
    """
    spec = cache.spec
    cores = cores or os.cpu_count() or 1
    expert = max(range(cache.experts), key=spec.row_bytes)
    row_bytes = spec.row_bytes(expert)
    base = chunk_rows_for(row_bytes)
    sizes = sorted({min(n, spec.rows) for n in (1, base, 4 * base, spec.chunk_rows)})
    sample = _sample(cache, expert, sizes[-1], sample_bytes)
    table: list[dict[str, Any]] = []
    for name in CODECS:
        for chunk_rows in sizes:
            ratio, encode_gbps, decode_gbps = _measure(codec(name), sample, chunk_rows)
            stored = chunk_rows * row_bytes / ratio
            scan = min(disk_gbps * ratio, decode_gbps * cores)
            seconds = max((stored + MAX_GAP_BYTES) / disk_gbps, chunk_rows * row_bytes / (decode_gbps * cores))
            table.append(
                {
                    "codec": name,
                    "chunk_rows": chunk_rows,
                    "chunk_bytes": chunk_rows * row_bytes,
                    "ratio": ratio,
                    "encode_gbps": encode_gbps,
                    "decode_gbps": decode_gbps,
                    "scan_gbps": scan,
                    "row_gbps": row_bytes / seconds,
                    "pull_seconds": spec.value_bytes / ratio / (link_gbps * 1e9),
                    "read_by": "python" if name in PYTHON_ONLY else "all",
                    "recommended": False,
                    "reason": "",
                }
            )
    table.sort(key=lambda line: -line["row_gbps"])
    _recommend(table, disk_gbps)
    return table


def _recommend(table: Sequence[dict[str, Any]], disk_gbps: float) -> None:
    open_to_all = [line for line in table if line["read_by"] == "all"]
    best = open_to_all[0]
    near = [line for line in open_to_all if line["row_gbps"] >= GOOD_ENOUGH * best["row_gbps"]]
    chosen = min(near, key=lambda line: -line["ratio"])
    limit = "the disk" if disk_gbps * chosen["ratio"] <= chosen["scan_gbps"] else "decoding"
    chosen["recommended"] = True
    chosen["reason"] = (
        f"random rows at {chosen['row_gbps']:.2f} GB/s, at least {GOOD_ENOUGH:.0%} of the fastest codec that every "
        f"Zarr reader knows ({best['codec']}, {best['chunk_rows']} rows per chunk, {best['row_gbps']:.2f} GB/s), and "
        f"of those the fewest bytes (ratio {chosen['ratio']:.2f}); {limit} is the limit of a scan"
    )


def _sample(cache: Cache, expert: int, run: int, sample_bytes: int) -> np.ndarray:
    """Runs of `run` neighbouring rows, evenly spaced over the cache, about `sample_bytes` in all."""
    rows = cache.spec.rows
    if rows * cache.spec.row_bytes(expert) <= sample_bytes:
        return cache.read(np.arange(rows), expert=expert)
    count = max(1, min(rows // run, sample_bytes // (run * cache.spec.row_bytes(expert))))
    starts = np.linspace(0, rows - run, count).astype(np.int64)
    return cache.read((starts[:, None] + np.arange(run)).reshape(-1), expert=expert)


def _measure(how: Codec, sample: np.ndarray, chunk_rows: int) -> tuple[float, float, float]:
    """Ratio, and GB/s of encoding and of decoding on one core, of `sample` cut into chunks of `chunk_rows`."""
    parts = [sample[i : i + chunk_rows] for i in range(0, len(sample), chunk_rows)]
    out = np.empty_like(sample)
    outs = [out[i : i + chunk_rows] for i in range(0, len(sample), chunk_rows)]
    before, numcodecs.blosc.use_threads = numcodecs.blosc.use_threads, False  # rates are per core
    try:
        stored: list[bytes] = [shard_layout.sealed(how.encode(part)) for part in parts]

        def decode() -> None:
            for data, into in zip(stored, outs, strict=True):
                view = memoryview(data)
                shard_layout.holds(view)
                how.decode(view[: -shard_layout.CRC_BYTES], into)

        encode_seconds = _fastest(lambda: [shard_layout.sealed(how.encode(part)) for part in parts])
        decode_seconds = _fastest(decode)
    finally:
        numcodecs.blosc.use_threads = before
    gigabytes = sample.nbytes / 1e9
    return sample.nbytes / sum(map(len, stored)), gigabytes / encode_seconds, gigabytes / decode_seconds


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few tries."""
    seconds = []
    for _ in range(TRIES):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return max(min(seconds), 1e-9)
