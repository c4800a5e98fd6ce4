"""Plans a read: which chunks to read, each once, and where their rows go. Pure: no files, no Zarr, no threads.

wanted rows (any order, repeats allowed)
    -> `plan_rows`: the distinct chunks, ascending, and the wanted rows that each of them holds
chunks with their (offset, size) in the shards
    -> `coalesce`: runs of neighbouring chunks, one read each
    -> `units`: groups of runs that fit a core's cache, so that checking and decoding find the bytes there
    or `portions`: the chunks divided among threads, for the compiled gather, which finds runs by itself
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np

#: Reading this many unwanted bytes costs about as much as another system call.
MAX_GAP_BYTES = 16 * 1024
#: Small enough for a CPU cache, large enough that the overhead per unit does not matter.
UNIT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """The chunks that n wanted rows need.

    `chunks` int64 (m,), distinct and ascending. Chunk j holds the wanted rows `order[bounds[j]:bounds[j + 1]]`
    (positions among the wanted rows, ascending); wanted row i is row `within[i]` of its chunk. `order` and `within`
    int64 (n,), `bounds` int64 (m + 1,).
    """

    chunks: np.ndarray
    order: np.ndarray
    bounds: np.ndarray
    within: np.ndarray

    def leads(self) -> np.ndarray:
        """The first wanted row of each chunk, int64 (m,)."""
        return self.order[self.bounds[:-1]]

    def repeats(self, first: int, last: int) -> list[tuple[int, int]]:
        """For chunks `first` to `last` (exclusive): (wanted row, first wanted row of its chunk), unless they are equal.

        With one row per chunk these are the repeated rows.
        """
        bounds = self.bounds[first : last + 1]
        if bounds[-1] - bounds[0] == last - first:
            return []
        wanted = self.order[bounds[0] : bounds[-1]]
        leads = np.repeat(self.order[bounds[:-1]], np.diff(bounds))
        again = wanted != leads
        return list(zip(wanted[again].tolist(), leads[again].tolist(), strict=True))


def plan_rows(rows: np.ndarray, chunk_rows: int) -> Plan:
    """The plan for `rows`, int64 (n,), of a cache with `chunk_rows` rows per chunk."""
    chunk, within = np.divmod(rows, chunk_rows)
    # Sorting (chunk, position) packed into one number is several times faster than a stable argsort.
    chunk, order = np.divmod(np.sort(chunk * len(rows) + np.arange(len(rows))), max(1, len(rows)))
    first = np.flatnonzero(np.diff(chunk, prepend=-1))
    return Plan(chunk[first], order, np.append(first, len(rows)), within)


class Run(NamedTuple):
    """Chunks `first` to `last` (exclusive, positions in the plan), close together in bytes `start` to `stop`."""

    first: int
    last: int
    start: int
    stop: int


def coalesce(shards: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, *, max_gap: int = MAX_GAP_BYTES) -> list[Run]:
    """Runs of chunks, each to be fetched with one read, in order.

    `shards`, `offsets`, `sizes` int64 (m,): shard, offset and size in bytes of each chunk, sorted by shard and offset.
    A run stays in one shard and has gaps of at most `max_gap` bytes.
    """
    count = len(shards)
    if not count:
        return []
    ends = offsets + sizes
    gaps = offsets[1:] - ends[:-1]
    apart = np.concatenate([[True], (shards[1:] != shards[:-1]) | (gaps > max_gap) | (gaps < 0)])
    first = np.flatnonzero(apart)
    last = np.append(first[1:], count)
    columns = zip(first.tolist(), last.tolist(), offsets[first].tolist(), ends[last - 1].tolist(), strict=True)
    return list(map(partial(tuple.__new__, Run), columns))  # calling Run(...) takes twice as long


class Unit(NamedTuple):
    """Runs to fetch and check together: chunks `first` to `last` (exclusive, positions in the plan) of `shard`."""

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
    """The runs of `coalesce`, grouped into units of about `unit_bytes` and at least one chunk; arguments as there."""
    spans = portions(shards, sizes, portion_bytes=unit_bytes, max_shards=1)
    first, last = np.array(spans, np.int64).reshape(-1, 2).T
    runs = coalesce(np.repeat(np.arange(len(spans)), last - first), offsets, sizes, max_gap=max_gap)
    cuts = np.searchsorted([run.first for run in runs], np.append(first, len(shards))).tolist()
    groups = [runs[a:b] for a, b in pairwise(cuts)]
    return list(map(Unit, shards[first].tolist(), first.tolist(), last.tolist(), groups))


def in_turns(work: Sequence[Unit]) -> list[Unit]:
    """The units in turns of their shards: the first of each shard, then the second of each, and so on.

    So threads that take them one after the other fetch from several files, of which each is fetched by one at a time.
    """
    turns: Counter[int] = Counter()
    numbered = []
    for unit in work:
        numbered.append((turns[unit.shard], unit))
        turns[unit.shard] += 1
    return [unit for _, unit in sorted(numbered, key=itemgetter(0))]


def portions(shards: np.ndarray, sizes: np.ndarray, *, portion_bytes: int, max_shards: int) -> list[tuple[int, int]]:
    """Divides chunks, in order, into portions (`first`, `last` exclusive).

    A portion has about `portion_bytes`, at least one chunk, and chunks of at most `max_shards` shards. `shards`,
    `sizes` int64 (m,), sorted by shard. Portions are about equal in size, so threads finish at about the same time.
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
