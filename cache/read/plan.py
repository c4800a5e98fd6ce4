"""Rows wanted -> chunks to read, each once, and where their rows go. Pure: no files, no Zarr, no threads.

rows wanted (any order, repeats allowed)
    -> `plan_rows`: the distinct chunks, ascending, and which wanted rows each of them serves
chunks + their (offset, size) in the shards
    -> `coalesce`: runs of neighbouring chunks, one read each
    -> `units`: runs in portions that fit a core's cache, so that what follows a read finds its bytes there
    or `portions`: the same chunks shared out among threads, for a reader that finds the runs by itself
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

#: Reading this many unwanted bytes costs about as much as another system call.
MAX_GAP_BYTES = 16 * 1024
#: A vectored read takes 1024 buffers, and a chunk needs two: its payload and its checksum.
MAX_CHUNKS = 512
#: Little enough that checking finds the bytes in a CPU cache, enough that the bookkeeping per unit does not count.
UNIT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """The chunks that a set of rows needs.

    `chunks` int64 (m,), ascending and distinct. Chunk j serves the wanted rows `order[bounds[j]:bounds[j + 1]]`,
    ascending; wanted row i is row `within[i]` of its chunk. `order`, `within` int64 (n,), `bounds` int64 (m + 1,).
    """

    chunks: np.ndarray
    order: np.ndarray
    bounds: np.ndarray
    within: np.ndarray

    def leads(self) -> np.ndarray:
        """The first wanted row of each chunk, int64 (m,)."""
        return self.order[self.bounds[:-1]]

    def repeats(self, first: int, last: int) -> list[tuple[int, int]]:
        """For chunks `first` to `last` (exclusive): each wanted row that is not its chunk's first, and that first."""
        bounds = self.bounds[first : last + 1]
        if bounds[-1] - bounds[0] == last - first:
            return []
        wanted = self.order[bounds[0] : bounds[-1]]
        leads = np.repeat(self.order[bounds[:-1]], np.diff(bounds))
        again = wanted != leads
        return list(zip(wanted[again].tolist(), leads[again].tolist(), strict=True))

    @property
    def which(self) -> np.ndarray:
        """Wanted row i comes from chunk `chunks[which[i]]`; int64 (n,)."""
        which = np.empty(len(self.order), np.int64)
        which[self.order] = np.repeat(np.arange(len(self.chunks)), np.diff(self.bounds))
        return which


def plan_rows(rows: np.ndarray, chunk_rows: int) -> Plan:
    """The plan for `rows`, int64 (n,)."""
    chunk, within = np.divmod(rows, chunk_rows)
    # One sort of (chunk, position) as one number is several times faster than a stable argsort.
    chunk, order = np.divmod(np.sort(chunk * len(rows) + np.arange(len(rows))), max(1, len(rows)))
    first = np.flatnonzero(np.diff(chunk, prepend=-1))
    return Plan(chunk[first], order, np.append(first, len(rows)), within)


class Run(NamedTuple):
    """Chunks `first` to `last` (exclusive, positions in the plan), which lie close together in one shard."""

    first: int
    last: int
    start: int
    stop: int


def coalesce(
    shards: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    *,
    max_gap: int = MAX_GAP_BYTES,
    max_chunks: int = MAX_CHUNKS,
) -> list[Run]:
    """Runs of chunks to fetch by one read each, in the order of `shards` and `offsets`.

    `shards`, `offsets`, `sizes` int64 (m,): where each chunk lies, sorted by shard and offset. A run never crosses a
    shard, bridges gaps of at most `max_gap` bytes, and holds at most `max_chunks` chunks.
    """
    count = len(shards)
    if not count:
        return []
    ends = offsets + sizes
    gaps = offsets[1:] - ends[:-1]
    apart = np.concatenate([[True], (shards[1:] != shards[:-1]) | (gaps > max_gap) | (gaps < 0)])
    position = np.arange(count)
    neighbours = position - np.maximum.accumulate(np.where(apart, position, 0))
    first = np.flatnonzero(neighbours % max_chunks == 0)
    last = np.append(first[1:], count)
    columns = zip(first.tolist(), last.tolist(), offsets[first].tolist(), ends[last - 1].tolist(), strict=True)
    return list(map(partial(tuple.__new__, Run), columns))  # Run(...) itself takes twice as long


class Unit(NamedTuple):
    """Runs to fetch and check in one go: chunks `first` to `last` (exclusive, positions in the plan) of `shard`."""

    shard: int
    first: int
    last: int
    runs: list[Run]


def units(
    shards: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    *,
    unit_bytes: int = UNIT_BYTES,
    max_gap: int = MAX_GAP_BYTES,
) -> list[Unit]:
    """The runs of `coalesce` in portions of about `unit_bytes` of chunks, at least one chunk."""
    spans = portions(shards, sizes, portion_bytes=unit_bytes, max_shards=1)
    first, last = np.array(spans, np.int64).reshape(-1, 2).T
    runs = coalesce(np.repeat(np.arange(len(spans)), last - first), offsets, sizes, max_gap=max_gap)
    cuts = np.searchsorted([run.first for run in runs], np.append(first, len(shards))).tolist()
    groups = [runs[a:b] for a, b in pairwise(cuts)]
    return list(map(Unit, shards[first].tolist(), first.tolist(), last.tolist(), groups))


def portions(shards: np.ndarray, sizes: np.ndarray, *, portion_bytes: int, max_shards: int) -> list[tuple[int, int]]:
    """Chunks in order, in portions `first` to `last` (exclusive) of about `portion_bytes` and at most `max_shards`.

    `shards`, `sizes` int64 (m,), sorted by shard. A portion holds at least one chunk; portions are about alike, so that
    those who share them out are done together.
    """
    if not len(shards):
        return []
    ends = np.cumsum(sizes)
    count = max(1, -(-ends[-1] // portion_bytes))
    alike = max(1, -(-ends[-1] // count))
    part = (ends - 1) // alike
    files = np.cumsum(np.diff(shards, prepend=shards[0]) != 0) // max_shards
    first = np.flatnonzero(np.append(True, (part[1:] != part[:-1]) | (files[1:] != files[:-1])))
    return list(zip(first.tolist(), [*first[1:].tolist(), len(shards)], strict=True))
