"""Figures of results as SVG text. Equal data gives equal text."""

import io
from collections.abc import Mapping

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from h2t.pipeline.evaluation.intervals import Difference

COLOURS = {"top1": "#222222", "head": "#2166ac", "medium": "#8a6d00", "tail": "#b2182b"}


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element without a date, so that its bytes can be compared."""
    with mpl.rc_context({"svg.hashsalt": "h2t", "svg.fonttype": "none"}):
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]


def ratio_picture(curves: pd.DataFrame) -> str:
    """Accuracy against the ratio: one panel per host, one line per class group, bands of ± 1 std over seeds.

    At most three panels are in a row.
    `curves` has the columns of `results.ratio_curve`.
    """
    hosts = list(dict.fromkeys(curves.host))
    columns = min(len(hosts), 3)
    lines = -(-len(hosts) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[len(hosts) :]:
        unused.set_visible(False)
    for host, axis in zip(hosts, axes, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_ylim(0, 102)
        axis.set_ylabel("test accuracy (%)")
        for group, colour in COLOURS.items():
            line = curves[(curves.host == host) & (curves.group == group)].sort_values("ratio")
            if line.accuracy.isna().all():
                continue
            axis.plot(line.ratio, line.accuracy, color=colour, marker="o", markersize=3, label=group)
            spread = line["std"].fillna(0)
            axis.fill_between(
                line.ratio, line.accuracy - spread, line.accuracy + spread, color=colour, alpha=0.15, linewidth=0
            )
        axis.set_title(host, loc="left")
        axis.set_xlabel("ratio of replaced channels")
        axis.legend(frameon=False, fontsize=8)
    return svg(figure)


def gain_picture(apart: Mapping[str, Mapping[str, Difference]]) -> str:
    """What statistics and fusion change in each figure, in points, with 95 % intervals.

    `apart`: step of `gain.STEPS` -> figure -> difference.
    """
    steps = {"statistics": "s", "fusion": "o", "both": "D"}
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axis = figure.subplots()
    for place, (step, marker) in enumerate(steps.items()):
        for line, (name, colour) in enumerate(COLOURS.items()):
            found = apart[step][name]
            low, high = (found.mean if end is None else end for end in (found.low, found.high))
            y = place + (line - 1.5) / 6
            axis.errorbar(
                found.mean, y, xerr=[[found.mean - low], [high - found.mean]], color=colour, marker=marker,
                markersize=5, capsize=3, label=name if place == 0 else None,
            )  # fmt: skip
    axis.axvline(0, color="#888888", linewidth=0.8)
    axis.set_yticks(range(len(steps)), ["batch-norm\nstatistics", "fusion", "both"])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_xlabel("change of test accuracy (percentage points)\n95 % intervals over seeds and test images")
    axis.legend(frameon=False, fontsize=8, loc="best")
    return svg(figure)
