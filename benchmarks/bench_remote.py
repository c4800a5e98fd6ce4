"""An epoch of stage II streamed from an S3 endpoint that lets every request wait 20 ms, beside the same from the disk.

    python -m benchmarks.bench_remote --data DIR

Each run is a process of its own (`epoch_run`) with the same budget of memory; README.md says how to read the result.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.bench_epoch import one
from benchmarks.measure import arguments, machine, save, spread, table
from benchmarks.synthetic import write_synthetic

DELAY = 0.02
ALLOWED = 2.0  # times the epoch from the disk
SHAPE, TINY_SHAPE = (64, 8, 8), (16, 4, 4)
ROWS, TINY_ROWS = 65_536, 4_000  # 512 MiB; 2 MB
FEW_STEPS = 60  # of an epoch without a block cache
WARM, LOCAL = "S3, blocks kept, warm", "local"


@contextmanager
def endpoint(root: Path) -> Iterator[int]:
    """The port of `delayed_s3` over `root`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.delayed_s3", str(root), "--delay", str(DELAY)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()


def counters(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/counters") as answer:
        found: dict[str, int] = json.load(answer)
    return found


def streamed(port: int, location: str, budget: int, blocks: Path, kept: int, *options: str) -> dict[str, Any]:
    """One run, with the requests and bytes it cost the endpoint."""
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "H2T_BLOCK_CACHE": str(blocks),
        "H2T_BLOCK_CACHE_BYTES": str(kept),
    }
    before = counters(port)
    with mock.patch.dict(os.environ, settings):
        found = one("stream", location, budget, *options)  # type: ignore[arg-type]
    after = counters(port)
    return {**found, **{name: after[name] - before[name] for name in after}}


def epoch(run: dict[str, Any]) -> float:
    """Seconds of the epoch once the hot set is in memory."""
    return float(run["epoch_s"] - run["prepare_s"])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one way in one line."""
    epochs = [epoch(run) for run in runs]
    low, high = spread(epochs)
    return {
        "epoch_median_s": statistics.median(epochs),
        "epoch_p10_s": low,
        "epoch_p90_s": high,
        "prepare_s": statistics.median(run["prepare_s"] for run in runs),
        "rounds": len(runs),
        "steps": runs[0]["steps"],
        "steps_of_an_epoch": runs[0]["steps_of_an_epoch"],
        "stall": statistics.median(run["stall"] for run in runs),
        "requests": runs[-1]["requests"],
        "bytes_sent": runs[-1]["sent"],
        "bytes_read": runs[-1]["bytes_read"],
        "bytes_used": runs[-1]["bytes_used"],
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_remote", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.set_defaults(rounds=3)
    options = parser.parse_args(given)
    rows, shape = (TINY_ROWS, TINY_SHAPE) if options.tiny else (ROWS, SHAPE)
    name = f"remote-{rows}-{'x'.join(map(str, shape))}"
    place = options.data / "lab" / name
    if not (place / "cache.json").is_file():
        write_synthetic(place, rows, shape)
    size = rows * shape[0] * shape[1] * shape[2] * 2
    budget, url = size // 10, f"s3://lab/{name}"
    blocks, half = options.data / "blocks", options.data / "blocks-half"
    few = ("--steps", str(3 if options.tiny else FEW_STEPS))
    for folder in (blocks, half):
        shutil.rmtree(folder, ignore_errors=True)
    about, rounds = machine(), 1 if options.tiny else options.rounds
    found: dict[str, list[dict[str, Any]]] = {LOCAL: [], WARM: []}
    with endpoint(options.data) as port:
        first = streamed(port, url, budget, blocks, 2 * size)
        for _ in range(rounds):
            found[LOCAL].append(streamed(port, str(place), budget, blocks, 0))
            found[WARM].append(streamed(port, url, budget, blocks, 2 * size))
        found["S3, blocks kept, first epoch"] = [first]
        streamed(port, url, budget, half, size // 2, *few)
        found["S3, blocks for half of it"] = [streamed(port, url, budget, half, size // 2, *few)]
        found["S3, no blocks"] = [streamed(port, url, budget, blocks, 0, *few)]
    for folder in (blocks, half):
        shutil.rmtree(folder, ignore_errors=True)
    results = {way: summary(runs) for way, runs in found.items()}
    ratios = [epoch(a) / epoch(b) for a, b in zip(found[WARM], found[LOCAL], strict=True)]
    low, high = spread(ratios)
    everything = [run for way, runs in found.items() for run in runs if run["steps"] == run["steps_of_an_epoch"]]
    body = {
        "tiny": options.tiny,
        "machine": {**about, "versions": {**about["versions"], "torch": version("torch"), "s3fs": version("s3fs")}},
        "case": f"{rows} rows of {'x'.join(map(str, shape))} float16, {size} bytes; budget {budget} bytes of memory",
        "delay_s": DELAY,
        "results": results,
        "promises": {
            "warm_over_local": {"median": statistics.median(ratios), "p10": low, "p90": high},
            "allowed": ALLOWED,
            "holds": statistics.median(ratios) <= ALLOWED,
            "same_weights": len({run["weights"] for run in everything}) == 1,
        },
    }
    save(options.out, body)
    base = results[LOCAL]["epoch_median_s"]
    lines = [
        [
            way,
            f"{line['epoch_median_s']:.1f}",
            f"{line['epoch_median_s'] / base:.2f}",
            f"{100 * line['stall']:.0f} %",
            str(line["requests"]),
            f"{line['bytes_sent'] / 1e6:.0f}",
            f"{line['bytes_sent'] / line['bytes_used']:.2f}",
            f"{line['steps']} of {line['steps_of_an_epoch']}",
        ]
        for way, line in results.items()
    ]
    print(body["case"])
    print(table(["way", "epoch s", "x local", "waiting", "requests", "MB sent", "sent / used", "steps"], lines))
    print(json.dumps(body["promises"], indent=2))
    if not body["promises"]["same_weights"]:  # type: ignore[index]
        raise SystemExit("bench_remote: streamed from S3, heads came out other than from the disk")


if __name__ == "__main__":
    main()
