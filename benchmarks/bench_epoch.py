"""Time and memory of an epoch of stage II on a cache ten times the memory budget, beside in memory and beside peers.

    python -m benchmarks.bench_epoch --data DIR

Each run is a process of its own (`epoch_run`); ways take turns. README.md says how to read the result.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.epoch_run import HEADS
from benchmarks.measure import MEMORY_SLACK, arguments, machine, save, spread, table
from benchmarks.synthetic import write_synthetic

SHAPE, TINY_SHAPE = (64, 8, 8), (16, 4, 4)
ROWS, TINY_ROWS = 262_144, 4_000  # 2 GiB; 2 MB
PEER_STEPS = 20  # peers are stopped after as many, and an epoch is reckoned from that
HIT_RATE_POINTS = 0.02


def one(way: str, cache: Path, budget: int, *options: str) -> dict[str, Any]:
    """The result of one `epoch_run`."""
    command = [sys.executable, "-m", "benchmarks.epoch_run", way, str(cache), "--budget", str(budget), *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ways(tiny: bool) -> dict[str, tuple[str, ...]]:
    """Name in the table -> arguments of `epoch_run`. A tiny run leaves out workers: each imports torch again."""
    steps = ("--steps", str(3 if tiny else PEER_STEPS))
    found = {
        "ours, streaming": ("stream",),
        "ours, in memory": ("memory",),
        "zarr-python oindex": ("oindex", *steps),
        "DataLoader, no worker": ("dataloader", *steps, "--workers", "0"),
    }
    return found if tiny else {**found, "DataLoader, 2 workers": ("dataloader", *steps, "--workers", "2")}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one way in one line; sizes are the largest seen."""
    epochs = [run["epoch_s"] for run in runs]
    low, high = spread(epochs)
    return {
        "epoch_median_s": statistics.median(epochs),
        "epoch_p10_s": low,
        "epoch_p90_s": high,
        "rounds": len(runs),
        "steps": runs[0]["steps"],
        "steps_of_an_epoch": runs[0]["steps_of_an_epoch"],
        "useful_gb_per_s": statistics.median(run["useful_gb_per_s"] for run in runs),
        "peak_beyond_baseline_bytes": max(run["peak_beyond_baseline_bytes"] for run in runs),
        "baseline_bytes": max(run["baseline_bytes"] for run in runs),
        "stall": statistics.median(run["stall"] for run in runs),
        "bytes_read": runs[0]["bytes_read"],
        "bytes_used": runs[0]["bytes_used"],
    }


def judged(found: dict[str, list[dict[str, Any]]], budget: int) -> dict[str, Any]:
    """What this benchmark promises, and whether it held."""
    streamed, kept = found["ours, streaming"], found["ours, in memory"]
    rate, expected = streamed[0]["hit_rate"], streamed[0]["expected_hit_rate"]
    allowed = budget + MEMORY_SLACK
    return {
        "memory_within_bound": all(run["peak_beyond_baseline_bytes"] <= allowed for run in streamed),
        "allowed_beyond_baseline_bytes": allowed,
        "hit_rate": rate,
        "expected_hit_rate": expected,
        "hit_rate_as_expected": abs(rate - expected) <= HIT_RATE_POINTS,
        "same_weights_as_in_memory": len({run["weights"] for run in (*streamed, *kept)}) == 1,
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_epoch", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.set_defaults(rounds=3)
    options = parser.parse_args(given)
    rows, shape = (TINY_ROWS, TINY_SHAPE) if options.tiny else (ROWS, SHAPE)
    cache = options.data / f"epoch-{rows}-{'x'.join(map(str, shape))}"
    if not (cache / "cache.json").is_file():
        write_synthetic(cache, rows, shape)
    size = rows * shape[0] * shape[1] * shape[2] * 2
    budget = size // 10
    about, rounds = machine(), 1 if options.tiny else options.rounds
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways(options.tiny)}
    for i in range(rounds):
        for name, (way, *more) in ways(options.tiny).items():
            if i == 0 or way in ("stream", "memory"):  # peers take minutes, and differ by factors
                found[name].append(one(way, cache, budget, *more))
    body = {
        "tiny": options.tiny,
        "machine": {**about, "versions": {**about["versions"], "torch": version("torch")}},
        "page_cache": "warm",
        "case": f"{rows} rows of {'x'.join(map(str, shape))} float16, {size} bytes; budget {budget} bytes",
        "heads": [vars(head) for head in HEADS],
        "results": {name: summary(runs) for name, runs in found.items()},
        "promises": judged(found, budget),
    }
    save(options.out, body)
    base = body["results"]["ours, streaming"]["epoch_median_s"]
    lines = [
        [
            name,
            f"{line['epoch_median_s']:.1f}",
            f"{line['epoch_median_s'] / base:.2f}",
            f"{line['useful_gb_per_s']:.3f}",
            f"{line['peak_beyond_baseline_bytes'] / 2**20:.0f}",
            f"{100 * line['stall']:.0f} %" if name.startswith("ours") else "",
        ]
        for name, line in body["results"].items()
    ]
    print(body["case"])
    print(table(["way", "epoch s", "x ours", "useful GB/s", "MiB beyond imports", "waiting"], lines))
    print(json.dumps(body["promises"], indent=2))
    if not all(v for k, v in body["promises"].items() if k in ("memory_within_bound", "same_weights_as_in_memory")):
        raise SystemExit("bench_epoch: a promise does not hold")


if __name__ == "__main__":
    main()
