"""What evaluate wrote, read back, and what can be said about it: curves over ratios, paired differences."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data.classes import GROUPS
from h2t.pipeline.reporting.intervals import Difference, paired

FIGURES = ("top1", *GROUPS, "ece")
ROWS = {"stage1": "stage I", "without_h2t": "without H2T", "with_h2t": "with H2T"}
ABOUT = {"host", "classes", "counts", "groups", "cache"}
TABLES = ("heads", "per_class", "confusion", "reliability", "weight_norms", "embedding")


@dataclass(frozen=True)
class HostResult:
    """What evaluate wrote for one host: `metrics.json`, `about.json`, and its tables by name."""

    name: str
    metrics: Mapping[str, Any]
    about: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]

    @property
    def statistics(self) -> str:
        """The statistics that the host's own evaluation rows have."""
        return str(self.about["host"]["evaluate"])

    @property
    def heads(self) -> pd.DataFrame:
        """Figures of the host's heads on the test split, under its own statistics."""
        heads = self.tables["heads"]
        return heads[(heads.split == "test") & (heads.statistics == self.statistics) & (heads.number >= 0)]

    def at(self, ratio: float, donor: str = "instance", selection: str = "random") -> pd.DataFrame:
        """One head per seed, ascending. At ratio 0 donor and selection change nothing, so any will do."""
        heads = self.heads[self.heads.ratio == ratio]
        if ratio:
            heads = heads[(heads.donor == donor) & (heads.selection == selection)]
        return heads.drop_duplicates("seed").sort_values("seed")

    @property
    def ratios(self) -> list[float]:
        """The ratios at which donor instance, selection random was trained, with 0 if it was."""
        return [r for r in sorted(set(self.heads.ratio)) if len(self.at(r))]

    def numbers(self, row: str) -> list[int]:
        """The heads behind `row` of metrics.json: -1 is stage I."""
        if row == "stage1":
            return [-1]
        entry = self.metrics[row]
        return [] if entry is None else [int(n) for n in self.at(entry["ratio"]).number]


def load_result(name: str, folder: Path) -> HostResult:
    """What evaluate wrote into `folder`. Raises UserError."""
    try:
        texts = ((folder / f"{n}.json").read_text(encoding="utf-8") for n in ("metrics", "about"))
        metrics, about = (dict(json.loads(text)) for text in texts)
        lacks = (ROWS.keys() - metrics.keys()) | (ABOUT - about.keys())
        if lacks:
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
        return HostResult(name, metrics, about, {t: pd.read_parquet(folder / f"{t}.parquet") for t in TABLES})
    except FileNotFoundError as error:
        where = error.filename or folder  # pyarrow names no file
        raise UserError(f"{where}: host {name!r} has not been evaluated; run h2t evaluate {name}") from None
    except (ValueError, TypeError, OSError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{folder}: not what evaluate wrote ({error}); run h2t evaluate {name} again") from None


def _by_seed(heads: pd.DataFrame, figure: str) -> dict[int, float]:
    return {int(s): float(v) for s, v in zip(heads.seed, heads[figure], strict=True) if pd.notna(v)}


def difference(after: pd.DataFrame, before: pd.DataFrame, figure: str) -> Difference | None:
    """The paired difference of `figure` between two tables of heads, one head per seed each."""
    return paired(_by_seed(after, figure), _by_seed(before, figure))


def against_zero(result: HostResult, ratio: float) -> dict[str, Difference | None]:
    """What `ratio` changes against ratio 0 of the same host, by figure; heads of one seed saw the same batches."""
    return {f: difference(result.at(ratio), result.at(0.0), f) for f in FIGURES}


def with_against_without(result: HostResult) -> dict[str, Difference | None] | None:
    """What H2T changes, at the reported ratio; None for a host that has no H2T or no ratio 0."""
    entry = result.metrics["with_h2t"]
    return against_zero(result, entry["ratio"]) if entry and len(result.at(0.0)) else None


def between_hosts(after: HostResult, before: HostResult, row: str) -> dict[str, Difference | None] | None:
    """What another host changes in `row` of metrics.json, paired by seed; None if either lacks the row."""
    if after.metrics[row] is None or before.metrics[row] is None or row == "stage1":
        return None
    new, old = (r.at(r.metrics[row]["ratio"]) for r in (after, before))
    return {f: difference(new, old, f) for f in FIGURES}


def variants(result: HostResult) -> list[tuple[float, str, str]]:
    """(ratio, donor, selection) of the grid that differ from donor instance, selection random."""
    heads = result.heads[result.heads.ratio > 0]
    found = set(zip(heads.ratio, heads.donor, heads.selection, strict=True))
    return sorted(v for v in found if v[1:] != ("instance", "random"))


def hosts_apart(
    results: Sequence[HostResult], against: Mapping[str, str] | None
) -> list[tuple[str, dict[str, Difference | None]]]:
    """What sets hosts apart, without and with H2T, by a label that says who is compared.

    `against` names for each host the one it is compared with; None: every other host with the first.
    """
    by_name = {r.name: r for r in results}
    against = against or {r.name: results[0].name for r in results[1:]}
    lines = []
    for after, before in against.items():
        for row in ("without_h2t", "with_h2t"):
            found = between_hosts(by_name[after], by_name[before], row)
            if found and any(found.values()):
                lines.append((f"{after} minus {before}, {ROWS[row]}", found))
    return lines


@dataclass(frozen=True)
class Variant:
    """Heads of another donor or another choice of channels, and what they change against the usual ones, by figure."""

    donor: str
    selection: str
    heads: pd.DataFrame
    apart: Mapping[str, Difference | None]


def variants_at(result: HostResult, ratio: float) -> list[Variant]:
    """The variants at `ratio`, each against donor instance, selection random at the same ratio, paired by seed."""
    usual = result.at(ratio)
    found = []
    for r, donor, selection in variants(result):
        if r == ratio:
            heads = result.at(r, donor, selection)
            found.append(Variant(donor, selection, heads, {f: difference(heads, usual, f) for f in FIGURES}))
    return found


def mean_and_std(heads: pd.DataFrame, figure: str) -> tuple[float | None, float | None]:
    """Over the seeds in `heads`; None for what cannot exist."""
    values = heads[figure].dropna()
    mean = float(values.mean()) if len(values) else None
    return mean, float(values.std(ddof=1)) if len(values) > 1 else None


def ratio_curve(result: HostResult) -> pd.DataFrame:
    """Mean and std over seeds at each ratio (donor instance, selection random, test split)."""
    lines = [
        {
            "host": result.name,
            "group": g,
            "ratio": r,
            "accuracy": mean_and_std(result.at(r), g)[0],
            "std": mean_and_std(result.at(r), g)[1],
        }
        for g in ("top1", *GROUPS)
        for r in result.ratios
    ]
    return pd.DataFrame(lines, columns=["host", "group", "ratio", "accuracy", "std"]).astype(
        {"ratio": float, "accuracy": float, "std": float}
    )


def class_accuracy(result: HostResult, numbers: Sequence[int]) -> pd.DataFrame:
    """class, count and accuracy on the test split, the mean over the heads `numbers`."""
    table = result.tables["per_class"]
    statistics = "stage1" if list(numbers) == [-1] else result.statistics
    table = table[(table.split == "test") & (table.statistics == statistics) & table.number.isin(list(numbers))]
    return table.groupby("class").agg({"count": "first", "accuracy": "mean"}).reset_index()


def per_class(result: HostResult) -> pd.DataFrame:
    """Accuracy of each class: stage I, without and with H2T, mean over seeds."""
    parts = [
        class_accuracy(result, result.numbers(row)).assign(row=label, host=result.name)
        for row, label in ROWS.items()
        if result.metrics[row] is not None
    ]
    return pd.concat(parts, ignore_index=True)[["host", "row", "class", "count", "accuracy"]]
