"""A cache larger than memory, from writing to stage II: time, GB/s and peak memory of every step.

    python -m benchmarks.bench_scale --data DIR            # 100,000 rows of 2048x7x7: 20 GB

Each step is a process of its own and runs once: what a user would start, in that order. Where the disk is too small for
all rows, it takes as many as fit and says so. README.md says how to read the result.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import MEMORY_SLACK, arguments, machine, save, table

ROOT = Path(__file__).parents[1]
SHAPE, TINY_SHAPE = (2048, 7, 7), (64, 4, 4)
ROWS, TINY_ROWS = 100_000, 3_000
BUDGET, TINY_BUDGET = 2 * 2**30, 2 * 2**20
DISK_SHARE = 0.8  # of what is free


def rows_that_fit(wanted: int, row_bytes: int, data: Path) -> int:
    """As many of `wanted` rows as may lie on the disk of `data`."""
    return min(wanted, int(shutil.disk_usage(data).free * DISK_SHARE) // row_bytes)


def step(command: Sequence[str], moved: int) -> tuple[dict[str, Any], str]:
    """Runs `command`; its seconds, CPU seconds, peak resident bytes and GB/s for `moved` bytes; and what it printed."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"bench_scale: {' '.join(command)} ended with {process.returncode}")
    measured = {
        "seconds": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "gb_per_s": moved / seconds / 1e9,
        "command": " ".join(["python", "-m", *command]),
    }
    return measured, said


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_scale", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, help=f"{ROWS} by default, or as many as the disk allows")
    parser.add_argument("--keep", action="store_true", help="leave the caches in DIR")
    options = parser.parse_args(given)
    options.data.mkdir(parents=True, exist_ok=True)
    shape, budget = (TINY_SHAPE, TINY_BUDGET) if options.tiny else (SHAPE, BUDGET)
    row_bytes = int(np.prod(shape)) * 2
    wanted = options.rows or (TINY_ROWS if options.tiny else ROWS)
    maps, pooled = options.data / "scale", options.data / "scale-pooled"
    shutil.rmtree(maps, ignore_errors=True)
    shutil.rmtree(pooled, ignore_errors=True)
    rows, about = rows_that_fit(wanted, row_bytes, options.data), machine()
    size = rows * row_bytes

    map_size = ",".join(map(str, shape))
    commands = {
        "write": ["benchmarks.synthetic", str(maps), "--rows", str(rows), "--map", map_size],
        "verify": ["pipeline", "cache", "verify", str(maps)],
        "pool": ["pipeline", "cache", "pool", str(maps), str(pooled)],
        "stream": ["benchmarks.epoch_run", "stream", str(maps), "--budget", str(budget)],
    }
    steps, streamed = {}, {}
    for name, command in commands.items():
        print(f"{name} ...", flush=True)
        steps[name], said = step(command, size)
        if name == "stream":
            streamed = json.loads(said.splitlines()[-1])
            steps[name]["gb_per_s"] = streamed["bytes_used"] / streamed["seconds"] / 1e9
        steps[name]["command"] = steps[name]["command"].replace(str(options.data), "DIR")
    if not options.keep:
        shutil.rmtree(maps)
        shutil.rmtree(pooled)

    beyond, allowed = streamed["peak_beyond_baseline_bytes"], budget + MEMORY_SLACK
    body = {
        "benchmark": "scale",
        "tiny": options.tiny,
        "machine": {**about, "load_after": os.getloadavg()[0]},
        "case": {"rows": rows, "rows_wanted": wanted, "map": shape, "bytes": size, "budget_bytes": budget},
        "steps": steps,
        "stream": streamed,
        "promises": {
            "memory_within_bound": beyond <= allowed,
            "peak_beyond_baseline_bytes": beyond,
            "allowed_beyond_baseline_bytes": allowed,
            "hit_rate": streamed["hit_rate"],
            "expected_hit_rate": streamed["expected_hit_rate"],
        },
    }
    save(options.out, body)
    short = "" if rows == wanted else f" (of {wanted}: the disk holds no more)"
    print(f"{rows} rows{short} of {map_size} float16, {size / 1e9:.1f} GB; budget {budget / 2**30:.1f} GiB")
    lines = [
        [
            name,
            f"{s['seconds']:.0f}",
            f"{s['cpu_s']:.0f}",
            f"{s['gb_per_s']:.2f}",
            f"{s['peak_bytes'] / 2**20:.0f}",
            s["command"],
        ]
        for name, s in steps.items()
    ]
    print(table(["step", "s", "CPU s", "GB/s", "peak MiB", "command"], lines))
    print(json.dumps(body["promises"], indent=2))
    if beyond > allowed:
        raise SystemExit("bench_scale: streaming took more memory than it may")


if __name__ == "__main__":
    main()
