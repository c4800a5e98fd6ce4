"""A small index of the row table: split, statistics, class and sample of each row, in 4 bytes a row, at most 8.

Rows of one split, statistics and class are consecutive (format rule 3.2), so the first row of each class tells these
three. Of each row only the sample number is kept. Sources and digests stay on disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.format.rows import check_memory, read_batches

COLUMNS = ("row", "sample", "view", "statistics", "split", "label")
PART_BYTES = 500  # of memory for a part, about


class Part(NamedTuple):
    """The places `start` to `stop` (exclusive) of an index: all rows of `split` under `statistics`."""

    split: str
    statistics: str
    start: int
    stop: int


@dataclass(frozen=True)
class RowIndex:
    """An index of n rows in cache order.

    `parts` divide the n places. `samples`, int32 or int64 (n,): sample numbers. Class run j has label `labels[j]` and
    the places `starts[j]` to `starts[j + 1]` (exclusive); `starts` int64 (runs + 1,), `labels` int64 (runs,). No run
    crosses the border of a part. `rows`, int64 (n,): row numbers; None for all rows of a cache, where places are row
    numbers. `views`: the views that occur, ascending.
    """

    parts: tuple[Part, ...]
    samples: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    views: tuple[int, ...]
    rows: np.ndarray | None = None

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """The number of rows by split and statistics."""
        return {(part.split, part.statistics): part.stop - part.start for part in self.parts}

    @property
    def splits(self) -> list[str]:
        """The splits that have rows, sorted."""
        return sorted({part.split for part in self.parts})

    def statistics(self, split: str | None = None) -> list[str]:
        """The statistics that rows of `split`, or of any split, were computed with, sorted."""
        return sorted({part.statistics for part in self.parts if split in (None, part.split)})

    def part(self, split: str, statistics: str) -> Part | None:
        """The part of that name; None if there is none."""
        return next((part for part in self.parts if part[:2] == (split, statistics)), None)

    def labels_of(self, places: np.ndarray) -> np.ndarray:
        """The labels at `places`, int64, of the same shape."""
        return self.labels[np.searchsorted(self.starts, places, side="right") - 1]

    def runs(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """The class runs of `part`: labels int64 (r,), and starts within it, then its length, int64 (r + 1,)."""
        first, last = np.searchsorted(self.starts, [part.start, part.stop])
        return self.labels[first:last], self.starts[first : last + 1] - part.start


def read_index(source: BinaryIO | pa.NativeFile, expected_rows: int) -> RowIndex:
    """The index of the row table in `source`, the file `rows.parquet`, read batch by batch.

    Raises CacheError `damaged` as `read_batches`, and if the rows are not in cache order; `full` if the index does not
    fit into memory.
    """
    batches = read_batches(source, expected_rows, COLUMNS, short=True)
    return _index((batch for _, batch in batches), expected_rows)


def index_of(table: pa.Table) -> RowIndex:
    """The index of some rows of a cache, given as a row table in cache order. Raises CacheError `damaged`."""
    table = table.select(COLUMNS)
    rows = np.asarray(table["row"])
    for name in ("statistics", "split"):
        if not pa.types.is_dictionary(table.schema.field(name).type):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, table[name].dictionary_encode())
    index = _index(table.to_batches(), len(table))
    return index if np.array_equal(rows, np.arange(len(rows))) else replace(index, rows=rows)


def _index(batches: Iterable[pa.RecordBatch], rows: int) -> RowIndex:
    check_memory(4 * rows)
    samples = np.empty(rows, np.int32)
    parts: list[Part] = []
    starts: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    seen = np.zeros(np.iinfo(np.int16).max + 1, bool)
    at, last = 0, -1
    for batch in batches:
        if not len(batch):
            continue
        sample, view, label = (np.from_dlpack(batch[name]) for name in ("sample", "view", "label"))
        if sample.max() > np.iinfo(samples.dtype).max:
            check_memory(8 * rows)
            samples = samples.astype(np.int64)
        samples[at : at + len(batch)] = sample
        seen[view] = True
        codes = [np.from_dlpack(batch[name].indices) for name in ("split", "statistics")]
        begins = np.flatnonzero(np.append(True, np.any([code[1:] != code[:-1] for code in codes], axis=0)))
        new = np.zeros(len(batch), bool)
        for begin in begins.tolist():
            key = (batch["split"][begin].as_py(), batch["statistics"][begin].as_py())
            if parts and key == parts[-1][:2]:
                continue
            new[begin] = True
            if parts:
                parts[-1] = parts[-1]._replace(stop=at + begin)
                if key < parts[-1][:2]:
                    raise _disordered()
            parts.append(Part(*key, at + begin, rows))
        check_memory(PART_BYTES * len(parts))
        before = np.append(last, label[:-1])
        if (~new & (label < before)).any():
            raise _disordered()
        found = np.flatnonzero(new | (label != before))
        starts.append(found + at)
        labels.append(label[found].astype(np.int64))
        at, last = at + len(batch), int(label[-1])
    empty = np.empty(0, np.int64)
    views = tuple(np.flatnonzero(seen).tolist())
    borders = np.append(np.concatenate([empty, *starts]), rows)
    return RowIndex(tuple(parts), samples, borders, np.concatenate([empty, *labels]), views)


def _disordered() -> CacheError:
    return CacheError("damaged", "rows.parquet: rows are not in the order of format 1; run h2t cache verify")
