"""Tables of single heads that evaluate writes: accuracy per class, confusion, predictions. Number -1 is stage I."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.data.classes import groups
from h2t.pipeline.evaluation.image_groups import group_numbers
from h2t.pipeline.evaluation.intervals import Difference, Pairs, over_replicates
from h2t.pipeline.evaluation.metrics import Graded, confusion, per_class_accuracy, precision_and_f1
from h2t.pipeline.evaluation.scoring import Scores


@dataclass(frozen=True)
class Scored:
    """The scores of one replicate: of all classifiers and of stage I, by split and statistics.

    `table` has a line of heads.parquet per classifier, numbered on from those of other replicates. `stage1` is the
    number of the stage-I head: -1, and downwards for further replicates. Labels and image numbers are those of
    replicate 0. `groups`: of the test images, int (n,) (`image_groups.py`); None if they are not known.
    """

    table: Sequence[Mapping[str, Any]]
    scores: Mapping[tuple[str, str], Scores]
    first: Mapping[str, Scores]
    replicate: int = 0
    stage1: int = -1
    groups: np.ndarray | None = None

    def of(self, split: str, statistics: str) -> Iterator[tuple[int, Graded]]:
        """Number and predictions of each classifier."""
        said = self.scores[(split, statistics)].said
        yield from zip((line["number"] for line in self.table), said, strict=True)

    def kept(self, statistics: str, numbers: Collection[int]) -> Iterator[tuple[int, Scores, Graded]]:
        """Number, scores and test predictions of the stage-I head, if there is one, and of the heads in `numbers`.

        Heads are evaluated under `statistics`.
        """
        if first := self.first.get("test"):
            yield self.stage1, first, first.said[0]
        by_number = dict(self.of("test", statistics))
        result = self.scores[("test", statistics)]
        yield from ((number, result, by_number[number]) for number in numbers if number in by_number)


def write_per_class(into: Path, replicates: Sequence[Scored], counts: list[int]) -> None:
    """Writes `per_class.parquet`: one line per (head, split, statistics, class).

    In percent: `accuracy` (of the class's samples, which is its recall), `precision` (of what is predicted as the
    class) and `f1`; null where undefined.

    `counts`: the training images of each class. Each line also states the class's group by every group definition.
    """
    lines: list[tuple[int, str, str]] = []
    figures: dict[str, list[np.ndarray]] = {"accuracy": [], "precision": [], "f1": []}
    for scored in replicates:
        results = [
            ([number for number, _ in scored.of(split, statistics)], split, result)
            for (split, statistics), result in scored.scores.items()
        ]
        results += [([scored.stage1], split, result) for split, result in scored.first.items()]
        for numbers, split, result in results:
            guesses = [said.guesses for said in result.said]
            precision, f1 = precision_and_f1(result.labels, guesses, len(counts))
            figures["accuracy"] += [per_class_accuracy(result.labels, one, len(counts)) for one in guesses]
            figures["precision"] += list(precision)
            figures["f1"] += list(f1)
            lines += [(number, split, result.statistics) for number in numbers]
    classes = len(counts)
    heads, splits, kinds = zip(*lines, strict=True)
    columns = {
        "number": pa.array(np.repeat(np.array(heads, np.int64), classes)),
        "split": _each_repeated(splits, classes),
        "statistics": _each_repeated(kinds, classes),
        "class": pa.array(np.tile(np.arange(classes), len(lines))),
        "count": pa.array(np.tile(np.array(counts, np.int64), len(lines))),
        **{name: pa.array(np.concatenate(values), from_pandas=True) for name, values in figures.items()},
        **{name: _as_a_whole_repeated(members, len(lines)) for name, members in groups(counts).items()},
    }
    pq.write_table(pa.table(columns), into / "per_class.parquet", compression="zstd")


def _each_repeated(texts: Sequence[str], times: int) -> pa.Array:
    return pa.array(texts, pa.string()).take(pa.array(np.repeat(np.arange(len(texts)), times)))


def _as_a_whole_repeated(texts: Sequence[str | None], times: int) -> pa.Array:
    return pa.array(texts, pa.string()).take(pa.array(np.tile(np.arange(len(texts)), times)))


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
    replicates: Sequence[Scored],
    statistics: str,
    group_of: Sequence[str | None],
    seeded: bool = True,
) -> list[Comparison]:
    """Compares the settings of `heads`, lines of heads.parquet, with each other by seed, and with stage I.

    On the test split, under `statistics`. `seeded` is False for a host whose fit does not depend on a seed.
    """
    own = {line["number"] for line in heads}
    settings: dict[tuple[float, str, str], dict[tuple[int, int], Graded]] = {}
    for scored in replicates:
        by_number = dict(scored.of("test", statistics))
        for head in (line for line in scored.table if line["number"] in own):
            setting = (float(head["ratio"]), *((head["donor"], head["selection"]) if head["ratio"] else STANDARD))
            settings.setdefault(setting, {}).setdefault((scored.replicate, head["seed"]), by_number[head["number"]])
    tests = {scored.replicate: scored.scores[("test", statistics)] for scored in replicates}
    groups = {scored.replicate: scored.groups for scored in replicates}
    firsts = {scored.replicate: scored.first.get("test") for scored in replicates}

    def apart(after: Mapping[tuple[int, int], Graded], before: Mapping[tuple[int, int], Graded]) -> Any:
        pairs = []
        for replicate, result in tests.items():
            if keys := sorted(key for key in after.keys() & before.keys() if key[0] == replicate):
                old, new = ([said[key] for key in keys] for said in (before, after))
                pairs.append(Pairs(new, old, result.labels, result.samples, groups[replicate]))
        return over_replicates(pairs, group_of, seeded=seeded) if pairs else None

    found = []
    for setting, said in sorted(settings.items(), key=lambda item: item[0]):
        others = {"without_h2t": (0.0, *STANDARD), "standard": (setting[0], *STANDARD)} if setting[0] else {}
        for against, other in others.items():
            before = settings.get(other, {}) if other != setting else {}
            if figures := apart(said, before):
                found.append(Comparison(setting, against, figures))
        if all(first and np.array_equal(first.samples, tests[r].samples) for r, first in firsts.items()):
            figures = apart(said, {key: first.said[0] for key in said if (first := firsts[key[0]])})
            found.append(Comparison(setting, "stage1", figures))
    return found


def write_differences(into: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes `differences.parquet`: one line per comparison and figure; `image_groups` where there are any."""
    text, number = pa.string(), pa.float64()
    kinds = {"ratio": number, "donor": text, "selection": text, "against": text, "figure": text, "mean": number}
    kinds |= {"low": number, "high": number, "verdict": text, "covers": pa.list_(text), "seeds": pa.int64()}
    lines = [
        dict(zip(kinds, (*c.setting, c.against, figure), strict=False)) | apart.as_dict()
        for c in comparisons
        for figure, apart in c.figures.items()
        if apart
    ]
    if any("image_groups" in line for line in lines):
        kinds["image_groups"] = pa.int64()
    pq.write_table(pa.Table.from_pylist(lines, pa.schema(kinds)), into / "differences.parquet", compression="zstd")


def write_confusion(
    into: Path, replicates: Sequence[Scored], statistics: str, kept: Collection[int], classes: int
) -> None:
    """Writes `confusion.parquet`: how often each class was predicted as each class, by stage I and the heads `kept`."""
    columns: dict[str, list[Any]] = {k: [] for k in ("number", "true", "predicted", "count")}
    for scored in replicates:
        for number, result, said in scored.kept(statistics, kept):
            true, predicted, count = confusion(result.labels, said.guesses, classes)
            columns["number"] += [number] * len(true)
            columns["true"] += true.tolist()
            columns["predicted"] += predicted.tolist()
            columns["count"] += count.tolist()
    pq.write_table(pa.table(columns), into / "confusion.parquet", compression="zstd")


def write_predictions(into: Path, replicates: Sequence[Scored], statistics: str, kept: Collection[int]) -> None:
    """Writes `predictions.parquet`: each sample's predicted class and confidence, by stage I and the heads `kept`.

    `image_group` is the number of the sample's group, where test images come in groups; `score`, with two classes, the
    logit of class 1 minus that of class 0.
    One head after the other, because all together can be larger than the memory.
    """
    kinds = {"number": pa.int64(), "sample": pa.int64(), "label": pa.int32(), "predicted": pa.int32()}
    groups = group_numbers(
        [scored.groups for scored in replicates],
        [scored.scores[("test", statistics)].samples for scored in replicates],
    )
    of_group = {} if groups[0] is None else {"image_group": pa.int64()}
    two = all(said.score is not None for scored in replicates for said in scored.scores[("test", statistics)].said)
    of_two = {"score": pa.float32()} if two else {}
    schema = pa.schema({**kinds, "confidence": pa.float32(), **of_group, **of_two})
    with pq.ParquetWriter(into / "predictions.parquet", schema, compression="zstd") as writer:
        for scored, of_image in zip(replicates, groups, strict=True):
            for number, result, said in scored.kept(statistics, kept):
                numbers = np.full(len(said.guesses), number)
                columns = [numbers, result.samples, result.labels, said.guesses, said.confidence]
                if of_image is not None:
                    columns.append(of_image)
                if said.score is not None:
                    columns.append(said.score)
                arrays = [
                    pa.array(c.astype(f.type.to_pandas_dtype()), f.type) for c, f in zip(columns, schema, strict=True)
                ]
                writer.write_table(pa.table(arrays, schema=schema))
