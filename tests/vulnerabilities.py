"""Known vulnerabilities of what is installed here, by pip-audit (PyPA), where its data can be reached.

    make audit

The installed packages are compared with the advisories that the package index tells of each. An index that is a mirror
may tell none; then one line says so and nothing fails. A known vulnerability fails once a version without it exists:
then there is something to do. One that nobody has mended yet, or that `ACCEPTED` gives a reason for, is said only.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

#: Advisory (PYSEC-..., GHSA-..., CVE-...) -> why it does not concern us.
ACCEPTED: dict[str, str] = {}
PROBE = "pip"  # asked about alone: is there an answer at all?
PATIENCE = 10  # seconds for an answer
LONGEST = 50  # seconds for all


Findings = dict[str, Any]


def ask(arguments: Sequence[str], seconds: int, given: str | None = None) -> Findings | None:
    """pip-audit's findings; None where its data cannot be reached."""
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off", f"--timeout={PATIENCE}"]
    try:
        done = subprocess.run(
            [*command, *arguments], input=given, capture_output=True, text=True, timeout=seconds, check=False
        )
        found: Findings = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return found


def answered(probe: Findings | None) -> bool:
    """Whether the index knew the probe."""
    return probe is not None and not all("skip_reason" in one for one in probe["dependencies"])


def verdict(probe: Findings | None, found: Findings | None, accepted: dict[str, str]) -> tuple[int, list[str]]:
    """Exit code and lines to say, from the findings about the probe and about everything installed."""
    if not answered(probe):
        return 0, ["audit: the index here tells of no vulnerabilities; nothing was compared"]
    if found is None:
        return 0, [f"audit: no answer within {LONGEST} s; nothing was compared"]
    known = [one for one in found["dependencies"] if "skip_reason" not in one]
    lines, failed = [], 0
    for one in known:
        for advisory in one["vulns"]:
            names = {advisory["id"], *advisory.get("aliases", [])}
            reason = next((why for name, why in accepted.items() if name in names), None)
            mended = advisory.get("fix_versions") or []
            lines.append(
                f"audit: {one['name']} {one['version']}: {advisory['id']}, "
                + (
                    f"accepted: {reason}"
                    if reason
                    else f"mended in {', '.join(mended)}"
                    if mended
                    else "not mended yet"
                )
            )
            failed += bool(mended) and reason is None
    unknown = len(found["dependencies"]) - len(known)
    lines.append(f"audit: {len(known)} packages compared, {failed} to be mended; {unknown} are not in the index")
    return (1 if failed else 0), lines


def main() -> int:
    """Asks about one package, and about all if that was answered."""
    line = f"{PROBE}=={version(PROBE)}\n"
    probe = ask(["--no-deps", "--disable-pip", "--requirement=/dev/stdin"], 3 * PATIENCE, line)
    found = ask(["--local", "--skip-editable"], LONGEST) if answered(probe) else None
    code, lines = verdict(probe, found, ACCEPTED)
    print("\n".join(lines))  # noqa: T201
    return code


if __name__ == "__main__":
    raise SystemExit(main())
