"""Renders the report as one self-contained HTML page. Every string that comes from data is escaped."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import GROUPS
from h2t.pipeline.reporting.chosen import choices
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
MOST_CLASSES = 100  # more classes are shown as this many runs of neighbours, in the order of training counts
NAMED = 10  # where runs of neighbours are shown, this many classes that gain most, and that lose most, are named


def render(
    title: str,
    results: Sequence[HostResult],
    runs: Sequence[Mapping[str, Any]] = (),
    against: Mapping[str, str] | None = None,
) -> str:
    """The page as HTML text.

    `runs` are run records (time, machine, rates); no other part of a report may depend on them. `against` names the
    host that each host is compared with (`results.hosts_apart`).
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(cell=cell, counted=counted, number=_number, size=_size, duration=_duration, times=_times)
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
        groups=list(dict.fromkeys(_groups(r) for r in results)),
        seeds=_seeds(results),
        neighbours=_neighbours(results),
        choices=choices(results),
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
    """One figure of an entry of metrics.json as mean ± std; a dash if there is no entry."""
    return "–" if entry is None else spread(entry[figure], entry[f"{figure}_std"])


def spread(mean: float | None, std: float | None) -> str:
    """Mean ± std as text; a dash if there is no mean."""
    return "–" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")


def _number(value: Any) -> str:
    """A number as text, with thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _size(count: float) -> str:
    """Bytes as text, in a suitable unit."""
    return next(
        f"{count / 10**p:.3g} {u}"
        for p, u in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "bytes"))
        if count >= 10**p or not p
    )


def _duration(seconds: float | None) -> str:
    """Seconds as text, in a suitable unit; a dash for None."""
    if seconds is None:
        return "–"
    length, unit = next((n, u) for n, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * n or n == 1)
    value = seconds / length
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def _times(ratio: float | None) -> str:
    """A ratio of two times as text; a dash for None."""
    return "–" if ratio is None else f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element, whatever class names contain."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data_set(result: HostResult) -> str:
    """A sentence on the data that the host was trained and tested on."""
    counts, about = result.about["counts"], result.about["cache"]
    test = next((n for split, _, n in about["rows_of"] if split == "test"), 0)
    name = about["provenance"].get("dataset")
    return (f"Data set {name}: " if name else "") + (
        f"{counted(len(counts), 'class', 'classes')}; {counted(sum(counts), 'training image')}, {max(counts):,} of the "
        f"most frequent class, {min(counts):,} of the rarest; {counted(test, 'test image')}"
    )


def _groups(result: HostResult) -> str:
    """A sentence that says which classes are head, medium and tail."""
    counts, group_of = result.about["counts"], result.about["groups"]
    parts = []
    for group in GROUPS:
        if members := [n for n, g in zip(counts, group_of, strict=True) if g == group]:
            images = f"{max(members):,} to {min(members):,}" if max(members) > min(members) else f"{members[0]:,}"
            parts.append(f"{group}: {counted(len(members), 'class', 'classes')} with {images} training images")
    return "Class groups by training images: " + ("; ".join(parts) or "none")


def _seeds(results: Sequence[HostResult]) -> str:
    """A sentence on the number of stage-II seeds behind the means."""
    entries = {r.name: r.metrics["without_h2t"] or r.metrics["with_h2t"] for r in results}
    numbers = {name: entry["heads"] if entry else 0 for name, entry in entries.items()}
    if len(set(numbers.values())) == 1:
        return f"Every host was trained with {counted(next(iter(numbers.values())), 'seed')}"
    return "Seeds: " + ", ".join(f"{name} {number}" for name, number in numbers.items())


def _neighbours(results: Sequence[HostResult]) -> str | None:
    """A sentence on how classes are drawn together if there are too many; None if each class is drawn by itself."""
    classes = max(len(r.about["counts"]) for r in results)
    if classes <= MOST_CLASSES:
        return None
    return f"{classes:,} classes are too many to draw: each position stands for {_run_lengths(classes)} of them"


def _run_lengths(classes: int) -> str:
    """How many classes one position stands for, as text."""
    least, more = divmod(classes, MOST_CLASSES)
    return f"{least} or {least + 1}" if more else f"{least}"


def _place(run: Mapping[str, Any]) -> tuple[str, str]:
    """Commit and machine of a run, as text."""
    machine = run["machine"]
    system = ", ".join(str(machine[k]) for k in ("processor", "system") if k in machine)
    cores = machine.get("cores")
    known = counted(cores, "core") if isinstance(cores, int) else "unknown number of cores"
    return str(run.get("commit") or "unknown"), f"{known}, {system or 'unknown system'}"


def host_data(result: HostResult) -> dict[str, Any]:
    """The data that the page's script draws for one host, with at most `MOST_CLASSES` positions on a class axis."""
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
    """Other donors and selections: figures, and differences from donor instance, random channels at the same ratio."""
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
    """Name, mean training count and group of each run of classes."""
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
    """The classes that H2T changes most, from the largest gain to the largest loss.

    Empty for a host that was not trained both with and without H2T.
    """
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
    """Test accuracy of each run of classes, the mean over the heads `numbers`."""
    return _over(class_accuracy(result, numbers).set_index("class").accuracy, runs)


def _over(values: "pd.Series[float]", runs: Sequence[np.ndarray]) -> list[float | None]:
    """The mean of `values` (by class) over each run of classes."""
    return _round([values.reindex(run).mean() for run in runs])


def _row(result: HostResult, row: str, runs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Confusion, calibration and weight norms of one row of metrics.json, averaged over its heads."""
    numbers = result.numbers(row)
    tables = {n: t[t.number.isin(numbers)] for n, t in result.tables.items() if "number" in t}
    place = np.concatenate([np.full(len(run), i) for i, run in enumerate(runs)])
    confusion = np.zeros((len(runs), len(runs)))
    pairs = tables["confusion"]
    np.add.at(confusion, (place[pairs.true.to_numpy()], place[pairs.predicted.to_numpy()]), pairs["count"].to_numpy())
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
    """The embedded test samples: positions, labels, predictions, and the names and groups of their classes."""
    table = result.tables["embedding"]
    labels = sorted({int(v) for c in ("label", "without_h2t", "with_h2t") for v in table[c].dropna()})
    return {
        "names": {label: result.about["classes"][label] for label in labels},
        "groups": {label: result.about["groups"][label] for label in labels},
        **{c: _round(table[c]) for c in ("x", "y")},
        **{c: [None if pd.isna(v) else int(v) for v in table[c]] for c in ("label", "without_h2t", "with_h2t")},
    }


def _round(values: Any, digits: int = 3) -> list[float | None]:
    """Values rounded for the page; None for missing ones."""
    return [None if v is None or math.isnan(v) else round(float(v), digits) for v in values]
