"""How the time and memory of a step of stage II grow: one axis at a time, from CIFAR size.

    python -m benchmarks.bench_growth                     # results/growth.json and docs/images/growth.svg
    python -m benchmarks.bench_growth --axis heads --out heads.json     # and heads.svg beside it

From 55 heads x 64 channels x 10 classes x 12,406 rows, heads grow to 10,000, channels to 2,048, classes to 8,142 and
rows to a million. Every point is a process of its own, on one thread. Memory is what steps add to the features, and is
planned (`heads.step_size`) before it is measured. Heads are split into parts as in training if a step of all does not
fit `STEP_BYTES`; the step's time is then the sum over the parts.
"""

import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import RESULTS, machine, memory, save, table, timed
from benchmarks.synthetic import write_synthetic
from h2t.cache.reader import open_cache
from h2t.pipeline.heads.descent import Descent
from h2t.pipeline.heads.parts import grouped, parts_of
from h2t.pipeline.heads.stack import Stack
from h2t.pipeline.heads.step_size import seeds_and_donors, step_size
from h2t.pipeline.project.stacks import BATCH, SEEDS, feed_of, head_of, settings, streams_of

BASE = {"heads": 55, "channels": 64, "classes": 10, "rows": 12_406}
AXES = {
    "heads": (1, 55, 660, 2_500, 10_000),
    "channels": (64, 256, 1_024, 2_048),
    "classes": (10, 100, 1_000, 8_142),
    "rows": (1_000, 12_406, 100_000, 1_000_000),
}
STEPS = 8
REPEATS = 2
STEP_BYTES = 2 * 2**30  # as stage II allows at most
KEPT = RESULTS / "growth.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "growth.svg"


def point(heads: int, channels: int, classes: int, rows: int, data: Path) -> dict[str, Any]:
    """Trains some steps in this process: milliseconds of a step (the fastest of `REPEATS`), and bytes of memory."""
    torch.set_num_threads(1)
    seeds = range(min(len(SEEDS), heads))
    per_seed = -(-heads // len(seeds))
    asked = settings(np.linspace(0, 1, per_seed).tolist(), seeds)[:heads]
    with open_cache(data / f"{channels}-{classes}-{rows}") as cache:
        streams = streams_of(cache, seeds)
        feed = feed_of(streams, cache, "memory")
        head, stage1 = head_of(streams, feed.shape)
        size = step_size(streams, feed.reader, stage1, head)
    sizes = (-(-heads // count) for count in range(1, heads + 1))
    parts = next(p for p in (parts_of(asked, n) for n in sizes) if size.of(p[0]) <= STEP_BYTES or len(p) == heads)
    ctypes.CDLL(None).malloc_trim(0)  # steps would use what reading features has freed, and seem to need less
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmHWM")
    cpu = wall = 0.0
    for part in parts:
        ordered = [part[place] for place in grouped(part)]
        stack = Stack(head, ordered, feed.of(*seeds_and_donors(ordered)))
        stack.start(stage1)
        taken = [_steps(stack) for _ in range(REPEATS)]
        cpu, wall = cpu + min(t[0] for t in taken), wall + min(t[1] for t in taken)
        del stack
    return {
        "parts": len(parts),
        "cpu_ms": 1e3 * cpu,
        "wall_ms": 1e3 * wall,
        "step_bytes": memory("VmHWM") - before,
        "planned_bytes": max(map(size.of, parts)),
        "feature_bytes": len(streams.rows) * feed.reader.row_bytes,
    }


def features(channels: int, classes: int, rows: int, data: Path) -> None:
    """Writes the features of a point, unless they are there."""
    folder = data / f"{channels}-{classes}-{rows}"
    if not (folder / "cache.json").is_file():
        write_synthetic(folder, max(rows, classes * 2) * 20 // 19 + 1, (channels, 1, 1), classes=classes)


def _steps(stack: Stack) -> tuple[float, float]:
    """(processor seconds, seconds) of a step, its draws included."""
    descent = Descent(stack.state, {}, 0.9, 5e-4)
    count = min(STEPS, stack.streams.steps)
    with timed() as spent:
        for at in itertools.islice(stack.feed.steps(1, 0, 0, stack.draw, count), count):
            stack.step(at, descent, 0.02)
    return spent["cpu"] / count, spent["seconds"] / count


def line(axis: str, points: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(fixed milliseconds, milliseconds per unit) of the line cpu_ms = a + b x, least squares of relative errors."""
    x = np.array([p[axis] for p in points], float)
    y = np.array([p["cpu_ms"] for p in points])
    a, b = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)[0]
    return float(a), float(b)


def picture(body: dict[str, Any]) -> str:
    """Time and memory of a step against each axis, with the line of the time and the plan of the memory, as SVG."""
    from matplotlib.figure import Figure

    from benchmarks.pictures import svg

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, len(body["axes"]), squeeze=False)
    for column, (axis, found) in enumerate(body["axes"].items()):
        points = found["points"]
        x = [p[axis] for p in points]
        above, below = panels[0][column], panels[1][column]
        above.plot(x, [p["cpu_ms"] for p in points], "o", color="#2166ac", label="measured")
        above.plot(x, [found["fixed_ms"] + found["ms_per_unit"] * n for n in x], color="#888888", label="line")
        below.plot(x, [p["step_bytes"] / 2**20 for p in points], "o", color="#b2182b", label="measured")
        below.plot(x, [p["planned_bytes"] / 2**20 for p in points], color="#888888", label="planned")
        for panel, label in ((above, "a step, processor ms"), (below, "memory of a step, MiB")):
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlabel(axis)
            if not column:
                panel.set_ylabel(label)
                panel.legend(frameon=False, fontsize=8)
    return svg(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_growth", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=KEPT)
    parser.add_argument("--data", type=Path, default=None, help="directory for the features; default: a temporary one")
    parser.add_argument("--axis", choices=AXES, action="append", help="only this axis; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="two small points an axis: does it work, not how fast")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.point:
        print(json.dumps(point(**json.loads(options.point), data=options.data)))
        return
    body: dict[str, Any] = {
        "benchmark": "growth",
        "machine": machine(),
        "tiny": options.tiny,
        "batch": BATCH,
        "axes": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for axis in options.axis or AXES:
            points = []
            for value in AXES[axis][:2] if options.tiny else AXES[axis]:
                asked = {**BASE, axis: value}
                data = options.data or Path(scratch)
                features(**{key: asked[key] for key in ("channels", "classes", "rows")}, data=data)
                command = [sys.executable, "-m", "benchmarks.bench_growth", "--data", str(data)]
                done = subprocess.run([*command, "--point", json.dumps(asked)], stdout=subprocess.PIPE, check=True)
                points.append({**asked, **json.loads(done.stdout)})
            fixed, per_unit = line(axis, points)
            body["axes"][axis] = {"points": points, "fixed_ms": fixed, "ms_per_unit": per_unit}
            rows = [
                (f"{p[axis]:,}", f"{p['cpu_ms']:.2f}", f"{p['cpu_ms'] / (fixed + per_unit * p[axis]):.2f}",
                 f"{p['step_bytes'] / 2**20:.0f}", f"{p['planned_bytes'] / 2**20:.0f}", str(p["parts"]))
                for p in points
            ]  # fmt: skip
            print(table((axis, "processor ms", "/ line", "MiB", "planned", "parts"), rows), flush=True)
    body["load_after"] = os.getloadavg()[0]
    save(options.out, body)
    whole = options.out == KEPT and not options.axis and not options.tiny
    place = PICTURE if whole else options.out.with_suffix(".svg")
    place.write_text(picture(body), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
