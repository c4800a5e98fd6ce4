"""What `make -C tests mutants` found: each survivor, and how many mutants of each file were killed or survived.

A mutant is one small change to one function (mutmut.cfg says in which files). It is killed if a test fails or runs into
its time limit. Exit code 1 if less than 90 % of a file's mutants are killed.
"""

import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

LEAST = 0.9
KILLED = {"killed", "timeout", "segfault", "suspicious"}


def mutmut(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "mutmut"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    report = []
    for line in mutmut("results", "--all", "true").splitlines():
        name, _, status = line.strip().rpartition(": ")
        found[name.split(".x")[0]][status] += 1
        if status not in KILLED:
            diff = mutmut("show", name).splitlines()
            report += [f"{name}: {status}", *(s for s in diff if s[:1] in "+-" and s[:3] not in ("+++", "---")), ""]
    poor = not found
    for module, counts in sorted(found.items()):
        total, killed = counts.total(), sum(counts[s] for s in KILLED)
        said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        report.append(
            f"{module.replace('.', '/')}.py: {killed} of {total} killed, {100 * killed / total:.1f} % ({said})"
        )
        poor |= killed < LEAST * total
    print("\n".join(report))  # noqa: T201
    if poor:
        raise SystemExit(f"mutants: at least {100 * LEAST:.0f} % of each file must be killed")


if __name__ == "__main__":
    main()
