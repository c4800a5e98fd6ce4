"""Every parser under the coverage-guided fuzzer, one after the other; a table, and `benchmarks/results/fuzz.json`.

    make -C tests fuzz                                   # a million executions of each, or an hour of each
    python tests/fuzz/campaign.py record urls --executions 100000 --seed 3

Each target runs in a process of its own (`guided.py`) from the valid inputs of its seeds, and ends at its first
finding, whose input is kept in the folder `fuzz-findings`. Ends with 1 if there was any.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]

from fuzz.target import Target  # noqa: E402
from fuzz.targets import TARGETS  # noqa: E402

from benchmarks.measure import machine, save, table  # noqa: E402

FINDINGS = ROOT / "fuzz-findings"
STATUS = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/.*?rss: (\d+)Mb", re.MULTILINE)
LAST_WORD = b"stat::peak_rss_mb"
EXIT_SECONDS = 10
CRASH = re.compile(r"=== Uncaught Python exception: ===\n(.*)")


def fuzz(target: Target, executions: int, seconds: int, seed: int) -> dict[str, Any]:
    """What became of one target."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="h2t-corpus-") as folder:
        corpus, log = Path(folder, "corpus"), Path(folder, "log")
        corpus.mkdir()
        for number, data in enumerate(target.seeds()):
            (corpus / f"seed-{number}").write_bytes(data[: target.max_bytes])
        FINDINGS.mkdir(exist_ok=True)
        options = {
            "runs": executions, "max_total_time": seconds, "seed": seed, "timeout": 60, "rss_limit_mb": 4096,
            "artifact_prefix": f"{FINDINGS}/{target.name}-", "print_final_stats": 1,
        }  # fmt: skip
        command = [sys.executable, HERE / "guided.py", target.name, *(f"-{k}={v}" for k, v in options.items()), corpus]
        with log.open("wb") as into:
            process = subprocess.Popen(list(map(str, command)), stdout=into, stderr=subprocess.STDOUT)
            _wait(process, log)
        said = log.read_text(errors="replace")
    count, edges, features, inputs, memory = map(int, (STATUS.findall(said) or [(0,) * 5])[-1])
    counted = re.search(r"number_of_executed_units: (\d+)", said)
    finding = None
    if CRASH.search(said) or "ERROR: libFuzzer" in said or not counted:
        told = CRASH.search(said)
        finding = told[1][:500] if told else (said.strip().splitlines() or ["no reason given"])[-1][:500]
    return {
        "parser": target.parser, "commit": _commit(), "executions": int(counted[1]) if counted else count,
        "asked_for": executions, "seed": seed,
        "edges": edges, "features": features, "corpus": inputs, "peak_rss_mb": memory, "finding": finding,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def _wait(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until it ends; libFuzzer leaves from within, and Arrow's threads may then wait for Python for ever."""
    while process.poll() is None:
        time.sleep(1)
        if LAST_WORD in log.read_bytes()[-4096:]:
            try:
                process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            process.wait()


def shown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table."""
    header = ("parser", "executions", "edges", "inputs kept", "findings", "peak MB", "seconds")
    lines = [
        (one["parser"], f"{one['executions']:,}", str(one["edges"]), str(one["corpus"]), "1" if one["finding"] else "0",
         str(one["peak_rss_mb"]), f"{one['seconds']:.0f}")
        for one in found.values()
    ]  # fmt: skip
    return table(header, lines)


def _commit() -> str:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip()


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--executions", type=int, default=1_000_000, help="of each target")
    parser.add_argument("--seconds", type=int, default=3600, help="at most, of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    given = parser.parse_args()
    earlier = json.loads(given.out.read_text())["targets"] if given.targets and given.out.is_file() else {}
    about = machine()
    found: dict[str, dict[str, Any]] = {}
    for name in given.targets or TARGETS:
        found[name] = fuzz(TARGETS[name], given.executions, given.seconds, given.seed)
        print(f"{name}: {found[name]['executions']:,} executions, finding: {found[name]['finding']}", flush=True)  # noqa: T201
        save(given.out, {"machine": about, "targets": {**earlier, **found}})
    print(f"\nseed {given.seed}\n{shown(found)}")  # noqa: T201
    return 1 if any(one["finding"] for one in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
