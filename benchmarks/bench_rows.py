"""A cache of 10^8 rows with maps of 1x1x1: memory and time of all that reads its row table.

    python -m benchmarks.bench_rows --data DIR                      # 100,000,000 rows, 4.5 GB on disk
    python -m benchmarks.bench_rows --data DIR --rows 1000000

Each step is a process of its own: `index` opens the cache and builds the index of its rows; `draws` plans 64 steps of
receivers and donors and tests the law of the draws; `lines` reads the texts of 100 rows; `score` evaluates a linear
head on the test rows; `verify` checks every byte. Row table and shards are written here, from the format's
specification, because the writer of this project needs the whole table in memory. The peak is that of the process,
with all its imports.
"""

import argparse
import itertools
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr
from safetensors.numpy import save as safetensors
from zarr.storage import LocalStore

from benchmarks.bench_scale import step
from benchmarks.measure import arguments, machine, memory, save, table
from benchmarks.synthetic import class_counts
from h2t.cache.format.rows import SCHEMA
from h2t.cache.format.shard import join_plain
from h2t.cache.format.spec import CARD, MAPS, RECORD, ROWS, STATISTICS, CacheSpec
from h2t.cache.write.staging import file_sha256
from h2t.cache.write.writer import create_group

ROWS_WANTED, TINY_ROWS = 100_000_000, 30_000
MOST_BYTES = 2 * 10**9  # what every step may take at its peak
CLASSES, IMBALANCE, TEST_SHARE = 1000, 1000.0, 20
GROUP_ROWS = 2**20  # of a row group
CHUNK_ROWS, SHARD_ROWS = 2**15, 2**25
STEPS, BATCH = 64, 4096
NAMES = ("index", "draws", "lines", "score", "verify")


def runs(rows: int) -> list[tuple[str, int, int]]:
    """(split, label, rows) in cache order: a balanced test split and a long-tailed train split."""
    test = rows // TEST_SHARE
    of_test = np.bincount(np.arange(test) % CLASSES, minlength=CLASSES).tolist()
    of_train = class_counts(rows - test, CLASSES, IMBALANCE).tolist()
    splits = [("test", of_test), ("train", of_train)]
    return [(split, j, count) for split, counts in splits for j, count in enumerate(counts)]


def row_groups(rows: int) -> Iterator[pa.Table]:
    """The row table, a row group at a time: line i is sample i, with a random digest."""
    split, labels, counts = zip(*runs(rows), strict=True)
    ends = np.cumsum(counts)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    draws = np.random.default_rng(0)
    for start in range(0, rows, GROUP_ROWS):
        row = np.arange(start, min(start + GROUP_ROWS, rows))
        run = np.searchsorted(ends, row, side="right")
        numbers = pc.utf8_lpad(pa.array(row).cast(pa.string()), 10, "0")
        text = digits[draws.integers(16, size=(len(row), 64), dtype=np.uint8)]
        offsets = np.arange(0, 64 * len(row) + 1, 64, dtype=np.int32)
        columns = {
            "row": row,
            "sample": row,
            "view": np.zeros(len(row), np.int16),
            "statistics": pa.array(["stage1"]).take(pa.array(np.zeros(len(row), np.int8))),
            "split": pa.array(split).take(pa.array(run)),
            "label": np.array(labels, np.int32)[run],
            "source": pc.binary_join_element_wise("synthetic", numbers, "/"),
            "digest": pa.StringArray.from_buffers(len(row), pa.py_buffer(offsets), pa.py_buffer(text)),
        }
        yield pa.table({name: columns[name] for name in SCHEMA.names}, SCHEMA)


def write(out: Path, rows: int) -> None:
    """Writes the cache `out`, without the safety of `cache.write`."""
    spec = CacheSpec(
        rows=rows,
        maps=((1, 1, 1),),
        dtype="float16",
        codec="none",
        chunk_rows=CHUNK_ROWS,
        shard_rows=SHARD_ROWS,
        fingerprint_inputs={"synthetic": {"rows": rows}, "backbone": {"weights": "none"}},
        provenance={"classes": [f"class {j}" for j in range(CLASSES)]},
    )
    out.mkdir(parents=True)
    create_group(LocalStore(out / MAPS), spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(str(out / MAPS), zarr_format=3)
    for shard in range(spec.shards):
        size = len(spec.shard_range(shard))
        values = np.zeros(-(-size // CHUNK_ROWS) * CHUNK_ROWS, np.float16)
        values[:size] = np.random.default_rng(shard).random(size, np.float32)
        chunks = values.reshape(-1, CHUNK_ROWS).view(np.uint8)
        path = out / spec.shard_file(0, shard)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(join_plain(chunks, spec.chunks_per_shard))
    with pq.ParquetWriter(out / ROWS, SCHEMA, compression="zstd") as file:
        for group in row_groups(rows):
            file.write_table(group)
    (out / STATISTICS).write_bytes(safetensors({"stage1/running_mean": np.zeros(1, np.float32)}))
    (out / CARD).write_text("# Synthetic cache\n", encoding="utf-8")
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    files = {name: ((out / name).stat().st_size, file_sha256(out / name)) for name in names}
    (out / RECORD).write_bytes(spec.record(files))


def index(cache: Any) -> dict[str, Any]:
    found = cache.index
    return {"parts": len(found.parts), "class_runs": len(found.labels), "index_bytes": found.samples.nbytes}


def draws(cache: Any) -> dict[str, Any]:
    """A window of class-balanced receivers and instance-wise donors; p-values of chi-square tests of their laws."""
    from scipy.stats import chisquare

    from h2t.pipeline.heads.batches import Streams

    names = cache.spec.provenance["classes"]
    streams = Streams(cache.index, names, "stage1", {"instance": "stage1"}, [0], BATCH)
    count = min(STEPS, streams.steps)
    started = time.perf_counter()
    batches = [streams.batch(0, at) for at in range(count)]
    seconds = time.perf_counter() - started
    receivers, labels = (np.concatenate([getattr(b, name)[0] for b in batches]) for name in ("receivers", "labels"))
    donors = np.concatenate([b.donors[0, 0] for b in batches])
    # Within a class, every tenth of its samples is drawn equally often.
    start, size = streams.index.starts[labels], streams.index.counts[labels]
    first = int(streams.receivers.first[0])
    tenth = ((receivers - first - start) * 10 // size)[size >= 10_000]
    label_of_donor = streams.receivers.labels_of(donors - first)
    return {
        "seconds_of_window": seconds,
        "draws": len(labels),
        "p_classes_are_equally_likely": chisquare(np.bincount(labels, minlength=len(names))).pvalue,
        "p_samples_of_a_class_are": chisquare(np.bincount(tenth, minlength=10)).pvalue if len(tenth) else None,
        "p_donors_follow_the_counts": chisquare(
            np.bincount(label_of_donor, minlength=len(names)), streams.index.counts / streams.samples * len(donors)
        ).pvalue,
        "donors_are_distinct": len(np.unique(donors)) == len(donors),
    }


def lines(cache: Any) -> dict[str, Any]:
    rows = np.linspace(0, cache.spec.rows - 1, 100).astype(np.int64)
    found = cache.lines(rows, ["source"])["source"].to_pylist()
    return {"right": found == [f"synthetic/{row:010d}" for row in rows]}


def score(cache: Any) -> dict[str, Any]:
    import torch

    from h2t.pipeline.evaluation.scoring import score_stage1
    from h2t.pipeline.networks.trained import StageOneHead

    weight = torch.randn(1, CLASSES, 1, generator=torch.Generator().manual_seed(0))
    head = StageOneHead({"weight": weight, "bias": torch.zeros(1, CLASSES)}, "linear", 1.0)
    said = score_stage1(cache, head, "test", torch.device("cpu"))
    return {"test_rows": len(said.labels), "top1": float((said.said[0].guesses == said.labels).mean())}


def run(name: str, path: Path) -> dict[str, Any]:
    """Step `name` on the cache at `path`: what it found."""
    if name == "verify":
        from h2t.cache.tools.verify import verify

        return {"faults": [str(fault) for fault in verify(path)]}
    from h2t.cache.reader import open_cache

    with open_cache(path) as cache:
        return {"index": index, "draws": draws, "lines": lines, "score": score}[name](cache)


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_rows", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int)
    parser.add_argument("--keep", action="store_true", help="leave the cache in DIR, or use the one that is there")
    parser.add_argument("--step", choices=NAMES, help=argparse.SUPPRESS)  # what the benchmark starts itself with
    options = parser.parse_args(given)
    rows = options.rows or (TINY_ROWS if options.tiny else ROWS_WANTED)
    path = options.data / f"rows-{rows}"
    if options.step:
        result = run(options.step, path)
        print(json.dumps({**result, "peak_bytes": memory("VmHWM")}))
        return
    about, started = machine(), time.perf_counter()
    if not (options.keep and (path / RECORD).exists()):
        shutil.rmtree(path, ignore_errors=True)
        write(path, rows)
    written = time.perf_counter() - started
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    results: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        print(f"{name} ...", flush=True)
        command = ["benchmarks.bench_rows", "--data", str(options.data), "--rows", str(rows), "--step", name]
        measured, said = step(command, size, {})
        results[name] = {k: measured[k] for k in ("seconds", "cpu_s")} | json.loads(said.splitlines()[-1])
    if not options.keep:
        shutil.rmtree(path)
    peak = max(found["peak_bytes"] for found in results.values())
    body = {
        "benchmark": "rows",
        "tiny": options.tiny,
        "machine": about,
        "case": {"rows": rows, "map": "1,1,1", "bytes": size, "seconds_to_write": written},
        "steps": results,
        "promises": {"peak_bytes": peak, "allowed_bytes": MOST_BYTES, "within_bound": peak <= MOST_BYTES},
    }
    save(options.out, body)
    print(f"{rows} rows of 1x1x1, {size / 1e9:.2f} GB on disk")
    measured_lines = [
        [name, f"{r['seconds']:.1f}", f"{r['cpu_s']:.1f}", f"{r['peak_bytes'] / 1e6:.0f}", found(r)]
        for name, r in results.items()
    ]
    print(table(["step", "s", "CPU s", "peak MB", "found"], measured_lines))
    if results["verify"]["faults"]:
        raise SystemExit(f"bench_rows: verify found {results['verify']['faults'][:3]}")
    if not options.tiny and peak > MOST_BYTES:
        raise SystemExit(f"bench_rows: {peak / 1e9:.2f} GB at the peak; at most {MOST_BYTES / 1e9:.0f} GB are allowed")


def found(result: dict[str, Any]) -> str:
    """What a step found, without its cost."""
    others = {k: v for k, v in result.items() if k not in ("seconds", "cpu_s", "peak_bytes")}
    return "; ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in itertools.islice(others.items(), 9)
    )


if __name__ == "__main__":
    main()
