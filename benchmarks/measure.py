"""Alternating runs, their medians and spread, and what machine they ran on. Shared by the benchmarks."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from h2t.cache.errors import CacheError
from h2t.pipeline.base.clock import processor
from h2t.pipeline.base.errors import UserError

PACKAGES = ("numpy", "crc32c", "numcodecs", "zarr", "tensorstore", "h5py")
RESULTS = Path(__file__).parent / "results"
SLOW_SECONDS = 2.0  # a contestant that takes longer runs in the first round only
SLOW_ROUNDS = 1
TURN_SECONDS = 0.1  # a turn calls a fast contestant several times, so that it does not pay for its predecessor's traces
TURN_CALLS = 7
LINE = 240  # characters of JSON that stay on one line
#: Bytes that streaming may take beyond the imports and the budget: the step's own tensors, and Python.
MEMORY_SLACK = 250 * 2**20


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each round, in order, and the setting a contestant ran under.

    `cpu` counts what the process computed, on all cores together; it leaves out waiting for a turn on a busy machine.
    """

    seconds: tuple[float, ...]
    cpu: tuple[float, ...]
    setting: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def json(self) -> dict[str, Any]:
        low, high = spread(self.seconds)
        cpu = statistics.median(self.cpu)
        body = {"median_s": self.median, "p10_s": low, "p90_s": high, "cpu_s": cpu, "rounds": len(self.seconds)}
        return {**body, "setting": self.setting} if self.setting else body


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and 90th percentile; least and most where there are few."""
    ordered = sorted(values)
    edge = len(ordered) // 10
    return ordered[edge], ordered[-1 - edge]


def ratio(numerator: Timing, denominator: Timing) -> dict[str, float]:
    """How many times longer `numerator` takes: median and spread over the rounds that both ran in; CPU seconds too."""
    pairs = [a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=False)]
    low, high = spread(pairs)
    cpu = statistics.median(numerator.cpu) / max(1e-9, statistics.median(denominator.cpu))
    return {"median": statistics.median(pairs), "p10": low, "p90": high, "cpu": cpu}


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    settings: Mapping[str, str] | None = None,
    before_round: Callable[[], object] = lambda: None,
    *,
    slow_rounds: int = SLOW_ROUNDS,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Every contestant has one turn per round, after one untimed call each, so that noise falls on all alike.

    Without `warm_up` that call is left out; then none counts as slow.
    A turn's time is the median of its calls. Each round starts with another contestant. One that takes more than
    `SLOW_SECONDS` has its turn in the first `slow_rounds` only.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    slow = set()
    for name, call in contestants.items() if warm_up else ():
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > SLOW_SECONDS:
            slow.add(name)
    order = list(contestants)
    for i in range(rounds):
        before_round()
        for name in order[i % len(order) :] + order[: i % len(order)]:
            if name in slow and i >= slow_rounds:
                continue
            turns[name].append(_turn(contestants[name], before))
    found = {}
    for name, pairs in turns.items():
        seconds, cpu = zip(*pairs, strict=True)
        found[name] = Timing(seconds, cpu, (settings or {}).get(name, ""))
    return found


def _turn(call: Callable[[], object], before: Callable[[], object]) -> tuple[float, float]:
    taken: list[float] = []
    cpu: list[float] = []
    while not taken or (sum(taken) < TURN_SECONDS and len(taken) < TURN_CALLS):
        before()
        start, started = time.perf_counter(), time.process_time()
        call()
        taken.append(time.perf_counter() - start)
        cpu.append(time.process_time() - started)
    return statistics.median(taken), statistics.median(cpu)


def fastest(variants: Mapping[str, Callable[[], object]], rounds: int) -> str:
    """The variant with the least median; a single one is not timed."""
    if len(variants) == 1:
        return next(iter(variants))
    timings = alternate(variants, rounds)
    return min(timings, key=lambda name: timings[name].median)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Holds, after the block, its `seconds` by the clock and of the processor (`cpu`), ended children included."""
    spent: dict[str, float] = {}
    started, used = time.perf_counter(), processor()
    yield spent
    spent |= {"seconds": time.perf_counter() - started, "cpu": processor() - used}


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with one line for an error that its user can mend."""
    try:
        yield
    except (UserError, CacheError) as error:
        raise SystemExit(f"error: {error}") from None


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that names the machine."""
    model = platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    load = os.getloadavg()[0]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.system(),
        "load_before": load,
        "versions": versions,
    }


def memory(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (most so far) of this process, bytes; `rusage` may be a parent's."""
    if not Path("/proc/self/status").is_file():
        raise UserError("benchmark: memory is read from /proc/self/status, which this system lacks; run it on Linux")
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def own_memory(field: str) -> int:
    """`memory` without the pages of files that are resident now: a fork gets those of libraries at their first use."""
    return memory(field) - memory("RssFile")


def arguments(module: str, about: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=about)
    parser.add_argument("--data", type=Path, required=True, help="directory for the data; what is there is used again")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{module.removeprefix('bench_')}.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="kilobytes and two rounds: does it work, not how fast")
    return parser


def save(path: Path, body: Mapping[str, Any] | Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(records(body) + "\n", encoding="utf-8")


def records(value: Any, indent: str = "") -> str:
    """`value` as JSON with one record a line: objects and lists that hold containers are broken, others are not."""
    parts = list(value.values() if isinstance(value, dict) else value) if isinstance(value, dict | list | tuple) else []
    flat = json.dumps(value, sort_keys=True)
    if len(flat) + len(indent) <= LINE or not any(isinstance(part, dict | list | tuple) for part in parts):
        return flat
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {records(value[key], inner)}" for key in sorted(value)]
        start, end = "{}"
    else:
        lines, (start, end) = [records(part, inner) for part in parts], "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{end}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, rule, *lines)
    )
