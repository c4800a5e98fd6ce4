"""The report as one self-contained page. Every string that comes from data is escaped."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from h2t.pipeline.reporting.published import estimates
from h2t.pipeline.reporting.results import (
    FIGURES,
    ROWS,
    HostResult,
    against_zero,
    class_accuracy,
    hosts_apart,
    mean_and_std,
    variants_at,
    with_against_without,
)

TEMPLATES = Path(__file__).parent / "templates"
VENDOR = ("d3.min.js", "plot.umd.min.js")
MOST_CLASSES = 100  # more are shown as this many runs of neighbours in the order of training counts
NAMED = 10  # classes that gain most and as many that lose most are told by name where runs of neighbours are shown


def render(
    title: str,
    results: Sequence[HostResult],
    runs: Sequence[Mapping[str, Any]] = (),
    against: Mapping[str, str] | None = None,
) -> str:
    """The page. `runs` are run records (time, machine, rates), which no other part of a report may depend on.

    `against`: whom hosts are compared with (`results.hosts_apart`).
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(cell=cell, number=_number, size=_size, duration=_duration, times=_times)
    scripts = [(TEMPLATES / "vendor" / name).read_text(encoding="utf-8") for name in VENDOR]
    scripts.append((TEMPLATES / "report.js").read_text(encoding="utf-8"))
    return environment.get_template("report.html").render(
        title=title,
        results=results,
        rows=ROWS,
        figures=list(FIGURES),
        changes={r.name: d for r in results if (d := with_against_without(r))},
        hosts_apart=hosts_apart(results, against),
        side_by_side=against is not None,
        data_sets=list(dict.fromkeys(_data_set(r) for r in results)),
        neighbours=_neighbours(results),
        variants=any(variants_at(r, ratio) for r in results for ratio in r.ratios),
        runs=runs,
        places=list(dict.fromkeys(_place(run) for run in runs)),
        place_of=_place,
        estimates=estimates(results, runs),
        data=_json({"hosts": {r.name: host_data(r) for r in results}, "rows": ROWS}),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
    )


def cell(entry: Mapping[str, Any] | None, figure: str) -> str:
    """A figure of an entry of metrics.json as mean ± std."""
    return "–" if entry is None else spread(entry[figure], entry[f"{figure}_std"])


def spread(mean: float | None, std: float | None) -> str:
    """Mean ± std; a dash for what cannot exist."""
    return "–" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _size(count: float) -> str:
    return next(
        f"{count / 10**p:.3g} {u}"
        for p, u in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "bytes"))
        if count >= 10**p or not p
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    length, unit = next((n, u) for n, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * n or n == 1)
    value = seconds / length
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _json(value: Any) -> Markup:
    """JSON that can stand inside a script element, whatever class names hold."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data_set(result: HostResult) -> str:
    """What the host was trained and tested on, in words."""
    counts, about = result.about["counts"], result.about["cache"]
    test = next((n for split, _, n in about["rows_of"] if split == "test"), 0)
    name = about["provenance"].get("dataset")
    return (f"Data set {name}: " if name else "") + (
        f"{len(counts):,} classes; {sum(counts):,} training images, {max(counts):,} of the most frequent class, "
        f"{min(counts):,} of the rarest; {test:,} test images"
    )


def _neighbours(results: Sequence[HostResult]) -> str | None:
    """How classes are drawn together where they are too many; None if every class has a place of its own."""
    classes = max(len(r.about["counts"]) for r in results)
    if classes <= MOST_CLASSES:
        return None
    return f"{classes:,} classes are too many to draw: a place stands for {_run_lengths(classes)} of them"


def _run_lengths(classes: int) -> str:
    least, more = divmod(classes, MOST_CLASSES)
    return f"{least} or {least + 1}" if more else f"{least}"


def _place(run: Mapping[str, Any]) -> tuple[str, str]:
    """Commit and machine of a run, in words."""
    machine = run["machine"]
    system = ", ".join(str(machine[k]) for k in ("processor", "system") if k in machine)
    return str(run.get("commit") or "unknown"), f"{machine.get('cores', '?')} cores, {system or 'unknown'}"


def host_data(result: HostResult) -> dict[str, Any]:
    """What the page's script draws for one host; at most `MOST_CLASSES` places along any axis of classes."""
    runs = np.array_split(np.arange(len(result.about["counts"])), min(len(result.about["counts"]), MOST_CLASSES))
    curve = {f: [mean_and_std(result.at(r), f) for r in result.ratios] for f in FIGURES}
    apart = [against_zero(result, r) for r in result.ratios]
    return {
        "ratios": result.ratios,
        "reported": (result.metrics["with_h2t"] or {}).get("ratio"),
        "mean": {f: _round([m for m, _ in pairs]) for f, pairs in curve.items()},
        "std": {f: _round([s for _, s in pairs]) for f, pairs in curve.items()},
        "difference": {
            f: [d.as_dict() if r and d else None for r, d in zip(result.ratios, (a[f] for a in apart), strict=True)]
            for f in FIGURES
        },
        "variants": _variants(result),
        "classes": _classes(result, runs),
        "changed": _changed(result) if len(result.about["counts"]) > MOST_CLASSES else None,
        "accuracy": [_accuracy(result, [int(n) for n in result.at(r).number], runs) for r in result.ratios],
        "rows": {row: _row(result, row, runs) for row, entry in result.metrics.items() if entry is not None},
        "embedding": _embedding(result),
    }


def _variants(result: HostResult) -> list[dict[str, Any]]:
    """Other donors and choices of channels: figures, and differences from the usual ones of the same ratio."""
    return [
        {
            "at": at,
            "name": f"{v.donor}, {v.selection}",
            "mean": {f: mean_and_std(v.heads, f)[0] for f in FIGURES},
            "std": {f: mean_and_std(v.heads, f)[1] for f in FIGURES},
            "difference": {f: d.as_dict() if d else None for f, d in v.apart.items()},
        }
        for at, ratio in enumerate(result.ratios)
        for v in variants_at(result, ratio)
    ]


def _classes(result: HostResult, runs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    about = result.about
    single = len(runs) == len(about["counts"])
    return [
        {
            "name": about["classes"][run[0]] if single else f"{run[0]} to {run[-1]}",
            "count": float(np.mean([about["counts"][c] for c in run])),
            "group": about["groups"][run[0]],
        }
        for run in runs
    ]


def _changed(result: HostResult) -> list[dict[str, Any]]:
    """The classes that H2T changes most, from the largest gain to the largest loss; empty for a host without both."""
    if result.metrics["without_h2t"] is None or result.metrics["with_h2t"] is None:
        return []
    tables = [class_accuracy(result, result.numbers(row)).set_index("class") for row in ("without_h2t", "with_h2t")]
    before, after = (table.accuracy for table in tables)
    apart = (after - before).dropna().sort_values(ascending=False, kind="stable")
    ends = [*apart[apart > 0].index[:NAMED], *apart[apart < 0].index[-NAMED:]]
    about = result.about
    return [
        {
            "name": about["classes"][c],
            "count": about["counts"][c],
            "group": about["groups"][c],
            "without": round(float(before[c]), 4),
            "with": round(float(after[c]), 4),
        }
        for c in ends
    ]


def _accuracy(result: HostResult, numbers: Sequence[int], runs: Sequence[np.ndarray]) -> list[float | None]:
    return _over(class_accuracy(result, numbers).set_index("class").accuracy, runs)


def _over(values: "pd.Series[float]", runs: Sequence[np.ndarray]) -> list[float | None]:
    return _round([values.reindex(run).mean() for run in runs])


def _row(result: HostResult, row: str, runs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Confusion, calibration and weight norms of one line of metrics.json, over its heads."""
    numbers = result.numbers(row)
    tables = {n: t[t.number.isin(numbers)] for n, t in result.tables.items() if "number" in t}
    place = np.concatenate([np.full(len(run), i) for i, run in enumerate(runs)])
    confusion = np.zeros((len(runs), len(runs)))
    found = tables["confusion"]
    np.add.at(confusion, (place[found.true.to_numpy()], place[found.predicted.to_numpy()]), found["count"].to_numpy())
    bins = []
    for _, group in tables["reliability"].groupby("bin"):
        count = group["count"].sum()
        if count:
            mean = {k: float((group[k].fillna(0) * group["count"]).sum() / count) for k in ("confidence", "accuracy")}
            bins.append({"count": int(count), **{k: round(v, 2) for k, v in mean.items()}})
    norms = tables["weight_norms"].groupby("class").norm.mean()
    return {
        "accuracy": _accuracy(result, numbers, runs),
        "confusion": (confusion / len(numbers)).round(2).tolist(),
        "reliability": bins,
        "norms": _over(norms, runs) if len(norms) else None,
        "ratio": result.metrics[row]["ratio"],
    }


def _embedding(result: HostResult) -> dict[str, Any]:
    table = result.tables["embedding"]
    labels = sorted({int(v) for c in ("label", "without_h2t", "with_h2t") for v in table[c].dropna()})
    return {
        "names": {label: result.about["classes"][label] for label in labels},
        "groups": {label: result.about["groups"][label] for label in labels},
        **{c: _round(table[c]) for c in ("x", "y")},
        **{c: [None if pd.isna(v) else int(v) for v in table[c]] for c in ("label", "without_h2t", "with_h2t")},
    }


def _round(values: Any, digits: int = 3) -> list[float | None]:
    """Short numbers for the page, None for what is missing."""
    return [None if v is None or math.isnan(v) else round(float(v), digits) for v in values]
