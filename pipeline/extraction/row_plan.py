"""The rows of a cache that will be extracted, by arithmetic: a row number gives sample, view and statistics.

In cache order the rows of one split under one set of statistics are its samples, class by class, each with all views of
its class (format rule 3.2). So a plan holds a few numbers for each class, however many rows there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from h2t.cache.format.row_index import Part
from h2t.cache.format.rows import GROUP_ROWS, SCHEMA, check_sources, check_values
from h2t.cache.format.spec import TEST_GROUPS
from h2t.pipeline.extraction.recipes import stored

SAMPLE_ORDER = ("split", "label", "source")
SAMPLE_COLUMNS = ("sample", "split", "label", "source", "digest")
MOST_GROUPED = 2**20  # test samples: the record holds their groups, and has room for some millions of numbers
EMPTY = np.empty(0, np.int64)


@dataclass(frozen=True)
class RowPlan:
    """The rows of a cache, which `parts` divide by split and statistics.

    Block j, the rows of a class in a part, begins with row `starts[j]` and with the sample at place `firsts[j]`, and
    has `views[j]` rows for each sample. `starts`: int64 (blocks + 1,), `firsts` and `views`: int64 (blocks,).
    `samples`, int64: the number of the sample at each place; None if it is the place itself.
    """

    parts: tuple[Part, ...]
    starts: np.ndarray
    firsts: np.ndarray
    views: np.ndarray
    samples: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def statistics(self) -> list[str]:
        """The names of all statistics, sorted."""
        return sorted({part.statistics for part in self.parts})

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """The number of rows by split and statistics."""
        return {(part.split, part.statistics): part.stop - part.start for part in self.parts}

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place of the sample, view) of each of `rows`; all int64 (n,)."""
        block = np.searchsorted(self.starts, rows, side="right") - 1
        offsets, views = rows - self.starts[block], self.views[block]
        return self.firsts[block] + offsets // views, offsets % views

    def lines(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the sample, view) of each of `rows`; all int64 (n,)."""
        places, views = self.places(rows)
        return (places if self.samples is None else self.samples[places]), views


@dataclass(frozen=True)
class PlannedRows:
    """The row table of a `plan` (`cache.write.writer.Rows`), made in pieces. `samples`: the sample table, in order."""

    plan: RowPlan
    samples: pa.Table

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def grouped(self) -> bool:
        """Whether the data has groups."""
        return "group" in self.samples.column_names

    @property
    def test_groups(self) -> dict[str, list[int]]:
        """The group of each test sample, in cache order, as the entry of a cache's provenance.

        Empty for data without groups, and for more than `MOST_GROUPED` test samples.
        """
        if not self.grouped:
            return {}
        found: list[int] = pc.filter(self.samples["group"], pc.equal(self.samples["split"], "test")).to_pylist()
        return {TEST_GROUPS: found} if len(found) <= MOST_GROUPED else {}

    def groups(self) -> Iterator[pa.Table]:
        """The table in pieces of `GROUP_ROWS` rows."""
        for start in range(0, len(self), GROUP_ROWS):
            yield self._lines(start, min(start + GROUP_ROWS, len(self)))

    def table(self) -> pa.Table:
        """The whole table."""
        return pa.concat_tables(self.groups()).combine_chunks()

    def _lines(self, start: int, stop: int) -> pa.Table:
        """The rows from `start` to `stop`, with one chunk in each column."""
        columns: dict[str, list[pa.Array]] = {name: [] for name in SCHEMA.names}
        near: list[tuple[int, int, pa.Array]] = []  # of each part: first place, how many, and the places from there
        for part in self.plan.parts:
            rows = np.arange(max(start, part.start), min(stop, part.stop))
            if rows.size:
                places, views = self.plan.places(rows)
                first = int(places[0])  # places ascend within a part
                near.append((first, int(places[-1]) - first + 1, pa.array(places - first)))
                columns["row"].append(pa.array(rows))
                columns["view"].append(pa.array(views.astype(np.int16)))
                columns["statistics"].append(pa.repeat(pa.scalar(part.statistics), len(rows)))
        for name in SAMPLE_COLUMNS:  # one column after the other: the texts of a group are the most of its memory
            column = self.samples[name]
            columns[name] = [column.slice(first, many).combine_chunks().take(places) for first, many, places in near]
        return pa.table([pa.concat_arrays(columns[name]) for name in SCHEMA.names], SCHEMA)


def recorded_groups(provenance: Mapping[str, Any]) -> Any:
    """What the record of a cache says of the groups of its test images, unchecked; None if it says nothing."""
    return provenance.get(TEST_GROUPS)


def planned(samples: pa.Table, recipes: Sequence[str], views: Sequence[int]) -> PlannedRows:
    """The rows of `samples` (`data.samples.SCHEMA` or `GROUPED`) for the batch-norm `recipes`.

    `views`: of a training sample, by class; evaluation samples have view 0 only. Raises CacheError `spec` as
    `cache.format.rows.make_rows`.
    """
    check_values(samples)
    check_sources(samples)
    if not _in_order(samples):
        samples = samples.sort_by([(name, "ascending") for name in SAMPLE_ORDER]).combine_chunks()
    parts: list[Part] = []
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rows, first places, views
    at = place = 0
    for split, size in _runs(samples["split"]).items():
        labels = _runs(samples["label"].slice(place, size))
        counts = np.array(list(labels.values()), np.int64)
        each = np.array([views[label] if split == "train" else 1 for label in labels], np.int64)
        firsts = place + np.cumsum(counts) - counts
        for statistics in stored(list(recipes), split):
            parts.append(Part(split, statistics, at, at + int((counts * each).sum())))
            blocks.append((counts * each, firsts, each))
            at = parts[-1].stop
        place += size
    rows, firsts, each = (np.concatenate([EMPTY, *columns]) for columns in zip(*blocks, strict=True))
    plan = RowPlan(tuple(parts), np.append(0, np.cumsum(rows)), firsts, each, _numbers(samples))
    return PlannedRows(plan, samples)


def _runs(column: pa.ChunkedArray) -> Mapping[Any, int]:
    """The length of each run of a sorted column, by its value, in order."""
    return {run["values"]: run["counts"] for run in pc.value_counts(column).to_pylist()}


def _numbers(samples: pa.Table) -> np.ndarray | None:
    """The column `sample`, int64; None if it counts the places."""
    at = 0
    for chunk in samples["sample"].iterchunks():
        if not np.array_equal(np.from_dlpack(chunk), np.arange(at, at + len(chunk))):
            return np.concatenate([np.from_dlpack(each) for each in samples["sample"].iterchunks()])
        at += len(chunk)
    return None


def _in_order(samples: pa.Table) -> bool:
    """Whether the table is sorted by split, label and source."""
    last: tuple[object, ...] | None = None
    for batch in samples.select(SAMPLE_ORDER).to_batches(max_chunksize=2**16):
        if not len(batch):
            continue
        first = tuple(batch[name][0].as_py() for name in SAMPLE_ORDER)
        if last is not None and first < last:
            return False
        last = tuple(batch[name][-1].as_py() for name in SAMPLE_ORDER)
        later = pa.array(np.ones(len(batch) - 1, bool))  # is or may be no earlier, by the columns from here on
        for name in reversed(SAMPLE_ORDER):
            a, b = batch[name].slice(0, len(batch) - 1), batch[name].slice(1)
            later = pc.or_(pc.greater(b, a), pc.and_(pc.equal(b, a), later))
        if not pc.all(later, min_count=0).as_py():
            return False
    return True
