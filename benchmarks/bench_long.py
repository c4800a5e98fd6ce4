"""Long runs and many files: 1,000 epochs of streaming stage II, and opening a cache of 10,000 shards.

    python -m benchmarks.bench_long --data DIR

The first trains two heads on whole maps, ten times the budget of memory, and notes resident memory, open files and
threads as it goes: none of them may grow. The second times `h2t cache info` and `open_cache`. README.md has the bounds.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.epoch_run import memory, quiet
from benchmarks.measure import arguments, machine, save, table
from benchmarks.synthetic import write_synthetic
from h2t.cache.reader import open_cache
from h2t.pipeline.heads import residency
from h2t.pipeline.heads.residency import Feed, Step
from h2t.pipeline.stages import train_classifier

ROOT = Path(__file__).parents[1]
ROWS, TINY_ROWS = 1024, 256
SHAPE, TINY_SHAPE = (64, 8, 8), (16, 4, 4)
EPOCHS, TINY_EPOCHS = 1000, 20
BATCH, TINY_BATCH = 64, 16
SAMPLES = 100
CLASSES = 20
SHARDS, TINY_SHARDS = 10_000, 50
#: What memory may seem to grow by: an allocator's noise, and a quarter of one batch of vectors kept each epoch.
SLOPE_BYTES, GROWTH_BYTES = 4 * 1024, 8 * 2**20
OPENING_SECONDS = 1.0


@dataclass(frozen=True)
class Sample:
    """What the process holds before `epoch`."""

    epoch: int
    seconds: float
    resident_bytes: int
    files: int
    threads: int


class Watched(Feed):
    """A feed that notes what the process holds every few epochs."""

    samples: list[Sample]

    def steps(self, epochs: int, first_epoch: int = 0, first_step: int = 0) -> Generator[Step]:
        started, every, noted = time.perf_counter(), max(1, epochs // SAMPLES), -1
        for at in super().steps(epochs, first_epoch, first_step):
            if at.epoch > noted and at.epoch % every == 0:
                noted = at.epoch
                self.samples.append(
                    Sample(
                        at.epoch,
                        round(time.perf_counter() - started, 3),
                        memory("VmRSS"),
                        len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - once per sample
                        len(os.listdir("/proc/self/task")),  # noqa: PTH208
                    )
                )
            yield at


def long_run(folder: Path, epochs: int, tiny: bool) -> dict[str, Any]:
    """Stage II as `h2t train_classifier` runs it, streaming under a tenth of the cache."""
    rows, shape = (TINY_ROWS, TINY_SHAPE) if tiny else (ROWS, SHAPE)
    maps = folder / "long"
    shutil.rmtree(maps, ignore_errors=True)
    size = rows * int(np.prod(shape)) * 2
    write_synthetic(maps, rows, shape, classes=CLASSES, shard_bytes=size // 8)
    # Tiny: room for a hot set. Else none, so that every row is read again and again.
    budget = size // (2 if tiny else 10)
    host = train_classifier.Params.model_validate(
        {
            "host": "crt",  # the one that needs no classifier of stage I
            "backbone": "none",
            "batchnorm": "stage1",
            "optimiser": {"epochs": epochs, "batch_size": TINY_BATCH if tiny else BATCH},
            "grid": {"ratio": [0.0, 0.3], "seed": [0]},
        }
    )
    settings = residency.Residency(memory_bytes=budget, pooled=False)
    Watched.samples = []
    residency.Feed = Watched  # type: ignore[misc]
    try:
        with open_cache(maps) as cache:
            cache.read(np.arange(rows))  # starts the threads of the reader, which wait for their first large gather
            out = folder / "heads"
            summary = train_classifier.run(host, settings, "long", cache, Path("none"), torch.device("cpu"), out, quiet)
    finally:
        residency.Feed = Feed  # type: ignore[misc]
    shutil.rmtree(folder / "heads")
    shutil.rmtree(maps)
    return {
        "case": f"{rows} rows of {'x'.join(map(str, shape))} float16, {size} bytes; budget {budget} bytes",
        "epochs": epochs,
        "steps": summary.steps,
        "residency": summary.residency,
        "hit_rate": summary.hit_rate,
        "expected_hit_rate": summary.expected_hit_rate,
        "bytes_read": summary.bytes_read,
        "samples": [asdict(s) for s in Watched.samples],
        **judged(Watched.samples),
    }


def judged(samples: Sequence[Sample]) -> dict[str, Any]:
    """Growth after a warm-up of a tenth of the samples, and whether it stays below the bounds."""
    warm = samples[len(samples) // 10 :]
    resident = np.array([s.resident_bytes for s in warm], np.float64)
    slope = float(np.polyfit([s.epoch for s in warm], resident, 1)[0])
    tenth = max(1, len(samples) // 10)
    growth = float(np.median(resident[-tenth:]) - np.median(resident[:tenth]))
    files, threads = ({getattr(s, what) for s in warm} for what in ("files", "threads"))
    return {
        "resident_bytes_per_epoch": slope,
        "resident_growth_bytes": growth,
        "files": sorted(files),
        "threads": sorted(threads),
        "promises": {
            "memory_does_not_grow": slope <= SLOPE_BYTES and growth <= GROWTH_BYTES,
            "files_do_not_grow": len(files) == 1,
            "threads_do_not_grow": len(threads) == 1,
        },
    }


def many_shards(folder: Path, shards: int, rounds: int) -> dict[str, Any]:
    """Seconds of `h2t cache info`, the whole process, and of `open_cache`, on a cache of `shards` shards.

    By the clock, which the promise is on, and of the processor.
    """
    maps = folder / f"shards-{shards}"
    row_bytes = int(np.prod(SHAPE)) * 2
    if not (maps / "cache.json").is_file():
        started = time.perf_counter()
        write_synthetic(maps, shards, SHAPE, classes=CLASSES, shard_bytes=row_bytes)
        print(f"wrote {shards} shards in {time.perf_counter() - started:.0f} s", flush=True)
    found = {"info": [_timed(lambda: _info(maps, shards), resource.RUSAGE_CHILDREN) for _ in range(rounds)]}
    found["open_cache"] = [_timed(lambda: open_cache(maps).close(), resource.RUSAGE_SELF) for _ in range(rounds)]
    medians = {name: statistics.median(wall for wall, _ in each) for name, each in found.items()}
    return {
        "shards": shards,
        "rounds": rounds,
        "record_bytes": (maps / "cache.json").stat().st_size,
        "median_s": medians,
        "least_s": {name: min(wall for wall, _ in each) for name, each in found.items()},
        "cpu_s": {name: statistics.median(cpu for _, cpu in each) for name, each in found.items()},
        "promises": {f"{name}_under_a_second": value < OPENING_SECONDS for name, value in medians.items()},
    }


def _info(maps: Path, shards: int) -> None:
    command = [sys.executable, "-m", "h2t.pipeline", "cache", "info", str(maps)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"in {shards} shards" in said


def _timed(call: Callable[[], None], whose: int) -> tuple[float, float]:
    """Seconds of `call`, by the clock and of the processor (of this process or its children)."""
    before, started = resource.getrusage(whose), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - started, resource.getrusage(whose)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_long", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, help=f"{EPOCHS} by default")
    options = parser.parse_args(given)
    options.data.mkdir(parents=True, exist_ok=True)
    about = machine()
    shards = many_shards(options.data, TINY_SHARDS if options.tiny else SHARDS, 1 if options.tiny else options.rounds)
    run = long_run(options.data, options.epochs or (TINY_EPOCHS if options.tiny else EPOCHS), options.tiny)
    body = {
        "tiny": options.tiny,
        "machine": {
            **about,
            "load_after": os.getloadavg()[0],
            "versions": {**about["versions"], "torch": version("torch")},
        },
        "bounds": {
            "resident_bytes_per_epoch": SLOPE_BYTES,
            "resident_growth_bytes": GROWTH_BYTES,
            "opening_seconds": OPENING_SECONDS,
        },
        "long_run": run,
        "many_shards": shards,
    }
    save(options.out, body)
    print(f"{run['epochs']} epochs, {run['steps']} steps: {run['case']}; {run['residency']}")
    lines = [
        [
            str(s["epoch"]),
            f"{s['seconds']:.0f}",
            f"{s['resident_bytes'] / 2**20:.1f}",
            str(s["files"]),
            str(s["threads"]),
        ]
        for s in run["samples"][:: max(1, len(run["samples"]) // 10)]
    ]
    print(table(["epoch", "s", "MiB", "files", "threads"], lines))
    print(
        f"memory: {run['resident_bytes_per_epoch'] / 1024:+.2f} KiB per epoch, "
        f"{run['resident_growth_bytes'] / 2**20:+.2f} MiB from the second tenth to the last"
    )
    print(
        f"{shards['shards']} shards: "
        + ", ".join(f"{k} {v:.3f} s ({shards['cpu_s'][k]:.3f} CPU)" for k, v in shards["median_s"].items())
    )
    promises = {**run["promises"], **shards["promises"]}
    print(json.dumps(promises, indent=2))
    if not options.tiny and not all(promises.values()):
        raise SystemExit("bench_long: a promise does not hold")


if __name__ == "__main__":
    main()
