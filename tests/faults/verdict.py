"""What must not be after a fault, and after the same command ran once more."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fault import Fault
from stages import STAGES, Stage, litter, tree
from undisturbed import Undisturbed


def lines(said: str) -> list[str]:
    """What was said, without progress bars."""
    return [line for line in re.split(r"[\r\n]+", said) if line.strip() and "|" not in line]


def struck(
    fault: Fault,
    stage: Stage,
    undisturbed: Undisturbed,
    data: Path,
    ends: Sequence[int],
    said: Sequence[str],
    *,
    over: bool,
) -> list[str]:
    """What is wrong after the fault: `ends` and `said` are exit codes and stderr of one command, or of two."""
    new, found = undisturbed.outputs[stage.name], tree(data / stage.writes)
    allowed = [new]
    if over:
        allowed.append(tree(undisturbed.old(stage)))
    if not over or not fault.cleans:
        allowed.append({})
    wrong = []
    if found not in allowed:
        wrong.append("the output is torn" if found else "the older output is gone")
    if 0 in ends and found != new:
        wrong.append("exit 0, but the output is not whole")
    if fault.ends is not None and not set(ends) <= set(fault.ends):
        wrong.append(f"exit {ends}, where one of {fault.ends} was expected")
    read = [source for source in STAGES.values() if source.writes in stage.reads]
    wrong += [f"{s.writes} was changed" for s in read if tree(data / s.writes) != undisturbed.outputs[s.name]]
    for code, text in zip(ends, said, strict=True):
        if fault.quiet and "Traceback" in text:
            wrong.append(f"a traceback: {lines(text)[-1]}")
        elif fault.quiet and code > 0 and len(lines(text)) != 1:
            wrong.append(f"not one line: {lines(text)}")
        elif code == 0 and lines(text):
            wrong.append(f"exit 0, but it said {lines(text)}")
    return wrong + [f"a torn run record, {p.name}" for p in (data / "runs").rglob("*.json") if not _is_json(p)]


def converged(stage: Stage, undisturbed: Undisturbed, data: Path, end: int, said: str) -> list[str]:
    """What is wrong after the same command ran once more, undisturbed."""
    wrong = []
    if end:
        wrong.append(f"again: exit {end}: {lines(said)[-1:]}")
    if tree(data / stage.writes) != undisturbed.outputs[stage.name]:
        wrong.append("again: other bytes")
    if left := litter(data):
        wrong.append(f"again: left behind {left}")
    return wrong


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
