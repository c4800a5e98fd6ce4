"""Every row of a cache in order, from S3 on the loopback and from the disk, beside a plain loop of GETs.

    python -m benchmarks.bench_remote --data DIR                       # 2.1 GB of pooled rows of 8 KiB, three rounds
    python -m benchmarks.bench_remote --data DIR --rows 100000 --map 2048,7,7 --dtype float16 --rounds 1     # 20 GB

The endpoint is a process of its own that reads from the disk and answers 20 ms late. Each way is a process of its own,
one after the other in every round: `bare` are eight threads with `http.client`, a connection and a buffer each, that
fetch 4 MiB at a time and look at nothing; `s3` and `local` read windows of rows into one array by `Cache.read`, no
blocks kept. Seconds and processor seconds are of the reading; those of the process, which imports and opens, stand
beside them, and so do those of the endpoint, which shares the cores. What a client spends and what the endpoint spends
together decide the rate where all cores are busy.
"""

import argparse
import http.client
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.bench_scale import step
from benchmarks.delayed_s3 import separate
from benchmarks.measure import arguments, machine, save, table, timed
from benchmarks.synthetic import map_shape, write_synthetic
from h2t.cache.reader import open_cache

BARE, S3, LOCAL = WAYS = ("bare", "s3", "local")
DELAY = 0.02  # seconds before an answer
REQUEST_BYTES, THREADS = 4 * 2**20, 8  # as `Cache.read` has
WINDOW_BYTES = 512 * 2**20
ROWS, TINY_ROWS = 262_144, 2_000
NAME = "bench/remote"


def bare(root: Path) -> dict[str, float]:
    """Fetches every shard of the cache below `root` with GETs alone."""
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    files = sorted((root / NAME).glob("maps.zarr/*/c.*"), key=lambda file: int(file.name.split(".")[1]))
    spans = [
        (f"/{file.relative_to(root)}", start, min(start + REQUEST_BYTES, size))
        for file in files
        for size in [file.stat().st_size]
        for start in range(0, size, REQUEST_BYTES)
    ]
    rest = iter(spans)

    def fetch(_: int) -> int:
        connection, buffer, count = http.client.HTTPConnection(host), memoryview(bytearray(REQUEST_BYTES)), 0
        for path, start, stop in rest:
            connection.request("GET", path, headers={"Range": f"bytes={start}-{stop - 1}"})
            with connection.getresponse() as answer:
                at = 0
                while got := answer.readinto(buffer[at:]):
                    at += got
            assert at == stop - start
            count += at
        connection.close()
        return count

    with timed() as spent, ThreadPoolExecutor(THREADS) as pool:
        count = sum(pool.map(fetch, range(THREADS)))
    return {"seconds": spent["seconds"], "cpu_s": spent["cpu"], "bytes": count}


def read(location: str) -> dict[str, float]:
    """Reads every row of the cache at `location`, a window at a time, into an array that was used before."""
    with open_cache(location) as cache:
        rows, row_bytes = cache.spec.rows, cache.spec.row_bytes()
        window = min(rows, max(1, WINDOW_BYTES // row_bytes))
        out = np.empty((window, *cache.spec.maps[0]), cache.spec.stored_dtype)
        out.fill(0)
        with timed() as spent:
            for first in range(0, rows, window):
                last = min(first + window, rows)
                cache.read(np.arange(first, last), out=out[: last - first])
    return {"seconds": spent["seconds"], "cpu_s": spent["cpu"], "bytes": rows * row_bytes}


def run(way: str, root: Path) -> dict[str, float]:
    return bare(root) if way == BARE else read(f"s3://{NAME}" if way == S3 else str(root / NAME))


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_remote", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.set_defaults(rounds=3)
    parser.add_argument("--rows", type=int, help=f"{ROWS} by default")
    parser.add_argument("--map", default="2048,1,1", help="C,H,W of a map")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32", help="of the maps")
    parser.add_argument("--keep", action="store_true", help="leave the cache in DIR, or use the one that is there")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.way:
        print(json.dumps(run(options.way, options.data)))
        return
    about, cache, rows = machine(), options.data / NAME, options.rows or (TINY_ROWS if options.tiny else ROWS)
    if not cache.exists():
        write_synthetic(cache, rows, map_shape(options.map), dtype=options.dtype)
    elif not options.keep:
        parser.error(f"{cache}: is there already; remove it, or pass --keep to read it as it is")
    with open_cache(cache) as opened:
        spec = opened.spec
    turns: list[dict[str, Any]] = []
    with separate(options.data, DELAY) as (environment, spent):
        for turn in range(1 if options.tiny else options.rounds):
            for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
                before, command = spent(), ["benchmarks.bench_remote", "--data", str(options.data), "--way", way]
                whole, said = step(command, 0, {**environment, "H2T_BLOCK_CACHE_BYTES": "0"})
                found = json.loads(said)
                turns.append(
                    {
                        "way": way,
                        **found,
                        "gb_per_s": found["bytes"] / found["seconds"] / 1e9,
                        "process_s": whole["seconds"],
                        "process_cpu_s": whole["cpu_s"],
                        "peak_bytes": whole["peak_bytes"],
                        "endpoint_cpu_s": spent() - before,
                        "load": os.getloadavg()[0],
                    }
                )
                print(json.dumps(turns[-1]), flush=True)
    if not options.keep:
        shutil.rmtree(cache)
        with suppress(OSError):
            cache.parent.rmdir()
    of = {way: [turn for turn in turns if turn["way"] == way] for way in WAYS}
    ratios = {
        f"{way}_over_{peer}": [a["gb_per_s"] / b["gb_per_s"] for a, b in zip(of[way], of[peer], strict=True)]
        for way, peer in ((S3, BARE), (S3, LOCAL))
    }
    both = {way: median(turn["cpu_s"] + turn["endpoint_cpu_s"] for turn in of[way]) for way in (S3, BARE)}
    ratios["s3_over_bare_by_processor_time"] = [both[BARE] / both[S3]]
    shape = ",".join(map(str, spec.maps[0]))
    case = {"rows": spec.rows, "map": shape, "dtype": spec.dtype, "delay_s": DELAY, "threads": THREADS}
    body = {"benchmark": "remote", "tiny": options.tiny, "machine": about, "case": case, "turns": turns, **ratios}
    save(options.out, body)
    columns = ["seconds", "cpu_s", "gb_per_s", "process_s", "process_cpu_s", "endpoint_cpu_s", "load"]
    print(table(["way", *columns], [[way, *(f"{median(t[c] for t in of[way]):.2f}" for c in columns)] for way in WAYS]))
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
