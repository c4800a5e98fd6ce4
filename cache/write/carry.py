"""Copies rows from another cache into a new one, unchanged chunks without decoding them.

    damaged = broken_shards(source, needed)         # compares sha256 before anything is copied
    carrier = Carrier(source, spec, origin)         # origin[row] is its row in `source`, or -1 for a new row
    for shard in pending:
        writer.put(shard, carrier.complete(shard, maps_of_the_new_rows))

A chunk is copied as stored if codec, chunk size and dtype are equal and it holds the same rows; its crc32c is checked
first. If only the layout differs, or rows moved within chunks, the rows are read, checked, and encoded again.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.format import shard as shard_layout
from h2t.cache.format.codecs import codec
from h2t.cache.format.spec import CacheSpec, Commit, sha256
from h2t.cache.read.store import FileStore

RUN_BYTES = 64 * 1024**2  # at most this much of neighbouring chunks is read at once


class Source(Protocol):
    """The part of an open cache (`cache.reader.Cache`) that is used here; writing imports no code that reads."""

    @property
    def spec(self) -> CacheSpec: ...

    @property
    def commit(self) -> Commit: ...

    @property
    def files(self) -> FileStore: ...

    @property
    def statistics(self) -> bytes: ...

    def lines(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] = ...) -> pa.Table: ...

    def read(self, rows: Sequence[int] | np.ndarray, out: np.ndarray | None = None, expert: int = 0) -> np.ndarray: ...

    def chunk_ranges(self, chunks: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def chunk_fault(self, expert: int, chunk: int, what: str) -> CacheError: ...


def broken_shards(source: Source, rows: np.ndarray) -> Mapping[int, str]:
    """Faults by shard number: the shards with any of `rows`, int64 (n,), whose sha256 differs from the commit record.

    Whole shards are compared because a shard swapped for another one still has valid chunks.
    """
    faults = {}
    for shard in np.unique(rows // source.spec.shard_rows).tolist():
        for expert in range(source.spec.experts):
            name = source.spec.shard_file(expert, shard)
            if sha256(source.files.read_all(name, source.commit.files[name][0])) != source.commit.files[name][1]:
                faults[shard] = f"{source.files}/{name}: sha256 differs from cache.json"
    return faults


class Carrier:
    """Builds shards of a cache of `spec` from rows of `source` and new rows.

    `origin`, int64 (rows,), gives for each row its row in `source`, or -1 if it is new. Raises CacheError `mismatch`
    if `source` has another dtype or other map shapes.
    """

    def __init__(self, source: Source, spec: CacheSpec, origin: np.ndarray) -> None:
        if (source.spec.maps, source.spec.dtype) != (spec.maps, spec.dtype):
            raise CacheError(
                "mismatch",
                f"{source.files}: maps of another shape or dtype cannot be copied; {spec.maps} {spec.dtype} expected, "
                f"got {source.spec.maps} {source.spec.dtype}; run h2t extract --anew",
            )
        self.source, self.spec, self.origin = source, spec, origin
        self._codec = codec(spec.codec)
        self._same_chunks = (source.spec.codec, source.spec.chunk_rows) == (spec.codec, spec.chunk_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return Carrier, (self.source, self.spec, self.origin)  # codecs cannot be pickled

    def complete(self, shard: int, maps: Sequence[np.ndarray]) -> list[bytes]:
        """The bytes of `shard`, one file per expert.

        `maps` holds its new rows in order, one array (new rows, C, H, W) per expert. Raises CacheError `damaged` if a
        chunk of the source is, and whatever reading it raises.
        """
        span = self.spec.shard_range(shard)
        origin = self.origin[span.start : span.stop]
        chunks = self._unchanged(origin)
        return [self._complete(expert, origin, chunks, new) for expert, new in enumerate(maps)]

    def _complete(self, expert: int, origin: np.ndarray, chunks: np.ndarray, new: np.ndarray) -> bytes:
        size = self.spec.chunk_rows
        stored: list[bytes | memoryview] = [b""] * len(chunks)
        raw, others = np.flatnonzero(chunks >= 0), np.flatnonzero(chunks < 0)
        for place, chunk in zip(raw.tolist(), self._stored(expert, chunks[raw]), strict=True):
            stored[place] = chunk
        if others.size:
            # The rows of all chunks that are encoded again; slots beyond the end of the cache stay zero.
            rows = np.flatnonzero(np.isin(np.arange(len(origin)) // size, others))
            slots = np.searchsorted(others, rows // size) * size + rows % size
            carried = origin[rows] >= 0
            values = np.zeros((len(others) * size, *self.spec.maps[expert]), self.spec.stored_dtype)
            values[slots[~carried]] = new
            if carried.any():
                values[slots[carried]] = self.source.read(origin[rows[carried]], expert=expert)
            for place, chunk in zip(others.tolist(), values.reshape(len(others), size, *values.shape[1:]), strict=True):
                stored[place] = shard_layout.sealed(self._codec.encode(chunk))
        return shard_layout.lay_out(stored, self.spec.chunks_per_shard)

    def _unchanged(self, origin: np.ndarray) -> np.ndarray:
        """For each chunk of a shard, the chunk of the source with the same rows, or -1; int64 (chunks,).

        `origin` holds the origins of the rows of the shard.
        """
        size, source = self.spec.chunk_rows, self.source.spec
        starts = np.arange(0, len(origin), size)
        if not self._same_chunks:
            return np.full(len(starts), -1)
        first = origin[starts]
        consecutive = origin == np.repeat(first, size)[: len(origin)] + np.arange(len(origin)) % size
        held = np.minimum(starts + size, len(origin)) - starts
        there = np.minimum(first + size, source.rows) - first
        whole = (first >= 0) & (first % size == 0) & np.logical_and.reduceat(consecutive, starts) & (held == there)
        return np.where(whole, first // size, -1)

    def _stored(self, expert: int, chunks: np.ndarray) -> list[memoryview]:
        """The chunks of the source as stored, with checksums; neighbours in a shard are read together."""
        if not chunks.size:
            return []
        shards, offsets, sizes = self.source.chunk_ranges(chunks, expert)
        ends = offsets + sizes
        portion = np.cumsum(sizes) // RUN_BYTES
        apart = (shards[1:] != shards[:-1]) | (offsets[1:] != ends[:-1]) | (portion[1:] != portion[:-1])
        cuts = np.flatnonzero(apart) + 1
        runs = list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(chunks)], strict=True))
        stored: list[memoryview] = []
        for shard, group in groupby(runs, key=lambda run: int(shards[run[0]])):
            mine = list(group)
            ranges = [(int(offsets[a]), int(ends[b - 1])) for a, b in mine]
            name = self.source.spec.shard_file(expert, shard)
            for (a, b), data in zip(mine, self.source.files.read_ranges(name, ranges), strict=True):
                view = memoryview(data)
                for i in range(a, b):
                    begin = int(offsets[i] - offsets[a])
                    chunk = view[begin : begin + int(sizes[i])]
                    if not shard_layout.holds(chunk):
                        raise self.source.chunk_fault(expert, int(chunks[i]), "crc32c mismatch")
                    stored.append(chunk)
        return stored
