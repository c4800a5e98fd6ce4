"""Writing shards: our writer, zarr-python, and a plain write of the same bytes, from the same arrays in one run.

    python -m benchmarks.bench_write --data DIR

README.md in this directory says what each figure means.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from benchmarks.measure import alternate, arguments, fastest, machine, ratio, save, table
from benchmarks.synthetic import SHARD_BYTES, relu_maps, row_table
from h2t.cache.format.codecs import zarr_codecs
from h2t.cache.format.spec import CacheSpec, chunk_rows_for, sha256, shard_rows_for
from h2t.cache.reader import THREADS
from h2t.cache.write.staging import Staging, write_durably
from h2t.cache.write.writer import CacheWriter


@dataclass(frozen=True, slots=True)
class Case:
    """One map shape and how many shards of it are written."""

    shape: tuple[int, int, int]
    shards: int = 4
    shard_bytes: int = SHARD_BYTES

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))


CASES = (Case((64, 8, 8)), Case((2048, 7, 7)))
TINY = (Case((64, 8, 8), 2, 128 * 1024), Case((256, 7, 7), 2, 128 * 1024))


class Writers:
    """The contestants. Each call writes all shards anew, into a directory of its own, and removes it afterwards."""

    def __init__(self, root: Path, case: Case, codec: str) -> None:
        row_bytes = int(np.prod(case.shape)) * 2
        chunk_rows = chunk_rows_for(row_bytes)
        shard_rows = shard_rows_for(row_bytes, chunk_rows, case.shard_bytes)
        self.root = root
        self.spec = CacheSpec(
            rows=shard_rows * case.shards,
            maps=(case.shape,),
            dtype="float16",
            codec=codec,
            chunk_rows=chunk_rows,
            shard_rows=shard_rows,
            fingerprint_inputs={},
        )
        self.maps = [relu_maps((shard_rows, *case.shape), "float16", (0, s)) for s in range(case.shards)]
        self.rows: pa.Table = row_table(self.spec.rows, 4, 1.0)
        with Staging(root / "encode") as staging:
            writer = CacheWriter(staging, self.spec, self.rows, {})
            self.encode: Callable[[int], bytes | bytearray] = lambda s: writer._encode(s, 0, self.maps[s])
        self.encoded = [self.encode(s) for s in range(case.shards)]
        self.bytes = sum(map(len, self.encoded))

    def ours(self, threads: int) -> None:
        """Encode, sha256, write, fsync, journal: all that a shard costs, without the commit."""
        with Staging(self.root / "ours") as staging:
            writer = CacheWriter(staging, self.spec, self.rows, {})
            if threads == 1:
                for shard in writer.pending:
                    writer.write(shard, [self.maps[shard]])
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(lambda shard: writer.write(shard, [self.maps[shard]]), writer.pending))
        shutil.rmtree(staging.root)

    def zarr(self, concurrency: int, *, durable: bool) -> None:
        """The same array in the same layout; durable: every file is synced afterwards, as ours is."""
        path = self.root / "zarr"
        spec = self.spec
        with zarr.config.set({"async.concurrency": concurrency}):
            array = zarr.create_array(
                str(path),
                shape=(spec.rows, *spec.maps[0]),
                dtype=spec.stored_dtype,
                chunks=(spec.chunk_rows, *spec.maps[0]),
                shards={"shape": (spec.shard_rows, *spec.maps[0]), "index_location": "start"},
                fill_value=0,
                config={"write_empty_chunks": True},
                **zarr_codecs(spec.codec, 2),
            )
            for shard, maps in enumerate(self.maps):
                span = spec.shard_range(shard)
                array[span.start : span.stop] = maps
        if durable:
            for file in [p for p in path.rglob("*") if p.is_file()]:
                handle = os.open(file, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        shutil.rmtree(path)

    def raw(self, *, durable: bool) -> None:
        """The finished shards as they are, one write each."""
        path = self.root / "raw"
        path.mkdir()
        for shard, data in enumerate(self.encoded):
            with (path / str(shard)).open("wb", buffering=0) as file:
                file.write(data)
                if durable:
                    os.fsync(file.fileno())
        shutil.rmtree(path)

    def durably(self) -> None:
        path = self.root / "durably"
        path.mkdir()
        for shard, data in enumerate(self.encoded):
            write_durably(path / str(shard), data)
        shutil.rmtree(path)


def bench(root: Path, case: Case, codec: str, rounds: int) -> dict[str, Any]:
    writers = Writers(root, case, codec)
    sweeps: dict[str, dict[str, float]] = {}
    settings: dict[str, str] = {}
    contestants: dict[str, Callable[[], object]] = {}
    variants: dict[str, dict[str, Callable[[], object]]] = {
        "ours": {f"{n} threads": lambda n=n: writers.ours(n) for n in sorted({1, THREADS})},  # type: ignore[misc]
        "zarr-python": {
            f"concurrency {n}": lambda n=n: writers.zarr(n, durable=False)  # type: ignore[misc]
            for n in (1, 10, 64)
        },
        "zarr-python, fsync": {"as above": lambda: writers.zarr(10, durable=True)},
        "raw, fsync": {"1 thread": lambda: writers.raw(durable=True)},
        "raw": {"1 thread": lambda: writers.raw(durable=False)},
    }
    for name, candidates in variants.items():
        best, sweeps[name] = fastest(candidates, min(rounds, 2))
        contestants[name], settings[name] = candidates[best], best
    zarr_setting = int(settings["zarr-python"].split()[-1])
    contestants["zarr-python, fsync"] = lambda: writers.zarr(zarr_setting, durable=True)
    settings["zarr-python, fsync"] = settings["zarr-python"]
    timings = alternate(contestants, rounds, settings=settings)
    spent = alternate(
        {
            "encoding": lambda: [writers.encode(s) for s in range(case.shards)],
            "sha256": lambda: [sha256(data) for data in writers.encoded],
            "write, fsync and rename": writers.durably,
        },
        rounds,
    )
    values = writers.spec.value_bytes
    return {
        "case": case.name,
        "codec": codec,
        "rows": writers.spec.rows,
        "value_bytes": values,
        "stored_bytes": writers.bytes,
        "contestants": {n: {**t.json(), "gb_per_s": values / t.median / 1e9} for n, t in timings.items()},
        "ours_times_faster_than": {n: ratio(t, timings["ours"]) for n, t in timings.items() if n != "ours"},
        "spent": {name: timing.median for name, timing in spent.items()},
        "sweeps_median_s": {name: sweep for name, sweep in sweeps.items() if sweep},
    }


def show(result: Mapping[str, Any]) -> None:
    print(
        f"\n{result['case']}, {result['codec']}: {result['rows']} rows, {result['value_bytes'] / 1e6:.1f} MB of values"
    )
    ours = result["contestants"]["ours"]["median_s"]
    lines = [
        (
            name,
            f"{t['median_s'] * 1e3:.1f}",
            f"{t['p10_s'] * 1e3:.1f} to {t['p90_s'] * 1e3:.1f}",
            f"{t['cpu_s'] * 1e3:.1f}",
            f"{t['gb_per_s']:.3f}",
            f"{t['median_s'] / ours:.2f}",
            t.get("setting", ""),
        )
        for name, t in sorted(result["contestants"].items(), key=lambda item: item[1]["median_s"])
    ]
    print(table(("contestant", "ms", "10 to 90 %", "CPU ms", "GB/s", "time / ours", "setting"), lines))
    print("of ours, measured alone: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in result["spent"].items()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("bench_write", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--codec", default="none")
    options = parser.parse_args(argv)
    rounds = 2 if options.tiny else options.rounds
    options.data.mkdir(parents=True, exist_ok=True)
    results = []
    about = machine()
    for case in TINY if options.tiny else CASES:
        scratch = options.data / f"write-{case.name}"
        scratch.mkdir()
        try:
            results.append(bench(scratch, case, options.codec, rounds))
        finally:
            shutil.rmtree(scratch)
        show(results[-1])
    save(
        options.out,
        {
            "benchmark": "write",
            "load_after": os.getloadavg()[0],
            "machine": about,
            "rounds": rounds,
            "tiny": options.tiny,
            "results": results,
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
