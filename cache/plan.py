"""Rows wanted -> chunks to read, each once, and where their rows go. Pure: no files, no Zarr, no threads.

rows wanted (any order, repeats allowed)
    -> `chunks`: the distinct chunks, ascending
    -> per wanted row: which of them, and which row inside it
chunks + their (offset, size) in the shards
    -> `runs`: consecutive chunks that one read fetches, gaps up to a limit read along
"""

from dataclasses import dataclass

import numpy as np

#: Reading this many unwanted bytes costs less than another system call.
MAX_GAP_BYTES = 16 * 1024
#: A vectored read takes 1024 buffers, and a chunk needs up to three: its gap, its payload, its checksum.
MAX_CHUNKS = 340


@dataclass(frozen=True, slots=True)
class Plan:
    """The chunks that a set of rows needs.

    `chunks` int64 (m,), ascending and distinct; wanted row i is row `within[i]` of chunk `chunks[which[i]]`.
    """

    chunks: np.ndarray
    which: np.ndarray
    within: np.ndarray


def plan_rows(rows: np.ndarray, chunk_rows: int) -> Plan:
    """The plan for `rows`, int64 (n,)."""
    chunks, which = np.unique(rows // chunk_rows, return_inverse=True)
    return Plan(chunks, which.reshape(rows.shape), rows % chunk_rows)


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks `first` to `last` (exclusive, positions in the plan) that lie close together in one shard."""

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
    if not len(shards):
        return []
    ends = offsets + sizes
    apart = (shards[1:] != shards[:-1]) | (offsets[1:] - ends[:-1] > max_gap) | (offsets[1:] < ends[:-1])
    cuts = np.concatenate([[0], np.flatnonzero(apart) + 1, [len(shards)]])
    runs = []
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        for begin in range(first, last, max_chunks):
            end = min(begin + max_chunks, last)
            runs.append(Run(begin, end, int(offsets[begin]), int(ends[end - 1])))
    return runs
