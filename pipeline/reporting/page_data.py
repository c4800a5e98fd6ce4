"""The data that the page's script draws, one object per host."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from h2t.pipeline.reporting.results import (
    FIGURES,
    ROWS,
    HostResult,
    against_zero,
    class_accuracy,
    mean_and_std,
    variants_at,
)

MOST_CLASSES = 100  # more classes are shown as this many runs of neighbours, in the order of training counts
PAIRS = 8  # most confused pairs of classes that are offered
NAMED = 10  # where runs of neighbours are shown, this many classes that gain most, and that lose most, are named


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
        "rows": {row: _row(result, row, runs) for row in ROWS if result.metrics[row] is not None},
        "embedding": _embedding(result),
        "pairs": _pairs(result),
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
    known = np.split(
        values.reindex(np.concatenate(runs)).to_numpy(np.float64), np.cumsum([len(run) for run in runs])[:-1]
    )
    return _round([np.nansum(run) / n if (n := np.count_nonzero(~np.isnan(run))) else None for run in known])


def _row(result: HostResult, row: str, runs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Confusion, calibration and weight norms of one row of metrics.json, averaged over its heads."""
    numbers = result.numbers(row)
    pairs, reliability, weights = (
        table[table.number.isin(numbers)]
        for table in (result.tables[name] for name in ("confusion", "reliability", "weight_norms"))
    )
    place = np.concatenate([np.full(len(run), i) for i, run in enumerate(runs)])
    confusion = np.zeros((len(runs), len(runs)))
    np.add.at(confusion, (place[pairs.true.to_numpy()], place[pairs.predicted.to_numpy()]), pairs["count"].to_numpy())
    bins = []
    of_bin, counts = reliability.bin.to_numpy(), reliability["count"].to_numpy()
    shares = {k: reliability[k].fillna(0).to_numpy() * counts for k in ("confidence", "accuracy")}
    for number in np.unique(of_bin):
        if count := int(counts[of_bin == number].sum()):
            mean = {k: round(float(v[of_bin == number].sum() / count), 2) for k, v in shares.items()}
            bins.append({"count": count, **mean})
    norms = weights.groupby("class").norm.mean()
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


def _pairs(result: HostResult) -> list[dict[str, Any]]:
    """The pairs of embedded classes that are confused most, both ways together, as means over the heads of each row."""
    labels = sorted({int(v) for v in result.tables["embedding"].label})
    counts: dict[str, dict[tuple[int, int], float]] = {}
    samples: dict[int, float] = {}
    for row, name in (("without_h2t", "without"), ("with_h2t", "with")):
        numbers = result.numbers(row)
        table = result.tables["confusion"]
        table = table[table.number.isin(numbers)]
        if not numbers or table.empty:
            continue
        samples = (table.groupby("true")["count"].sum() / len(numbers)).to_dict()
        wrong = table[(table.true != table.predicted) & table.true.isin(labels) & table.predicted.isin(labels)]
        found = counts.setdefault(name, {})
        for true, predicted, count in zip(wrong.true, wrong.predicted, wrong["count"], strict=True):
            pair = (min(true, predicted), max(true, predicted))
            found[pair] = found.get(pair, 0.0) + count / len(numbers)
    most = sorted(
        {p for found in counts.values() for p in found}, key=lambda p: -sum(f.get(p, 0.0) for f in counts.values())
    )
    return [
        {
            "classes": [int(c) for c in pair],
            "samples": round(sum(samples.get(c, 0.0) for c in pair)),
            **{name: round(found.get(pair, 0.0), 2) for name, found in counts.items()},
        }
        for pair in most[:PAIRS]
    ]


def _round(values: Any, digits: int = 3) -> list[float | None]:
    """Values rounded for the page; None for missing ones."""
    return [None if v is None or math.isnan(v) else round(float(v), digits) for v in values]
