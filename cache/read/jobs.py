"""The two ways to read the rows of a plan into an array, each a callable on one piece of the work.

`Compiled` reads uncompressed one-row chunks of local files directly into their slots. `Decode` reads everything else;
such chunks of remote files it checks by compiled code, if that was built. Both check the crc32c of every chunk before
its values are returned, and raise CacheError.
"""

import os
from functools import partial

import numpy as np

from h2t.cache.format import shard as shard_layout
from h2t.cache.read.chunks import Chunks
from h2t.cache.read.files import LocalFiles
from h2t.cache.read.gather import CHANGED, DONE, MISMATCH, REFUSED, Gather, compiled
from h2t.cache.read.plan import Plan, Run, Unit


class Compiled:
    """Reads one-row chunks with the compiled gather, each row directly into its slot of `out`."""

    def __init__(
        self,
        chunks: Chunks,
        gather: Gather,
        expert: int,
        plan: Plan,
        shards: np.ndarray,
        offsets: np.ndarray,
        out: np.ndarray,
    ) -> None:
        self.chunks, self.gather, self.expert, self.plan, self.out = chunks, gather, expert, plan, out
        self.shards, self.offsets = shards, offsets
        self.row_bytes = chunks.spec.row_bytes(expert)
        self.slots = plan.leads() * self.row_bytes

    def __call__(self, portion: tuple[int, int]) -> None:
        files, spec = self.chunks.files, self.chunks.spec
        assert isinstance(files, LocalFiles)
        first, last = portion
        present, which = np.unique(self.shards[first:last], return_inverse=True)
        names = [spec.shard_file(self.expert, shard) for shard in present.tolist()]
        with files.handles(names) as held:
            opened = np.array(held, np.int64)
            outcome = self.gather(
                opened[:, 0].astype(np.int32)[which],
                self.offsets[first:last],
                self.slots[first:last],
                self.out,
                self.row_bytes,
                opened,
            )
        if outcome.result == CHANGED:
            raise files.replaced(names[outcome.row])
        if outcome.result != DONE:
            j = first + outcome.row
            name = spec.shard_file(self.expert, int(self.shards[j]))
            if outcome.result == MISMATCH:
                raise self.chunks.fault(self.expert, int(self.plan.chunks[j]), "crc32c mismatch")
            if outcome.result == REFUSED:
                with files.in_one_line(name):
                    raise OSError(outcome.errno, os.strerror(outcome.errno), f"{files}/{name}")
            start = int(self.offsets[j])
            raise files.ends_early(name, start, start + self.row_bytes + shard_layout.CRC_BYTES)
        for slot, lead in self.plan.repeats(first, last):
            self.out[slot] = self.out[lead]


class Decode:
    """Reads, checks and decodes chunks: one-row chunks directly into their slots of `out`, others through a copy."""

    def __init__(
        self, chunks: Chunks, expert: int, plan: Plan, offsets: np.ndarray, sizes: np.ndarray, out: np.ndarray
    ) -> None:
        self.chunks, self.expert, self.plan, self.out = chunks, expert, plan, out
        self.offsets, self.sizes, self.leads = offsets, sizes, plan.leads()
        spec = chunks.spec
        self.gather = compiled() if spec.codec == "none" and spec.chunk_rows == 1 else None

    def __call__(self, unit: Unit) -> None:
        name = self.chunks.spec.shard_file(self.expert, unit.shard)
        self.chunks.once_more(name, partial(self._fill, name, unit))

    def _fill(self, name: str, unit: Unit) -> None:
        chunks, plan, out = self.chunks, self.plan, self.out
        whole_rows = chunks.spec.chunk_rows == 1
        scratch = np.empty((0 if whole_rows else chunks.spec.chunk_rows, *out.shape[1:]), out.dtype)
        fetched = chunks.files.read_ranges(name, [(run.start, run.stop) for run in unit.runs])
        for run, data in zip(unit.runs, fetched, strict=True):
            if self.gather:
                self._unpack(self.gather, run, data)
                continue
            view = memoryview(data)
            begins = (self.offsets[run.first : run.last] - run.start).tolist()
            sizes, leads = (column[run.first : run.last].tolist() for column in (self.sizes, self.leads))
            for j, begin, size, lead in zip(range(run.first, run.last), begins, sizes, leads, strict=True):
                self._decode(j, view[begin : begin + size], out[lead] if whole_rows else scratch)
                if not whole_rows:
                    wanted = plan.order[plan.bounds[j] : plan.bounds[j + 1]]
                    out[wanted] = scratch[plan.within[wanted]]
        if whole_rows:
            for slot, lead in plan.repeats(unit.first, unit.last):
                out[slot] = out[lead]

    def _unpack(self, gather: Gather, run: Run, data: bytes | memoryview) -> None:
        row_bytes = self.chunks.spec.row_bytes(self.expert)
        starts, slots = self.offsets[run.first : run.last] - run.start, self.leads[run.first : run.last] * row_bytes
        wrong = gather.unpack(np.frombuffer(data, np.uint8), starts, slots, self.out, row_bytes)
        if wrong is not None:
            raise self.chunks.fault(self.expert, int(self.plan.chunks[run.first + wrong]), "crc32c mismatch")

    def _decode(self, j: int, stored: memoryview, target: np.ndarray) -> None:
        chunks = self.chunks
        if not shard_layout.holds(stored):
            raise chunks.fault(self.expert, int(self.plan.chunks[j]), "crc32c mismatch")
        try:
            chunks.codec.decode(stored[: -shard_layout.CRC_BYTES], target)
        except (ValueError, RuntimeError) as error:
            raise chunks.fault(self.expert, int(self.plan.chunks[j]), f"cannot be decoded ({error})") from None
