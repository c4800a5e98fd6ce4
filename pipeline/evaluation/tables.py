"""Tables of single heads that evaluate writes: accuracy per class, confusion, predictions. Number -1 is stage I."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.data.classes import groups
from h2t.pipeline.evaluation.metrics import Answers, confusion, per_class_accuracy
from h2t.pipeline.evaluation.scoring import Scores


def write_per_class(
    into: Path,
    table: list[dict[str, Any]],
    scored: Mapping[tuple[str, str], Scores],
    first: Mapping[str, Scores],
    counts: list[int],
) -> None:
    """Writes `per_class.parquet`: one line per (head, split, statistics, class), accuracy in percent.

    `table` holds the lines of heads.parquet, `scored` the scores of the stack by (split, statistics), `first` those of
    the stage-I head by split, `counts` the training images of each class. Each line also states the class's group by
    every group definition.
    """
    defined = groups(counts)
    columns: dict[str, list[Any]] = {k: [] for k in ("number", "split", "statistics", "class", "count", "accuracy")}
    of: dict[str, list[Any]] = {name: [] for name in defined}
    results = [(h["number"], h["number"], split, r) for (split, _), r in scored.items() for h in table]
    results += [(-1, 0, split, r) for split, r in first.items()]
    for head, position, split, result in results:
        accuracy = per_class_accuracy(result.labels, result.said[position].guesses, len(counts))
        columns["number"] += [head] * len(counts)
        columns["split"] += [split] * len(counts)
        columns["statistics"] += [result.statistics] * len(counts)
        columns["class"] += range(len(counts))
        columns["count"] += counts
        columns["accuracy"] += [None if np.isnan(a) else float(a) for a in accuracy]
        for name, members in defined.items():
            of[name] += members
    pq.write_table(pa.table({**columns, **of}), into / "per_class.parquet", compression="zstd")


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
