"""A cache larger than memory, from writing to stage II, from the disk and from S3: time, GB/s and peak memory.

    python -m benchmarks.bench_scale --data DIR            # 100,000 rows of 2048x7x7: 20 GB
    python -m benchmarks.bench_scale --data DIR --rows 65536 --map 64,8,8 --budget 53687091
    python -m benchmarks.bench_scale --data DIR --rows 2400000 --map 2048,1,1 --dtype float32     # a pooled cache

Each step is a process of its own and runs once, in the order in which a user would start them. `read` is stage II's
reading alone, without training, beside a bare read of every byte. The last steps read and stream the same cache from an
endpoint on the loopback that answers every request 20 ms late, without and with kept blocks. If the disk is too small
for all rows, it takes as many as fit and says so. README.md says how to read the result.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.delayed_s3 import endpoint
from benchmarks.measure import MEMORY_SLACK, arguments, machine, save, table
from benchmarks.synthetic import map_shape

ROOT = Path(__file__).parents[1]
MAP, TINY_MAP = "2048,7,7", "64,4,4"
ROWS, TINY_ROWS = 100_000, 3_000
BUDGET, TINY_BUDGET = 2 * 2**30, 2 * 2**20
DISK_SHARE = 0.4  # of the free space, for the cache; the kept blocks take as much again
DELAY = 0.02  # seconds before S3's answer
BARE, READ, READ_COLD, READ_WARM = "bare read", "read", "read from S3", "read from S3 again"
LOCAL, COLD, WARM = "stream", "stream from S3", "stream from S3 again"


def step(command: Sequence[str], moved: int, environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Runs `command`; its seconds, CPU seconds, peak resident bytes, GB/s for `moved` bytes; and its output."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
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
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "gb_per_s": moved / seconds / 1e9,
        "command": " ".join(["python", "-m", *command]),
    }
    return measured, said


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_scale", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, help=f"{ROWS} by default, or as many as the disk allows")
    parser.add_argument("--map", help=f"C,H,W of a map, {MAP} by default")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the maps")
    parser.add_argument("--budget", type=int, help=f"bytes of maps in memory while streaming, {BUDGET} by default")
    parser.add_argument("--keep", action="store_true", help="leave the caches in DIR")
    options = parser.parse_args(given)
    place = options.data / "bench"  # the bucket's name, too
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    shape = options.map or (TINY_MAP if options.tiny else MAP)
    budget = options.budget or (TINY_BUDGET if options.tiny else BUDGET)
    row_bytes = int(np.prod(map_shape(shape))) * (4 if options.dtype == "float32" else 2)
    wanted = options.rows or (TINY_ROWS if options.tiny else ROWS)
    rows = min(wanted, int(shutil.disk_usage(options.data).free * DISK_SHARE) // row_bytes)
    about = machine()
    size = rows * row_bytes
    maps, epoch, there = str(place / "maps"), "benchmarks.epoch_run", "s3://bench/maps"
    within = ["--budget", str(budget)]
    commands = {
        "write": ["benchmarks.synthetic", maps, "--rows", str(rows), "--map", shape, "--dtype", options.dtype],
        "verify": ["h2t.pipeline", "cache", "verify", maps],
        "pool": ["h2t.pipeline", "cache", "pool", maps, str(place / "pooled")],
        BARE: [epoch, "bare", maps],
        READ: [epoch, "read", maps, *within],
        LOCAL: [epoch, "stream", maps, *within],
        READ_COLD: [epoch, "read", there, *within],
        READ_WARM: [epoch, "read", there, *within],
        COLD: [epoch, "stream", there, *within],
        WARM: [epoch, "stream", there, *within],
    }
    if map_shape(shape)[1:] == (1, 1):
        del commands["pool"]
    steps: dict[str, dict[str, Any]] = {}
    streamed: dict[str, dict[str, Any]] = {}
    with endpoint(options.data, DELAY) as s3:
        environment = {
            **s3.environment,
            "H2T_BLOCK_CACHE": str(place / "blocks"),
            "H2T_BLOCK_CACHE_BYTES": str(2 * size),
        }
        for name, command in commands.items():
            print(f"{name} ...", flush=True)
            requests, sent = s3.requests, s3.sent
            if name in (READ_COLD, COLD):
                shutil.rmtree(place / "blocks", ignore_errors=True)
            steps[name], said = step(command, size, environment)
            steps[name] |= {"requests": s3.requests - requests, "bytes_sent": s3.sent - sent}
            if epoch in command:
                streamed[name] = json.loads(said.splitlines()[-1])
                moved = "bytes_used" if name in (LOCAL, COLD, WARM) else "bytes_read"
                steps[name]["gb_per_s"] = streamed[name][moved] / streamed[name]["seconds"] / 1e9
            steps[name]["command"] = steps[name]["command"].replace(str(options.data), "DIR")
    if not options.keep:
        shutil.rmtree(place)

    local = streamed[LOCAL]
    beyond, allowed = local["peak_beyond_baseline_bytes"], budget + MEMORY_SLACK
    promises = {
        "memory_within_bound": beyond <= allowed,
        "peak_beyond_baseline_bytes": beyond,
        "allowed_beyond_baseline_bytes": allowed,
        "hit_rate": local["hit_rate"],
        "expected_hit_rate": local["expected_hit_rate"],
        "same_weights": len({streamed[name]["weights"] for name in (LOCAL, COLD, WARM)}) == 1,
        "read_over_bare": steps[READ]["gb_per_s"] / steps[BARE]["gb_per_s"],
        "read_again_from_s3_over_read": steps[READ_WARM]["gb_per_s"] / steps[READ]["gb_per_s"],
        "s3_again_over_local": streamed[WARM]["seconds"] / local["seconds"],
    }
    body = {
        "benchmark": "scale",
        "tiny": options.tiny,
        "machine": {**about, "load_after": os.getloadavg()[0]},
        "case": {"rows": rows, "rows_wanted": wanted, "map": shape, "bytes": size, "budget_bytes": budget},
        "steps": steps,
        "stream": streamed,
        "promises": promises,
    }
    save(options.out, body)
    short = "" if rows == wanted else f" (of {wanted}: the disk holds no more)"
    print(f"{rows} rows{short} of {shape} {options.dtype}, {size / 1e9:.1f} GB; budget {budget / 2**30:.1f} GiB")
    lines = [
        [
            name,
            f"{s['seconds']:.0f}",
            f"{s['cpu_s']:.0f}",
            f"{s['gb_per_s']:.2f}",
            f"{s['peak_bytes'] / 2**20:.0f}",
            str(s["requests"]),
            s["command"],
        ]
        for name, s in steps.items()
    ]
    print(table(["step", "s", "CPU s", "GB/s", "peak MiB", "requests", "command"], lines))
    print(json.dumps(promises, indent=2))
    if not promises["memory_within_bound"]:
        raise SystemExit("bench_scale: streaming took more memory than it may")
    if not promises["same_weights"]:
        raise SystemExit("bench_scale: classifiers streamed from S3 differ from those streamed from the disk")


if __name__ == "__main__":
    main()
