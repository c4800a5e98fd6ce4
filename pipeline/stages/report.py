"""report: tables and pictures of every host, from what evaluate wrote.

Writes `results.md` (the table), `index.html` (self-contained: tables and pictures), `metrics.json` (that of every host,
for `dvc metrics show`) and `plots/*.csv`, the data behind `dvc plots show`. Only hosts named in the parameters are read; leftovers of earlier runs are named and left out.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.classes import GROUPS
from pipeline.errors import UserError
from pipeline.figures import per_class_picture, ratio_picture
from pipeline.outputs import fresh_directory, write_json
from pipeline.page import page
from pipeline.params import Section

FIGURES = ("top1", *GROUPS, "ece")
ROWS = {"stage1": "stage I", "without_h2t": "without H2T", "with_h2t": "with H2T"}


class Params(Section):
    """Section `report`."""

    title: str = "Long-tailed recognition on cached features"


@dataclass(frozen=True)
class HostResult:
    """What evaluate wrote for one host."""

    name: str
    metrics: Mapping[str, Any]
    heads: pd.DataFrame
    per_class: pd.DataFrame


def run(params: Params, hosts: list[str], evaluate_dir: Path, out: Path, say: Callable[[str], None]) -> None:
    """Reports on `hosts` into the directory `out`."""
    results = [_load(name, evaluate_dir) for name in hosts]
    leftovers = sorted(p.name for p in evaluate_dir.iterdir() if p.is_dir() and p.name not in hosts)
    if leftovers:
        say(f"note: {', '.join(leftovers)}: not among the hosts of the parameters, left out")
    curves = pd.concat([_ratio_curve(r) for r in results], ignore_index=True)
    classes = pd.concat([_per_class(r) for r in results], ignore_index=True)
    table = markdown_table(results)
    with fresh_directory(out) as into:
        (into / "results.md").write_text(_document(params, results, table), encoding="utf-8")
        pictures = {
            "Accuracy against the ratio of replaced channels": ratio_picture(curves),
            "Accuracy of each class against its training count": per_class_picture(classes),
        }
        (into / "index.html").write_text(page(params.title, results, ROWS, FIGURES, pictures), encoding="utf-8")
        (into / "ratio.svg").write_text(ratio_picture(curves), encoding="utf-8")
        write_json(into / "metrics.json", {r.name: r.metrics for r in results})
        plots = into / "plots"
        plots.mkdir()
        _csv(curves, plots / "ratio.csv")
        _csv(classes, plots / "per_class.csv")
    say(table)


def _load(name: str, evaluate_dir: Path) -> HostResult:
    folder = evaluate_dir / name
    try:
        return HostResult(
            name,
            json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
            pd.read_parquet(folder / "heads.parquet"),
            pd.read_parquet(folder / "per_class.parquet"),
        )
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: host {name!r} has not been evaluated; run h2t evaluate {name}") from None


def cell(entry: Mapping[str, Any] | None, figure: str) -> str:
    """A figure as mean ± std; a dash for what cannot exist."""
    if entry is None or entry[figure] is None:
        return "–"
    spread = entry[f"{figure}_std"]
    return f"{entry[figure]:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def markdown_table(results: list[HostResult]) -> str:
    """Hosts x (stage I, without, with) x figures."""
    lines = [
        "| host | head | ratio | " + " | ".join(FIGURES) + " |",
        "| --- | --- | --- |" + " --- |" * len(FIGURES),
    ]
    for result in results:
        for key, label in ROWS.items():
            entry = result.metrics[key]
            ratio = "–" if entry is None or entry["ratio"] is None else f"{entry['ratio']:g}"
            lines.append(f"| {result.name} | {label} | {ratio} | " + " | ".join(cell(entry, f) for f in FIGURES) + " |")
    return "\n".join(lines)


def _document(params: Params, results: list[HostResult], table: str) -> str:
    notes = []
    for result in results:
        first = next(e for e in result.metrics.values() if e is not None)
        heads = result.metrics["without_h2t"] or result.metrics["with_h2t"]
        seeds = heads["heads"] if heads else 0
        notes.append(f"- {result.name}: {seeds} head seeds; groups `{first['groups']}`.")
        extra = _published(result)
        if extra:
            notes.append(f"- {result.name}, {extra}")
    return "\n".join(
        [
            f"# {params.title}",
            "",
            table,
            "",
            "Percent; mean ± standard deviation over head seeds (it says nothing about other backbones). Last epoch; "
            "nothing is chosen on the test split.",
            "",
            *notes,
            "",
            "![Accuracy against the ratio of replaced channels](ratio.svg)",
            "",
        ]
    )


def _published(result: HostResult) -> str | None:
    """DR as published sees balanced batches only, in training and at evaluation: the ratio-0 heads under `balanced`."""
    heads = result.heads
    rows = heads[(heads.split == "test") & (heads.statistics == "balanced") & (heads.ratio == 0)]
    own = result.metrics["without_h2t"]
    if own is None or own["statistics"] == "balanced" or not len(rows):
        return None
    rows = rows.drop_duplicates("seed")
    figures = ", ".join(f"{f} {rows[f].mean():.2f}" for f in FIGURES if rows[f].notna().all())
    return f"without H2T, evaluated under `balanced` statistics as the published code does: {figures}."


def _ratio_curve(result: HostResult) -> pd.DataFrame:
    """Mean and std over seeds at each ratio (donor instance, selection random, test split)."""
    heads = result.heads
    own = result.metrics["without_h2t"] or result.metrics["with_h2t"]
    statistics = own["statistics"] if own else None
    chosen = heads[(heads.split == "test") & (heads.statistics == statistics) & (heads.number >= 0)]
    chosen = chosen[(chosen.donor == "instance") & (chosen.selection == "random")]
    parts = []
    for group in ("top1", *GROUPS):
        grouped = chosen.groupby("ratio")[group]
        found = pd.DataFrame({"accuracy": grouped.mean(), "std": grouped.std(ddof=1)}).reset_index()
        parts.append(found.assign(group=group, host=result.name))
    return pd.concat(parts, ignore_index=True)[["host", "group", "ratio", "accuracy", "std"]]


def _per_class(result: HostResult) -> pd.DataFrame:
    """Accuracy of each class: stage I, without and with H2T, mean over seeds."""
    heads = result.heads
    parts = []
    for key, label in ROWS.items():
        entry = result.metrics[key]
        if entry is None:
            continue
        chosen = heads[(heads.split == "test") & (heads.statistics == entry["statistics"])]
        if key == "stage1":
            numbers = [-1]
        else:
            same = chosen[(chosen.ratio == entry["ratio"]) & (chosen.number >= 0)]
            if key == "with_h2t":
                same = same[(same.donor == "instance") & (same.selection == "random")]
            numbers = same.drop_duplicates("seed").number.tolist()
        table = result.per_class
        table = table[(table.split == "test") & (table.statistics == entry["statistics"]) & table.number.isin(numbers)]
        found = table.groupby("class").agg({"count": "first", "accuracy": "mean"}).reset_index()
        parts.append(found.assign(row=label, host=result.name))
    return pd.concat(parts, ignore_index=True)[["host", "row", "class", "count", "accuracy"]]


def _csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.4f", lineterminator="\n")
