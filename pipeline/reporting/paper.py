"""The results for a paper: a table of all classifiers as data (results.csv) and as LaTeX (results.tex)."""

from collections.abc import Iterator, Sequence

import pandas as pd

from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting.results import ROWS, HostResult, figures_of, with_against_without

PRINTED = {"top1": "top-1", "head": "head", "medium": "medium", "tail": "tail"}  # the columns in LaTeX
NOTHING, MINUS = "–", "\N{MINUS SIGN}"


def table(results: Sequence[HostResult]) -> pd.DataFrame:
    """A line for each classifier: method, classifier, ratio, heads (how many are averaged), figures in percent.

    For each figure F: F and F_sd, and beside `with H2T` F_change, F_low, F_high and F_verdict: the difference from
    `without H2T` in percentage points, with its 95 % interval.
    """
    lines, shown = [], figures_of(results)
    for result in results:
        apart = with_against_without(result) or {}
        for row, label in ROWS.items():
            if (entry := result.metrics[row]) is None:
                continue
            line = {"method": result.name, "classifier": label, "ratio": entry["ratio"], "heads": entry["heads"]}
            for f in shown:
                line |= {f: entry[f], f"{f}_sd": entry[f"{f}_std"]}
                if row == "with_h2t" and (change := apart.get(f)):
                    line |= {f"{f}_change": change.mean, f"{f}_low": change.low, f"{f}_high": change.high}
                    line[f"{f}_verdict"] = change.verdict
            lines.append(line)
    changes = [f"{f}_{part}" for f in shown for part in ("change", "low", "high", "verdict")]
    figures = [name for f in shown for name in (f, f"{f}_sd")]
    return pd.DataFrame(lines, columns=["method", "classifier", "ratio", "heads", *figures, *changes])


def latex(results: Sequence[HostResult], covers: str) -> str:
    """A `tabular` for the package booktabs; `covers` says what the intervals cover, for the comment above it."""
    columns = ["method", "classifier", "ratio", *PRINTED.values()]
    lines = pd.DataFrame([line for result in results for line in _lines(result)], columns=columns)
    about = [
        r"% Needs \usepackage{booktabs}, and LaTeX of 2020 or later for the signs.",
        "% Test accuracy in percent, mean ± standard deviation over the seeds.",
        "% Difference: with H2T minus without, in percentage points, and its 95 % interval.",
        f"% {covers}",
    ]
    body = lines.to_latex(index=False, escape=True, column_format="llr" + "r" * len(PRINTED))
    return "\n".join([*about, body.replace(MINUS, "$-$")])  # pdfLaTeX leaves the sign out, so -2.8 would become 2.8


def _lines(result: HostResult) -> Iterator[list[str]]:
    """The lines of one method: its classifiers, then what H2T changes."""
    for row, label in ROWS.items():
        if (entry := result.metrics[row]) is not None:
            ratio = NOTHING if entry["ratio"] is None else f"{entry['ratio']:g}"
            yield [result.name, label, ratio, *(_mean(entry[f], entry[f"{f}_std"]) for f in PRINTED)]
    if apart := with_against_without(result):
        yield [result.name, "difference", "", *(_change(apart[f]) for f in PRINTED)]


def _mean(mean: float | None, deviation: float | None) -> str:
    return NOTHING if mean is None else f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _change(change: Difference | None) -> str:
    return NOTHING if change is None else f"{change.mean:+.1f} {change.interval(1)}".rstrip().replace("-", MINUS)
