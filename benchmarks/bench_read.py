"""Random reads from a cache: ours, the raw read of the same bytes, and peers, on the same data in one run.

    python -m benchmarks.bench_read --data DIR

README.md in this directory says what each figure means.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import tensorstore as ts
import zarr
from crc32c import crc32c

from benchmarks.measure import alternate, arguments, fastest, machine, ratio, save, table
from benchmarks.synthetic import write_synthetic
from h2t.cache.format.shard import CRC_BYTES
from h2t.cache.read.gather import compiled
from h2t.cache.read.plan import plan_rows, units
from h2t.cache.reader import THREADS, Cache, open_cache

ARRAY = "maps.zarr/expert_0"
RECEIVERS = DONORS = 128
SWEEP_ROUNDS = 3
IID_ROWS = 1024  # some ways of reading are tried on gathers of at most this many rows: they take minutes beyond
IID_DRAWS = 24  # a gather of new rows each time, as in training; else its bytes would stay in the processor's cache
Read = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Case:
    """One map shape: how many rows the cache holds, an i.i.d. gather asks for, and steps a window has."""

    shape: tuple[int, int, int]
    rows: int
    gather: int
    steps: int
    classes: int = 100

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))


CASES = (Case((64, 8, 8), rows=131_072, gather=512, steps=64), Case((2048, 7, 7), rows=5_376, gather=256, steps=64))
TINY = (Case((64, 8, 8), rows=96, gather=16, steps=1, classes=4),)


def window_rows(labels: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of `steps` batches, (steps * 256,): receivers class-balanced with replacement, donors from a permutation.

    `labels` are those of the train rows, in ascending order.
    """
    counts = np.bincount(labels)
    classes = rng.choice(np.flatnonzero(counts), (steps, RECEIVERS))
    receivers = np.searchsorted(labels, classes) + rng.integers(0, counts[classes])
    passes = -(-steps * DONORS // len(labels))
    donors = np.concatenate([rng.permutation(len(labels)) for _ in range(passes)])[: steps * DONORS]
    return np.concatenate([receivers, donors.reshape(steps, DONORS)], axis=1).reshape(-1)


def draw(cache: Cache, case: Case) -> dict[str, list[np.ndarray]]:
    """Gather name -> the rows of each call in turn."""
    rng = np.random.default_rng(2026)
    train = np.flatnonzero(cache.rows["split"].to_numpy(zero_copy_only=False) == "train")
    labels = cache.rows["label"].to_numpy()[train]
    return {
        "iid": [rng.choice(cache.spec.rows, case.gather, replace=False) for _ in range(IID_DRAWS)],
        "window": [train[window_rows(labels, case.steps, rng)]],
    }


# --- Raw: what the operating system gives for the same ranges ---


class Raw:
    """`preadv` of the runs that our reader makes, nothing else: no checksum, no scatter, no repeats."""

    def __init__(self, cache: Cache, rows: np.ndarray, memory: np.ndarray) -> None:
        shards, offsets, sizes = cache.chunk_ranges(plan_rows(rows, cache.spec.chunk_rows).chunks, 0)
        work = units(shards, offsets, sizes, max_gap=0)
        root = Path(str(cache.files))
        self.handles = {s: os.open(root / cache.spec.shard_file(0, s), os.O_RDONLY) for s in np.unique(shards).tolist()}
        runs = [(self.handles[unit.shard], run.start, run.stop) for unit in work for run in unit.runs]
        lengths = np.array([stop - start for _, start, stop in runs])
        places = np.cumsum(lengths) - lengths  # the bytes end in memory, as those of a gather must
        half = np.searchsorted(np.cumsum(lengths), lengths.sum() * np.arange(1, THREADS) / THREADS).tolist()
        self.parts = []
        for a, b in zip([0, *half], [*half, len(runs)], strict=True):
            spots = zip(runs[a:b], places[a:b].tolist(), lengths[a:b].tolist(), strict=True)
            self.parts.append([(h, start, memory.data[at : at + size]) for (h, start, _), at, size in spots])
        self.pool = ThreadPoolExecutor(THREADS)

    def one_thread(self) -> None:
        for part in self.parts:
            self._read(part)

    def all_threads(self) -> None:
        list(self.pool.map(self._read, self.parts))

    @staticmethod
    def _read(part: Sequence[tuple[int, int, memoryview]]) -> None:
        for handle, start, buffer in part:
            os.preadv(handle, [buffer], start)

    def close(self) -> None:
        self.pool.shutdown()
        for handle in self.handles.values():
            os.close(handle)


# --- Peers: every one under several settings, of which the fastest enters ---


def by_unique(read: Read, out: np.ndarray) -> Read:
    """Reads each row once, in file order, then repeats and reorders: what a careful user of a peer would write."""

    def call(rows: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(rows, return_inverse=True)
        return np.take(read(unique), inverse, axis=0, out=out, mode="clip")

    return call


def neighbours(rows: np.ndarray) -> list[tuple[int, int]]:
    """Ascending distinct rows as (first, last + 1) of each run."""
    cuts = np.flatnonzero(np.diff(rows) != 1)
    first, last = np.append(0, cuts + 1), np.append(cuts, len(rows) - 1)
    return list(zip(rows[first].tolist(), (rows[last] + 1).tolist(), strict=True))


def not_compiled(read: Read) -> Read:
    """Our read as it is where installing found no compiler."""

    def call(rows: np.ndarray) -> np.ndarray:
        with mock.patch("h2t.cache.reader.compiled", return_value=None):
            return read(rows)

    return call


def zarr_variants(path: Path, out: np.ndarray) -> dict[str, Read]:
    """i.i.d.: `oindex`, and one slice per row. Windows: one slice per run of neighbours, far ahead of `oindex`."""

    def under(
        settings: Mapping[str, Any], read: Callable[[Any, np.ndarray], np.ndarray]
    ) -> Callable[[np.ndarray], Any]:
        array = zarr.open_array(str(path), mode="r")

        def call(wanted: np.ndarray) -> np.ndarray:
            with zarr.config.set(settings):
                return read(array, wanted)

        return call

    def slices(array: Any, wanted: np.ndarray) -> np.ndarray:
        return np.concatenate([array[first:last] for first, last in neighbours(wanted)])

    tried = (1, 10, 64) if len(out) <= IID_ROWS else (10,)
    options = {f"concurrency {n}": {"async.concurrency": n} for n in tried}
    found: dict[str, Read] = {}
    for name, settings in options.items():
        if len(out) <= IID_ROWS:
            found[f"oindex, {name}"] = under(settings, lambda array, wanted: array.oindex[wanted])
        found[f"slices, {name}"] = by_unique(under(settings, slices), out)
    return found


def tensorstore_variants(path: Path, out: np.ndarray) -> dict[str, Read]:
    found: dict[str, Read] = {}
    for io, copy in ((1, 1), (THREADS, THREADS), (32, THREADS)):
        context = ts.Context({"file_io_concurrency": {"limit": io}, "data_copy_concurrency": {"limit": copy}})
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        array = ts.open(spec, context=context, read=True).result()

        def gather(wanted: np.ndarray, array: Any = array) -> np.ndarray:
            return np.asarray(array[wanted].read().result())

        def slices(wanted: np.ndarray, array: Any = array) -> np.ndarray:
            futures = [array[first:last].read() for first, last in neighbours(wanted)]
            return np.concatenate([future.result() for future in futures])

        name = f"io {io}, copy {copy}"
        if len(out) <= IID_ROWS:
            found[f"gather, as asked, {name}"] = gather
        found[f"gather, sorted, {name}"] = by_unique(gather, out)
        found[f"async slices, {name}"] = by_unique(slices, out)
    return found


def h5py_variants(path: Path, out: np.ndarray) -> dict[str, Read]:
    """Sorted unique rows: h5py takes nothing else."""
    data = h5py.File(path, "r")["maps"]

    def one_by_one(wanted: np.ndarray) -> np.ndarray:
        found = np.empty((len(wanted), *data.shape[1:]), data.dtype)
        for i, row in enumerate(wanted.tolist()):
            data.read_direct(found, np.s_[row], np.s_[i])
        return found

    found = {"row by row": by_unique(one_by_one, out)}
    if len(out) <= IID_ROWS:
        found["list of rows"] = by_unique(lambda wanted: data[wanted], out)
    return found


def memmap_variants(path: Path, out: np.ndarray) -> dict[str, Read]:
    array = np.load(path, mmap_mode="r")
    return {
        "fancy index": lambda rows: array[rows],
        "take into place": lambda rows: np.take(array, rows, axis=0, out=out, mode="clip"),
    }


def copies(cache: Cache, data: Path, name: str) -> tuple[Path, Path]:
    """The same values for h5py, contiguous, and as .npy."""
    hdf, npy = data / f"{name}.h5", data / f"{name}.npy"
    if hdf.exists() and npy.exists():
        return hdf, npy
    shape, dtype = (cache.spec.rows, *cache.spec.maps[0]), cache.spec.stored_dtype
    plain = np.lib.format.open_memmap(npy, "w+", dtype, shape)
    with h5py.File(hdf, "w") as file:
        whole = file.create_dataset("maps", shape, dtype)
        for shard in range(cache.spec.shards):
            span = cache.spec.shard_range(shard)
            plain[span.start : span.stop] = whole[span.start : span.stop] = cache.read(np.arange(span.start, span.stop))
    plain.flush()
    return hdf, npy


# --- Measurements ---


def bench_gather(
    cache: Cache, case: Case, gather: str, draws: Sequence[np.ndarray], files: tuple[Path, Path], rounds: int
) -> dict[str, Any]:
    """All contestants on one gather."""
    root = Path(str(cache.files))
    rows = draws[0]
    out = np.zeros((len(rows), *case.shape), cache.spec.stored_dtype)
    expected = crc32c(cache.read(rows, out=out))
    warm = touch(root, *files)

    def in_turn(read: Callable[[np.ndarray], object]) -> Callable[[], object]:
        turns = cycle(draws)
        return lambda: read(next(turns))

    def raw_in_turn(way: Callable[[Raw], None]) -> Callable[[], object]:
        turns = cycle(raws)
        return lambda: way(next(turns))

    # One piece of memory for all, touched beforehand: a page's first use would count as reading.
    distinct = max(len(np.unique(wanted)) for wanted in draws)
    memory = np.full(distinct * (cache.spec.row_bytes() + CRC_BYTES), 1, np.uint8)
    raws = [Raw(cache, wanted, memory) for wanted in draws]
    warm()
    chosen: dict[str, Callable[[], object]] = {"ours": in_turn(lambda wanted: cache.read(wanted, out=out))}
    settings: dict[str, str] = {"ours": "out given"}
    if compiled():
        chosen["ours, not compiled"] = in_turn(not_compiled(lambda wanted: cache.read(wanted, out=out)))
    peers: dict[str, dict[str, Callable[[], object]]] = {
        "raw": {"1 thread": raw_in_turn(Raw.one_thread), f"{THREADS} threads": raw_in_turn(Raw.all_threads)}
    }
    made: dict[str, dict[str, Read]] = {
        "TensorStore": tensorstore_variants(root / ARRAY, out),
        "zarr-python": zarr_variants(root / ARRAY, out),
        "h5py": h5py_variants(files[0], out),
        "NumPy memmap": memmap_variants(files[1], out),
    }
    for peer, variants in made.items():
        for variant, read in variants.items():
            out[:] = 0
            if crc32c(np.ascontiguousarray(read(rows))) != expected:
                raise SystemExit(f"{peer}, {variant}: gives other values than ours")
            # Ways of reading are contestants of their own; settings of one way compete in a sweep.
            way = variant.split(",")[0]
            name = peer if peer in ("h5py", "NumPy memmap") else f"{peer} {way}"
            peers.setdefault(name, {})[variant] = in_turn(read)
    few = 1 if gather == "window" else min(rounds, SWEEP_ROUNDS)
    for peer, candidates in peers.items():
        best = fastest(candidates, few)
        chosen[peer], settings[peer] = candidates[best], best
    timings = alternate(chosen, rounds, settings=settings, before_round=warm)
    for raw in raws:
        raw.close()

    plan = plan_rows(rows, cache.spec.chunk_rows)
    row_bytes, distinct = cache.spec.row_bytes(), len(plan.chunks)
    wanted_bytes = len(rows) * row_bytes
    # Raw brings each distinct row once; only those bytes count as its useful ones.
    share = distinct / len(rows)
    raw_ratio = ratio(timings["raw"], timings["ours"])
    return {
        "case": case.name,
        "gather": gather,
        "rows": len(rows),
        "distinct_rows": distinct,
        "useful_bytes": wanted_bytes,
        "contestants": {
            name: {
                **timing.json(),
                "useful_gb_per_s": wanted_bytes * (share if name == "raw" else 1) / timing.median / 1e9,
            }
            for name, timing in timings.items()
        },
        "useful_bytes_vs_raw": {key: value / share for key, value in raw_ratio.items()},
        "time_vs_raw": raw_ratio,
        "ours_times_faster_than": {n: ratio(t, timings["ours"]) for n, t in timings.items() if n != "ours"},
    }


def touch(*roots: Path) -> Callable[[], None]:
    """Reads these files whole, to have them in the page cache: some systems evict pages long before memory ends."""
    paths = [p for root in roots for p in ([root] if root.is_file() else root.rglob("*")) if p.is_file()]
    buffer = memoryview(bytearray(4 * 1024 * 1024))

    def read() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return read


def show(result: Mapping[str, Any]) -> None:
    print(
        f"\n{result['case']}, {result['gather']}: {result['rows']} rows ({result['distinct_rows']} distinct), "
        f"{result['useful_bytes'] / 1e6:.1f} MB"
    )
    ours = result["contestants"]["ours"]["median_s"]
    lines = [
        (
            name,
            f"{t['median_s'] * 1e3:.2f}",
            f"{t['p10_s'] * 1e3:.2f} to {t['p90_s'] * 1e3:.2f}",
            f"{t['cpu_s'] * 1e3:.2f}",
            f"{t['useful_gb_per_s']:.3f}",
            f"{t['median_s'] / ours:.2f}",
            t.get("setting", ""),
        )
        for name, t in sorted(result["contestants"].items(), key=lambda item: item[1]["median_s"])
    ]
    print(table(("contestant", "ms", "10 to 90 %", "CPU ms", "useful GB/s", "time / ours", "setting"), lines))
    for key in ("useful_bytes_vs_raw", "time_vs_raw"):
        r = result[key]
        print(f"{key}: {r['median']:.2f} ({r['p10']:.2f} to {r['p90']:.2f}); in CPU time {r['cpu']:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("bench_read", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--case", choices=[c.name for c in CASES], help="only this map shape")
    options = parser.parse_args(argv)
    rounds = 2 if options.tiny else options.rounds
    results: list[dict[str, Any]] = []
    about = machine()

    def add(result: dict[str, Any]) -> None:
        """Shows and saves at once: a long run that is stopped leaves what it has."""
        show(result)
        results.append(result)
        save(
            options.out,
            {
                "benchmark": "read",
                "machine": about,
                "load_after": os.getloadavg()[0],
                "rounds": rounds,
                "threads": THREADS,
                "tiny": options.tiny,
                "results": results,
            },
        )

    options.data.mkdir(parents=True, exist_ok=True)
    for case in TINY if options.tiny else [c for c in CASES if options.case in (None, c.name)]:
        path = options.data / case.name
        if not path.exists():
            write_synthetic(path, case.rows, case.shape, classes=case.classes)
        with open_cache(path) as cache:
            files = copies(cache, options.data, case.name)
            for gather, draws in draw(cache, case).items():
                add(bench_gather(cache, case, gather, draws, files, rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
