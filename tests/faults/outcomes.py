"""What became of the runs: counted by fault and stage, as JSON and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages import STAGES


@dataclass(frozen=True)
class Outcome:
    """One run. `wrong` is what must not be: nothing, if all is well."""

    number: int
    fault: str
    stage: str
    start: str
    over: bool
    instant: str
    ends: tuple[int, ...]
    said: str
    seconds: float
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        how = f"{self.start}{', over an older output' if self.over else ''}, at {self.instant}"
        ends = ", ".join(map(str, self.ends)) + (f" ({self.said})" if self.said else "")
        verdict = f"WRONG: {'; '.join(self.wrong)}" if self.wrong else "same bytes"
        return f"{self.number:3} {self.fault}, {self.stage}: {how}: exit {ends}: {verdict}"


def counted(outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[str, Any]:
    """Runs by fault and stage, with the exit codes under the fault; whole only the runs that went wrong."""
    faults = {}
    for name in names:
        of = [o for o in outcomes if o.fault == name]
        faults[name] = {
            "stages": {stage: n for stage in STAGES if (n := sum(o.stage == stage for o in of))},
            "exits": dict(sorted(Counter(str(code) for o in of for code in o.ends).items())),
            "wrong": sum(bool(o.wrong) for o in of),
        }
    starts = Counter(o.start for o in outcomes)
    return {
        "runs": len(outcomes),
        "faults": faults,
        "cold": starts["cold"],
        "over_an_older_output": sum(o.over for o in outcomes),
        "wrong": [asdict(o) for o in outcomes if o.wrong],
    }


def table(body: Mapping[str, Any]) -> str:
    """Fault x stage: how many runs; every one converged, unless it says otherwise."""
    lines = ["| fault | " + " | ".join(STAGES) + " | all | wrong |", "| --- |" + " ---: |" * (len(STAGES) + 2)]
    totals: Counter[str] = Counter()
    for name, found in body["faults"].items():
        totals.update(found["stages"])
        cells, runs = [str(found["stages"].get(stage, "–")) for stage in STAGES], sum(found["stages"].values())
        if name in body["skipped"]:
            lines.append(f"| {name} | " + " | ".join(cells) + f" | skipped: {body['skipped'][name]} | |")
        else:
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {runs} | {found['wrong']} |")
    cells = [str(totals[stage]) for stage in STAGES]
    lines.append("| all | " + " | ".join(cells) + f" | {body['runs']} | {len(body['wrong'])} |")
    return "\n".join(lines)
