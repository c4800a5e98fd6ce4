"""Tables of single heads that evaluate writes: accuracy per class, confusion, predictions. Number -1 is stage I."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.data.classes import groups
from h2t.pipeline.evaluation.intervals import Difference, differences
from h2t.pipeline.evaluation.metrics import Answers, confusion, per_class_accuracy, precision_and_f1
from h2t.pipeline.evaluation.scoring import Scores


def write_per_class(
    into: Path,
    table: list[dict[str, Any]],
    scored: Mapping[tuple[str, str], Scores],
    first: Mapping[str, Scores],
    counts: list[int],
) -> None:
    """Writes `per_class.parquet`: one line per (head, split, statistics, class).

    In percent: `accuracy` (of the class's samples, which is its recall), `precision` (of what is predicted as the
    class) and `f1`; null where undefined.

    `table` holds the lines of heads.parquet, `scored` the scores of the stack by (split, statistics), `first` those of
    the stage-I head by split, `counts` the training images of each class. Each line also states the class's group by
    every group definition.
    """
    defined = groups(counts)
    names = ("number", "split", "statistics", "class", "count", "accuracy", "precision", "f1")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    of: dict[str, list[Any]] = {name: [] for name in defined}
    results = [(h["number"], h["number"], split, r) for (split, _), r in scored.items() for h in table]
    results += [(-1, 0, split, r) for split, r in first.items()]
    for head, position, split, result in results:
        guesses = result.said[position].guesses
        accuracy = per_class_accuracy(result.labels, guesses, len(counts))
        precision, f1 = precision_and_f1(result.labels, guesses, len(counts))
        columns["number"] += [head] * len(counts)
        columns["split"] += [split] * len(counts)
        columns["statistics"] += [result.statistics] * len(counts)
        columns["class"] += range(len(counts))
        columns["count"] += counts
        for name, values in (("accuracy", accuracy), ("precision", precision), ("f1", f1)):
            columns[name] += [None if np.isnan(v) else float(v) for v in values]
        for name, members in defined.items():
            of[name] += members
    pq.write_table(pa.table({**columns, **of}), into / "per_class.parquet", compression="zstd")


STANDARD = ("instance", "random")  # donor and selection of H2T as published


@dataclass(frozen=True)
class Comparison:
    """The differences of one setting (ratio, donor, selection) on the test split, by figure.

    `against` says what is subtracted: `stage1`, `without_h2t` (ratio 0), or `standard` (donor instance, selection
    random, the same ratio).
    """

    setting: tuple[float, str, str]
    against: str
    figures: dict[str, Difference | None]


def compared(
    heads: Sequence[Mapping[str, Any]],
    result: Scores,
    first: Scores | None,
    group_of: Sequence[str | None],
    seeded: bool = True,
) -> list[Comparison]:
    """Compares the settings of `heads`, lines of heads.parquet, with each other by seed, and with stage I.

    `result` and `first` are the scores of all heads and of stage I. `seeded` is False for a host whose fit does not
    depend on a seed.
    """
    settings: dict[tuple[float, str, str], dict[int, int]] = {}
    for head in heads:
        setting = (float(head["ratio"]), *((head["donor"], head["selection"]) if head["ratio"] else STANDARD))
        settings.setdefault(setting, {}).setdefault(head["seed"], head["number"])
    found = []
    for setting, numbers in sorted(settings.items()):
        others = {"without_h2t": (0.0, *STANDARD), "standard": (setting[0], *STANDARD)} if setting[0] else {}
        for against, other in others.items():
            before = settings.get(other, {}) if other != setting else {}
            if seeds := sorted(numbers.keys() & before.keys()):
                after, old = ([result.said[of[s]] for s in seeds] for of in (numbers, before))
                apart = differences(after, old, result.labels, group_of, seeded=seeded)
                found.append(Comparison(setting, against, apart))
        if first and np.array_equal(first.samples, result.samples):
            after = [result.said[n] for n in numbers.values()]
            apart = differences(after, first.said * len(after), result.labels, group_of, seeded=seeded)
            found.append(Comparison(setting, "stage1", apart))
    return found


def write_differences(into: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes `differences.parquet`: one line per comparison and figure."""
    text, number = pa.string(), pa.float64()
    kinds = {"ratio": number, "donor": text, "selection": text, "against": text, "figure": text, "mean": number}
    kinds |= {"low": number, "high": number, "verdict": text, "covers": pa.list_(text), "seeds": pa.int64()}
    lines = [
        dict(zip(kinds, (*c.setting, c.against, figure), strict=False)) | apart.as_dict()
        for c in comparisons
        for figure, apart in c.figures.items()
        if apart
    ]
    pq.write_table(pa.Table.from_pylist(lines, pa.schema(kinds)), into / "differences.parquet", compression="zstd")


def each(result: Scores, first: Scores | None, kept: list[int]) -> list[tuple[int, Answers]]:
    """Number and predictions of the stage-I head, if there is one, and of the heads in `kept`."""
    return [*([(-1, first.said[0])] if first else []), *((head, result.said[head]) for head in kept)]


def write_confusion(into: Path, result: Scores, first: Scores | None, kept: list[int], classes: int) -> None:
    """Writes `confusion.parquet`: how often each class was predicted as each class, by stage I and the heads `kept`."""
    columns: dict[str, list[Any]] = {k: [] for k in ("number", "true", "predicted", "count")}
    for head, answers in each(result, first, kept):
        true, predicted, count = confusion(result.labels, answers.guesses, classes)
        columns["number"] += [head] * len(true)
        columns["true"] += true.tolist()
        columns["predicted"] += predicted.tolist()
        columns["count"] += count.tolist()
    pq.write_table(pa.table(columns), into / "confusion.parquet", compression="zstd")


def write_predictions(into: Path, result: Scores, first: Scores | None, kept: list[int]) -> None:
    """Writes `predictions.parquet`: each sample's predicted class and confidence, by stage I and the heads `kept`.

    One head after the other, because all together can be larger than the memory.
    """
    kinds = {"number": pa.int64(), "sample": pa.int64(), "label": pa.int32(), "predicted": pa.int32()}
    schema = pa.schema({**kinds, "confidence": pa.float32()})
    with pq.ParquetWriter(into / "predictions.parquet", schema, compression="zstd") as writer:
        for head, answers in each(result, first, kept):
            numbers = np.full(len(answers.guesses), head)
            columns = (numbers, result.samples, result.labels, answers.guesses, answers.confidence)
            arrays = [
                pa.array(c.astype(f.type.to_pandas_dtype()), f.type) for c, f in zip(columns, schema, strict=True)
            ]
            writer.write_table(pa.table(arrays, schema=schema))
