"""Writes the files of a report: the page, the tables in Markdown and the data behind the plots."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from h2t.cache.redaction import in_markdown
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.text import counted, markdown
from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting import paper
from h2t.pipeline.reporting.answer import Answer
from h2t.pipeline.reporting.chosen import choices
from h2t.pipeline.reporting.page import cell, render, spread
from h2t.pipeline.reporting.results import (
    FIGURES,
    ROWS,
    HostResult,
    as_published,
    figures_of,
    mean_and_std,
    per_class,
    ratio_curve,
    variants_at,
    with_against_without,
)
from h2t.pipeline.reporting.sides import Side, sentence


def write(title: str, answer: Answer, out: Path, sides: Sequence[Side] = ()) -> None:
    """Writes a complete report into the directory `out`.

    Only the page shows the run records of `answer`. With `sides`, page and table begin with A against B.
    """
    results, untimed = answer.results, replace(answer, runs=())
    curves = pd.concat([ratio_curve(r) for r in results], ignore_index=True)
    with fresh_directory(out) as into:
        (into / "results.md").write_text(_document(title, untimed, sides), encoding="utf-8")
        (into / "index.html").write_text(render(title, answer, sides), encoding="utf-8")
        _csv(paper.table(results), into / "results.csv")
        (into / "results.tex").write_text(paper.latex(results, answer.certainty()), encoding="utf-8")
        write_json(into / "metrics.json", {r.name: r.metrics for r in results})
        write_json(into / "summary.json", answer.summary())
        plots = into / "plots"
        plots.mkdir()
        _csv(curves, plots / "ratio.csv")
        _csv(pd.concat([per_class(r) for r in results], ignore_index=True), plots / "per_class.csv")


def text_of(apart: Difference | None) -> str:
    """A difference as text; a dash if there is none."""
    return apart.text if apart else "–"


def run_records(folder: Path) -> list[dict[str, Any]]:
    """The run records in `folder`, in the order of the stages. Raises UserError for a file that is no run record."""
    order = ("prepare", "train_backbone", "extract", "pool", "train_classifier", "evaluate", "report")
    records = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            facts = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError, RecursionError) as error:
            raise UserError(f"{path}: not a run record ({error}); remove it") from None
        records.append({"seconds": None, "machine": {}, **facts, "stage": path.parent.name, "name": path.stem})
    return sorted(records, key=lambda r: order.index(r["stage"]) if r["stage"] in order else len(order))


def markdown_table(results: list[HostResult]) -> str:
    """The Markdown table of results: for each host, a row for stage I, without H2T and with H2T."""
    figures, lines = figures_of(results), []
    for result in results:
        for key, label in ROWS.items():
            entry = result.metrics[key]
            ratio = "–" if entry is None or entry["ratio"] is None else f"{entry['ratio']:g}"
            lines.append([in_markdown(result.name), label, ratio, *(cell(entry, f) for f in figures)])
    return markdown(["host", "classifier", "ratio", *figures], lines)


def difference_table(results: list[HostResult]) -> str:
    """The Markdown table of differences with H2T minus without, one row per host, paired by seed."""
    figures = figures_of(results)
    lines = [
        [in_markdown(result.name), *(text_of(apart.get(f)) for f in figures)]
        for result in results
        if (apart := with_against_without(result))
    ]
    return markdown(["host", *figures], lines) if lines else "No host was trained both with and without H2T."


def variants_table(results: list[HostResult]) -> str | None:
    """The Markdown table of other donors and channels at the reported ratio; None if there are none."""
    lines = []
    for result in results:
        entry = result.metrics["with_h2t"]
        for v in variants_at(result, entry["ratio"]) if entry else ():
            cells = [spread(*mean_and_std(v.heads, f)) for f in FIGURES]
            label = [result.name, v.donor, v.selection, f"{entry['ratio']:g}"]
            lines.append([*label, *cells, text_of(v.apart["top1"])])
    header = ["host", "donor", "channels", "ratio", *FIGURES, "top1 against instance, random"]
    return markdown(header, lines) if lines else None


def _document(title: str, answer: Answer, sides: Sequence[Side]) -> str:
    """The text of results.md: A against B if there are `sides`, the answer, an overview, then all figures."""
    results = list(answer.results)
    notes, others = [], variants_table(results)
    for result in results:
        first = next((e for row in ROWS if (e := result.metrics[row]) is not None), {"groups": "none"})
        heads = result.metrics["without_h2t"] or result.metrics["with_h2t"]
        seeds = heads["heads"] // result.trainings if heads else 0
        several = f" in each of {result.trainings} replicates" if result.trainings > 1 else ""
        name = in_markdown(result.name)
        notes.append(
            f"- {name}: {counted(seeds, 'seed')} of stage II{several}; groups `{in_markdown(str(first['groups']))}`."
        )
        if published := as_published(result):
            figures = ", ".join(f"{f} {v:.2f}" for f, (v, _) in published.items() if v is not None)
            notes.append(
                f"- {name}, without H2T, evaluated under `balanced` statistics as the published code does: {figures}."
            )
    replicated = max(result.trainings for result in results) > 1
    over = " and the test images (paired by both; not over backbones)"
    if replicated:
        over = ", the test images and the trainings of the backbone (paired by all)"
    return "\n".join(
        [
            f"# {in_markdown(title)}",
            "",
            *([f"- {sentence(sides)}"] if sides else []),
            *(f"- {in_markdown(line)}" for line in answer.lines()),
            "",
            *answer.overview(),
            "",
            "## All figures",
            "",
            markdown_table(results),
            "",
            "Percent; mean ± standard deviation over the seeds of stage II"
            + (" of all replicates. " if replicated else " (it says nothing about other backbones). ")
            + "Last epoch; no ratio or constant is chosen on the test split.",
            "",
            f"With H2T minus without, in percentage points, with the 95 % interval over the seeds of stage II{over}. "
            "If the interval contains 0, or the predictions differ on fewer than 5 images, the difference is too close "
            "to tell:",
            "",
            difference_table(results),
            "",
            *(["Other donors and other channels at the reported ratio:", "", others, ""] if others else []),
            *notes,
            *(f"- {in_markdown(line)}." for line in choices(results)),
            "",
        ]
    )


def _csv(table: pd.DataFrame, path: Path) -> None:
    """Writes a table as CSV with four decimals."""
    table.to_csv(path, index=False, float_format="%.4f", lineterminator="\n")
