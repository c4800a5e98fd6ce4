"""Heads trained on the cache beside the same heads trained online (`benchmarks.online_h2t`), paired by seed."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.tables import cell
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting.results import difference

#: How far the cache may lie from the published way, in points.
BOUNDS = {"top1": 0.3, "head": 1.5, "medium": 1.5, "tail": 1.5}


@dataclass(frozen=True)
class Online:
    """The finished online runs at one ratio, by seed."""

    ratio: float
    runs: Sequence[Mapping[str, Any]]

    @property
    def heads(self) -> pd.DataFrame:
        """One line per seed: seed, and its figures on the test split."""
        return pd.DataFrame([{"seed": run["seed"], **run["figures"]} for run in self.runs])

    def median(self, clock: str) -> float:
        """Of `seconds` by the clock or `cpu` seconds, training alone."""
        return statistics.median(float(run[clock]) for run in self.runs)

    @property
    def made(self) -> str:
        """Command, commit and time in one line."""
        commits = ", ".join(sorted({str(run["commit"]) for run in self.runs}))
        cpu = self.runs[0]["parts"]["cpu"]
        passes = sum(run["parts"]["cpu"]["backbone"] for run in self.runs) / sum(run["cpu"] for run in self.runs)
        machine, device = self.runs[0]["machine"], self.runs[0].get("device", "cpu")
        if device != "cpu":
            return (
                f"`python -m benchmarks.online_h2t --device cuda --ratio {self.ratio:g}`; commit {commits}; a seed "
                f"takes {self.median('seconds'):.0f} s on {device}, shared with other runs."
            )
        return (
            f"`python -m benchmarks.online_h2t --ratio {self.ratio:g}`; commit {commits}; a seed takes "
            f"{self.median('cpu'):.0f} s of processor time ({self.median('seconds'):.0f} s by the clock on "
            f"{machine['cores']} cores, {machine['processor']}, shared with other work), {100 * passes:.0f} % of it "
            f"backbone passes; evaluation, {cpu['evaluation']:.0f} s, not counted."
        )


def load_online(data: Path, ratio: float, variant: str = "") -> Online:
    """The runs in `data`/online at `ratio`; `variant` as in their names, `-frozen` for one. Raises UserError."""
    paths = sorted((data / "online").glob(f"ratio-{ratio:g}-seed-*[0-9]{variant}.json"))
    if not paths:
        raise UserError(f"{data / 'online'}: no run at ratio {ratio:g}; run python -m benchmarks.online_h2t")
    return Online(ratio, [json.loads(path.read_text(encoding="utf-8")) for path in paths])


def verdict(found: Difference, bound: float) -> str:
    """Where the 95 % interval lies: whole within the bound, with its mean only, or not even that."""
    if found.low is not None and found.high is not None and -bound <= found.low and found.high <= bound:
        return "within"
    return "partly outside, its mean within" if abs(found.mean) <= bound else "around a mean outside"


def bounds_table(online: Online, ours: pd.DataFrame) -> list[list[str]]:
    """Lines of figure, online, ours, ours - online, the bound, the verdict."""
    lines = []
    for figure, bound in BOUNDS.items():
        found = difference(ours, online.heads, figure)
        if found is None:
            raise UserError("online: no seed was trained both online and on the cache")
        cells = [cell(heads, figure) for heads in (online.heads, ours)]
        lines.append([figure, *cells, found.text.rpartition("]")[0] + "]", f"± {bound:g}", verdict(found, bound)])
    return lines


def recipes_lines(online: Online, ours: Mapping[str, pd.DataFrame]) -> list[list[str]]:
    """Lines of recipe, ours - online in each figure: which way to cache comes how near."""
    lines = []
    for label, heads in ours.items():
        found = [difference(heads, online.heads, figure) for figure in BOUNDS]
        lines.append([label, *(f.text.rpartition("]")[0] + "]" if f else "–" for f in found)])
    return lines


def record(online: Online, ours: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """For benchmarks/results/online.json: every run, and for each way to cache our heads and how they differ."""
    found: dict[str, Any] = {}
    for label, heads in ours.items():
        apart = {figure: difference(heads, online.heads, figure) for figure in BOUNDS}
        found[label] = {
            "heads": heads[["seed", *BOUNDS]].to_dict("records"),
            "minus_online": {f: {**d.as_dict(), "bound": BOUNDS[f]} for f, d in apart.items() if d},
        }
    command = f"python -m benchmarks.online_h2t --ratio {online.ratio:g}"
    return {"command": command, "ratio": online.ratio, "runs": list(online.runs), "ours": found}
