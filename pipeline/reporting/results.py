"""Reads the results of evaluate and derives tables from them: curves over ratios, paired differences, variants."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from h2t.cache.redaction import one_line
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import some
from h2t.pipeline.data.classes import GROUPS
from h2t.pipeline.evaluation.intervals import FIGURES as FIGURES
from h2t.pipeline.evaluation.intervals import Difference, Pairs, over_replicates, paired
from h2t.pipeline.evaluation.metrics import AUROC, Answers

ROWS = {"stage1": "stage I", "without_h2t": "without H2T", "with_h2t": "with H2T"}
FEW = 10  # test images; the figure of a group with fewer says little
ABOUT = {"host", "classes", "counts", "groups", "cache"}
SINGLE = {-1}  # in place of seeds: stage I, and hosts fitted in closed form
TABLES = (
    "heads",
    "differences",
    "predictions",
    "per_class",
    "confusion",
    "reliability",
    "weight_norms",
    "embedding",
)


@dataclass(frozen=True)
class HostResult:
    """The results of one host: `metrics.json`, `about.json`, and the tables by name."""

    name: str
    metrics: Mapping[str, Any]
    about: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]

    @property
    def statistics(self) -> str:
        """The batch-norm statistics that the host is evaluated under."""
        return str(self.about["host"]["evaluate"])

    @cached_property
    def heads(self) -> pd.DataFrame:
        """The host's heads, with the constants that were chosen, and their test figures under its own statistics."""
        heads = self.every_head
        return heads[heads.tuned.astype(bool)] if "tuned" in heads else heads

    @cached_property
    def every_head(self) -> pd.DataFrame:
        """The same with heads whose constants were tried and not chosen."""
        heads = self.tables["heads"]
        return heads[(heads.split == "test") & (heads.statistics == self.statistics) & (heads.number >= 0)]

    @property
    def constants(self) -> list[str]:
        """Names of the constants in which heads differ from the host's settings; columns of `heads`."""
        return list(self.about["host"].get("constants", []))

    @cached_property
    def found(self) -> dict[tuple[Any, ...], pd.DataFrame]:
        """What `at` and `class_accuracy` have returned: a report asks for the same some hundred times."""
        return {}

    def at(self, ratio: float, donor: str = "instance", selection: str = "random") -> pd.DataFrame:
        """The heads of this setting, one per replicate and seed, ascending.

        At ratio 0, donor and selection have no effect.
        """
        setting = (ratio, donor, selection)
        if setting not in self.found:
            heads = self.heads[self.heads.ratio == ratio]
            by = [name for name in ("replicate", "seed") if name in heads]
            if ratio:
                heads = heads[(heads.donor == donor) & (heads.selection == selection)]
            self.found[setting] = heads.drop_duplicates(by).sort_values(by)
        return self.found[setting]

    @cached_property
    def ratios(self) -> list[float]:
        """The ratios that were trained with donor instance and selection random, ascending; 0 included if trained."""
        return [r for r in sorted(set(self.heads.ratio)) if len(self.at(r))]

    @cached_property
    def replicates(self) -> dict[int, int]:
        """The replicate of each head by its number, also of stage-I heads, whose numbers are below 0."""
        heads = self.tables["heads"]
        of = heads["replicate"] if "replicate" in heads else [0] * len(heads)
        return {-1: 0} | {int(n): int(r) for n, r in zip(heads.number, of, strict=True)}

    def numbers(self, row: str) -> list[int]:
        """The numbers of the heads behind `row` of metrics.json; those of stage-I heads are below 0."""
        if row == "stage1":
            return sorted((n for n in self.replicates if n < 0), reverse=True)
        entry = self.metrics[row]
        return [] if entry is None else [int(n) for n in self.at(entry["ratio"]).number]

    @property
    def trainings(self) -> int:
        """How often the backbone was trained: the number of replicates."""
        return len(set(self.replicates.values()))

    @cached_property
    def _stated(self) -> dict[tuple[float, str, str, str], dict[str, Difference]]:
        """The lines of `differences`: ratio, donor, selection and what is subtracted -> figure -> difference."""
        found: dict[tuple[float, str, str, str], dict[str, Difference]] = {}
        table = self.tables["differences"]
        for line in table.itertuples():
            verdict = None if pd.isna(line.verdict) else str(line.verdict)
            covers = tuple(str(source) for source in line.covers)
            known = "image_groups" in table and pd.notna(line.image_groups)
            groups = int(line.image_groups) if known else None
            found.setdefault((line.ratio, line.donor, line.selection, line.against), {})[str(line.figure)] = Difference(
                line.mean, line.low, line.high, verdict, covers, int(line.seeds), groups
            )
        return found

    def stated(self, ratio: float, donor: str, selection: str, against: str) -> dict[str, Difference | None]:
        """The differences of a setting from `against` that evaluate wrote, by figure."""
        return {**dict.fromkeys(FIGURES), **self._stated.get((ratio, donor, selection, against), {})}

    @cached_property
    def tested(self) -> list[int]:
        """The number of test images of each class; of several replicates, in the first."""
        table = self.tables["predictions"]
        labels = table.label[table.number == table.number.iloc[0]] if len(table) else table.label
        return [int(n) for n in np.bincount(labels.astype(int), minlength=len(self.about["counts"]))]

    def predictions(self, row: str) -> dict[int, "Predicted"]:
        """The predictions behind `row` of metrics.json by replicate.

        Stage I and hosts fitted in closed form have the one seed -1.
        """
        seeds = dict.fromkeys(self.numbers(row), -1)
        if row != "stage1" and self.about["host"]["seeded"]:
            heads = self.at(self.metrics[row]["ratio"])
            seeds = dict(zip(heads.number.astype(int), heads.seed.astype(int), strict=True))
        columns = {name: column.to_numpy() for name, column in self.tables["predictions"].items()}
        found: dict[int, Predicted] = {}
        for number, seed in seeds.items():
            lines = np.flatnonzero(columns["number"] == number)
            lines = lines[columns["sample"][lines].argsort()]
            part = {name: column[lines] for name, column in columns.items()}
            said = Answers(part["predicted"], part["confidence"].astype(np.float64), score=part.get("score"))
            first = Predicted({}, part["sample"], part["label"], part.get("image_group"))
            found.setdefault(self.replicates[number], first).said[seed] = said
        return found


@dataclass(frozen=True)
class Predicted:
    """Predictions by seed in one replicate, and numbers, labels and groups of its test images, (n,) each.

    `groups` is None where images do not come in groups.
    """

    said: dict[int, Answers]
    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None


def load_result(name: str, folder: Path) -> HostResult:
    """The results that evaluate wrote into `folder`. Raises UserError if they are missing or damaged."""
    try:
        texts = ((folder / f"{n}.json").read_text(encoding="utf-8") for n in ("metrics", "about"))
        metrics, about = (dict(json.loads(text)) for text in texts)
        lacks = (ROWS.keys() - metrics.keys()) | (ABOUT - about.keys())
        if lacks:
            raise ValueError(f"missing: {', '.join(sorted(lacks))}")
        return HostResult(name, metrics, about, {t: pd.read_parquet(folder / f"{t}.parquet") for t in TABLES})
    except FileNotFoundError as error:
        where = error.filename or folder  # pyarrow does not name the file
        raise UserError(f"{where}: host {name!r} has not been evaluated; run h2t evaluate {name}") from None
    except (ValueError, TypeError, OSError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{folder}: not what evaluate wrote ({error}); run h2t evaluate {name} again") from None


def _by_seed(heads: pd.DataFrame, figure: str) -> dict[int, float]:
    return {int(s): float(v) for s, v in zip(heads.seed, heads[figure], strict=True) if pd.notna(v)}


def difference(after: pd.DataFrame, before: pd.DataFrame, figure: str) -> Difference | None:
    """The difference of `figure` between two tables of heads, paired by seed; each has one head per seed."""
    return paired(_by_seed(after, figure), _by_seed(before, figure))


def against_zero(result: HostResult, ratio: float) -> dict[str, Difference | None]:
    """The differences of `ratio` minus ratio 0 of the same host, by figure, paired by seed (same batches)."""
    return result.stated(ratio, "instance", "random", "without_h2t")


def with_against_without(result: HostResult) -> dict[str, Difference | None] | None:
    """The differences with H2T, at the reported ratio, minus without; None for a host without H2T or ratio 0."""
    entry = result.metrics["with_h2t"]
    return against_zero(result, entry["ratio"]) if entry and len(result.at(0.0)) else None


def rows_apart(after: HostResult, row: str, before: HostResult, before_row: str) -> dict[str, Difference | None] | None:
    """The differences of `row` of one host minus `before_row` of another, by figure, paired by seed and test image.

    There is no verdict across two backbones that were trained once each: the intervals cannot cover how another
    training would have changed them. Replicates are paired, as they divide the data alike. On other test images there
    is no interval either. None if a row is missing, or no seed is on both sides.
    """
    if after.metrics[row] is None or before.metrics[before_row] is None:
        return None
    new, old = after.predictions(row), before.predictions(before_row)
    both = sorted(new.keys() & old.keys())
    for r in both:
        if not all(np.array_equal(getattr(new[r], key), getattr(old[r], key)) for key in ("images", "labels")):
            figures = [(f, after.metrics[row][f], before.metrics[before_row][f]) for f in FIGURES]
            return {f: None if None in (x, y) else Difference(x - y, None, None, None, (), 0) for f, x, y in figures}
    pairs, seeded = [], False
    for r in both:
        said, other, result = new[r].said, old[r].said, new[r]
        # A single classifier is compared with every seed of the other side.
        seeds = sorted(
            s for s in said.keys() | other.keys() if all(s in x or x.keys() == SINGLE for x in (said, other))
        )
        if not seeds:
            return None
        seeded |= set(seeds) != SINGLE
        left, right = ([x[-1 if x.keys() == SINGLE else s] for s in seeds] for x in (said, other))
        groups = old[r].groups if result.groups is None else result.groups
        pairs.append(Pairs(left, right, result.labels, result.images, groups))
    one_backbone = after.about["host"]["backbone"] == before.about["host"]["backbone"]
    return over_replicates(pairs, after.about["groups"], seeded, verdicts=one_backbone or len(pairs) > 1)


def figures_of(results: Sequence[HostResult]) -> tuple[str, ...]:
    """`FIGURES`, and `auroc` if the results are of two classes and none was evaluated before there was this figure."""
    entries = [entry for result in results for row in ROWS if (entry := result.metrics[row])]
    return (*FIGURES, AUROC) if all(AUROC in entry for entry in entries) else FIGURES


def few_tested(result: HostResult) -> str:
    """Groups with fewer than `FEW` test images, and classes with none, in words; empty if there are none."""
    few = []
    for group in GROUPS:
        numbers = [n for n, g in zip(result.tested, result.about["groups"], strict=True) if g == group]
        if numbers and sum(numbers) < FEW:
            few.append(f"{sum(numbers)} in {group} classes")
    none = [one_line(c) for c, n in zip(result.about["classes"], result.tested, strict=True) if not n]
    if none:
        few.append(f"none of {some(none, 4)}")
    return "; ".join(few)


def of_one_class(results: Sequence[HostResult], backbones: Mapping[str, str]) -> str:
    """The classifiers of `results` that call all test images the same class, in words; empty if there are none.

    Of several backbones, stage I's is named by `backbones`, the backbone of each host, or by the host.
    """
    several = len({result.about["host"]["backbone"] for result in results}) > 1
    found: list[str] = []
    for result in results:
        confusion = result.tables["confusion"]
        for row, label in ROWS.items():
            rows = confusion[confusion.number.isin(result.numbers(row))]
            if rows.true.nunique() > 1 and (rows.groupby("number").predicted.nunique() == 1).all():
                alone = row == "without_h2t" and result.metrics["with_h2t"] is None
                if row == "stage1":
                    own = backbones.get(result.name, f"the backbone of {result.name}")
                    found.append(f"{label} of {own}" if several else label)
                else:
                    found.append(result.name if alone else f"{result.name} {label}")
    named = some(list(dict.fromkeys(found)), 4)
    return f"One class for all test images, so not to be used: {named}." if found else ""


def as_published(result: HostResult) -> dict[str, tuple[float | None, float | None]] | None:
    """Mean and std over seeds, by figure, of the ratio-0 heads under `balanced` statistics; None if there are none.

    The published DR code sees only balanced batches, in training and at evaluation.
    """
    heads = result.tables["heads"]
    rows = heads[(heads.split == "test") & (heads.statistics == "balanced") & (heads.ratio == 0)]
    rows = rows[rows.number.isin(result.numbers("without_h2t"))]
    own = result.metrics["without_h2t"]
    if own is None or own["statistics"] == "balanced" or not len(rows):
        return None
    return {f: mean_and_std(rows, f) for f in FIGURES}


def against_first(results: Sequence[HostResult]) -> list[tuple[str, dict[str, Difference | None]]]:
    """The differences of each other host from the first, without and with H2T, each with a label that says so."""
    first = results[0]
    return [
        (f"{other.name} minus {first.name}, {ROWS[row]}", apart)
        for other in results[1:]
        for row in ("without_h2t", "with_h2t")
        if (apart := rows_apart(other, row, first, row)) and any(apart.values())
    ]


@dataclass(frozen=True)
class Variant:
    """Heads of another donor or selection, and their differences from donor instance, selection random, by figure."""

    donor: str
    selection: str
    heads: pd.DataFrame
    apart: Mapping[str, Difference | None]


def variants_at(result: HostResult, ratio: float) -> list[Variant]:
    """The variants at `ratio`, with their differences from donor instance, selection random, paired by seed; sorted."""
    heads = result.heads[result.heads.ratio == ratio]
    settings = set(zip(heads.donor, heads.selection, strict=True)) - {("instance", "random")} if ratio else set()
    return [Variant(*s, result.at(ratio, *s), result.stated(ratio, *s, "standard")) for s in sorted(settings)]


def mean_and_std(heads: pd.DataFrame, figure: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation (ddof 1) of `figure` over the seeds in `heads`; None for too few values."""
    values = heads[figure].to_numpy(np.float64)
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else None
    return mean, float(values.std(ddof=1)) if len(values) > 1 else None


def ratio_curve(result: HostResult) -> pd.DataFrame:
    """Test accuracy (mean and std over seeds) at each ratio, for all classes and each group.

    Columns: host, group, ratio, accuracy, std; for donor instance, selection random.
    """
    lines = [(result.name, g, r, *mean_and_std(result.at(r), g)) for g in ("top1", *GROUPS) for r in result.ratios]
    table = pd.DataFrame(lines, columns=["host", "group", "ratio", "accuracy", "std"])
    return table.astype({"ratio": float, "accuracy": float, "std": float})


def class_accuracy(result: HostResult, numbers: Sequence[int]) -> pd.DataFrame:
    """Columns class, count (training images) and accuracy (percent, test split, mean over the heads `numbers`)."""
    if (key := tuple(numbers)) not in result.found:
        table = result.tables["per_class"]
        statistics = "stage1" if all(number < 0 for number in numbers) else result.statistics
        table = table[table.number.isin(key) & (table.split == "test") & (table.statistics == statistics)]
        classes = table.groupby("class")
        each = pd.DataFrame({"count": classes["count"].first(), "accuracy": classes["accuracy"].mean()})
        result.found[key] = each.reset_index()
    return result.found[key]


def per_class(result: HostResult) -> pd.DataFrame:
    """Test accuracy of each class (mean over seeds) for stage I, without and with H2T.

    Columns: host, row, class, count, accuracy.
    """
    parts = [
        class_accuracy(result, result.numbers(row)).assign(row=label, host=result.name)
        for row, label in ROWS.items()
        if result.metrics[row] is not None
    ]
    return pd.concat(parts, ignore_index=True)[["host", "row", "class", "count", "accuracy"]]
