"""Reads committed caches: any rows in any order, each chunk read once and checked.

    cache = open_cache("data/extract/ce_mixup")
    maps = cache.read([3, 1, 3])            # (3, C, H, W), in this order

Each shard index is read once and kept. `read.plan` turns the rows into byte ranges, a small thread pool reads them, and
the crc32c of every chunk is checked before its values are returned. Uncompressed rows that are their own chunk are read
from the file directly into the result.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from crc32c import crc32c

from h2t.cache.errors import CacheError, numbered
from h2t.cache.format import shard as shard_layout
from h2t.cache.format.codecs import codec
from h2t.cache.format.rows import from_bytes
from h2t.cache.format.spec import (
    MAX_RECORD_BYTES,
    RECORD,
    ROWS,
    STATISTICS,
    CacheSpec,
    Commit,
    parse_record,
    sha256,
)
from h2t.cache.read.files import LocalFiles, files_at
from h2t.cache.read.gather import CHANGED, DONE, MISMATCH, REFUSED, Gather, compiled
from h2t.cache.read.in_use import InUse
from h2t.cache.read.plan import MAX_GAP_BYTES, Plan, Unit, plan_rows, portions, units
from h2t.cache.read.store import FileStore

T = TypeVar("T")

#: Held while a forked child sets up a cache. Also held around every fork, so that the child never inherits it locked.
_FORK = threading.RLock()
os.register_at_fork(before=_FORK.acquire, after_in_parent=_FORK.release, after_in_child=_FORK.release)

THREADS = min(4, os.cpu_count() or 1)
#: With fewer bytes per system call, passing the GIL between threads costs more than a second core gains.
PARALLEL_READ_BYTES = 64 * 1024
#: The compiled gather releases the GIL. One portion takes a thread 0.5 ms, far longer than passing the GIL.
PORTION_BYTES = 1024 * 1024
#: Files that one portion keeps open; those of all threads together must stay below the limit of the process.
PORTION_SHARDS = 128


def open_cache(location: str | Path) -> "Cache":
    """The committed cache in a directory, at an fsspec URL or at a `dvc+` address.

    Raises CacheError: `uncommitted` if there is no commit record, `newer-format`, `missing` if a file is, `damaged` if
    the record is invalid or a file has another size than recorded, `replaced` if the cache is replaced meanwhile,
    `unreachable`, `full`. Values are checked when they are read. So are the sizes of shards if a remote store needs one
    request for each.
    """
    files = files_at(location)
    if not files.exists(RECORD):
        raise CacheError(
            "uncommitted", f"{files}: no {RECORD}, so this is not a finished cache; run h2t extract to make one"
        )
    record = files.read_all(RECORD, MAX_RECORD_BYTES)
    commit = parse_record(record)
    files.expect({**commit.files, RECORD: (len(record), sha256(record))})
    try:
        sizes = files.known_sizes(commit.files)
        for name, size in sizes.items():
            _check_size(files, commit, name, size)
    finally:
        files.check_record()  # every file is pinned now; this makes sure that they belong to the record
    cache = Cache(files, commit)
    cache.unchecked = set(commit.files) - sizes.keys()
    return cache


class Cache:
    """An open cache. It can be read from several threads, in forked processes and after pickling.

    If another cache takes its place on disk, reading returns the old values or raises CacheError `replaced`, never a
    mixture. `close` (or `with`) waits for reads in progress, then releases the files; every later call raises
    CacheError `closed`.
    """

    def __init__(self, files: FileStore, commit: Commit) -> None:
        self.files = files
        self.commit = commit
        self.spec: CacheSpec = commit.spec
        #: Shards whose size is still to be checked, when their index is read.
        self.unchecked: set[str] = set()
        self._codec = codec(self.spec.codec)
        self._use = InUse(files)
        chunks = -(-self.spec.rows // self.spec.chunk_rows)
        try:
            self._indexed = np.zeros((self.experts, self.spec.shards), bool)
            self._offsets = np.zeros((self.experts, chunks), np.int64)
            self._sizes = np.zeros((self.experts, chunks), np.int64)
        except (MemoryError, ValueError):  # a hostile record, on a store whose sizes could not be checked against it
            raise CacheError(
                "full", f"{files}: not enough memory for the index of {chunks} chunks; check where this cache is from"
            ) from None
        self._start_pool()

    def __reduce__(self) -> tuple[Callable[..., "Cache"], tuple[Any, ...]]:
        with self._in_use():
            return _reopened, (self.files, self.commit, self.unchecked)

    def __enter__(self) -> "Cache":
        with self._in_use():
            return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for reads of other threads, then releases files and threads. Closing again does nothing."""
        forked = self._process != os.getpid()
        if forked:  # the parent's threads do not exist here
            self._use.after_fork()
            self.files.after_fork()
        self._use.close()
        if not forked:
            self._pool.shutdown()
        self.files.close()

    @property
    def experts(self) -> int:
        return self.spec.experts

    @property
    def rows(self) -> pa.Table:
        """The row table (`cache.format.rows.SCHEMA`); its row i describes row i of the maps. Raises as `read`."""
        with self._in_use():
            return self._rows

    @property
    def statistics(self) -> bytes:
        """The batch-norm statistics that the rows were computed with, as a safetensors file. Raises as `read`."""
        with self._in_use():
            return self._statistics

    def read(self, rows: Sequence[int] | np.ndarray, out: np.ndarray | None = None, expert: int = 0) -> np.ndarray:
        """Maps of `rows`, (len(rows), C, H, W) in the stored dtype and in the order of `rows`, which may repeat.

        `out`, if given, is a C-contiguous array of that shape and dtype; it is filled and returned. bfloat16 caches
        return their bits as uint16. Raises CacheError: `out-of-range`, `mismatch`, `damaged`, `missing`, `replaced`,
        `closed`, `unreachable`, `full`.
        """
        given = np.asarray(rows)
        if given.size and given.dtype.kind not in "iu":  # converting a mask or fractions would select other rows
            raise CacheError("out-of-range", f"rows: row numbers expected; got {given.dtype}")
        wanted = given.astype(np.int64, copy=False)
        if not 0 <= expert < self.experts:
            raise CacheError("out-of-range", f"expert: must be 0 to {self.experts - 1}; got {expert}")
        if wanted.ndim != 1:
            raise CacheError("out-of-range", f"rows: one dimension expected; got shape {wanted.shape}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.spec.rows):
            bad = wanted[(wanted < 0) | (wanted >= self.spec.rows)][0]
            raise CacheError("out-of-range", f"rows: must be 0 to {self.spec.rows - 1}; got {bad}")
        shape = (len(wanted), *self.spec.maps[expert])
        if out is None:
            out = np.empty(shape, self.spec.stored_dtype)
        elif out.shape != shape or out.dtype != self.spec.stored_dtype or not out.flags.c_contiguous:
            raise CacheError(
                "mismatch", f"out: contiguous {self.spec.stored_dtype} {shape} expected; got {out.dtype} {out.shape}"
            )
        with self._in_use():
            if wanted.size:
                self._gather(plan_rows(wanted, self.spec.chunk_rows), out, expert)
        return out

    def check_size(self, name: str, size: int) -> None:
        """Raises CacheError `damaged` unless `size` is the recorded size of `name`."""
        _check_size(self.files, self.commit, name, size)

    def chunk_ranges(self, chunks: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, offset and stored size in bytes of each of `chunks`, int64 (n,); reads missing shard indices."""
        with self._in_use():
            return self._chunk_ranges(chunks, expert)

    def chunk_fault(self, expert: int, chunk: int, what: str) -> CacheError:
        """The error for a damaged chunk; names its file, its number within the shard, and its rows."""
        shard, within = divmod(chunk, self.spec.chunks_per_shard)
        first = chunk * self.spec.chunk_rows
        last = min(first + self.spec.chunk_rows, self.spec.rows) - 1
        name = self.spec.shard_file(expert, shard)
        rows = numbered("row", first, last)
        return CacheError("damaged", f"{self.files}/{name}: chunk {within} ({rows}): {what}; run h2t cache verify")

    def once_more(self, name: str, job: Callable[[], T]) -> T:
        """The result of `job`, which reads the file `name`; behind a URL, damaged bytes are fetched a second time."""
        try:
            return job()
        except CacheError as error:
            if error.reason != "damaged" or self.files.local:
                raise
        self.files.forget(name)
        return job()

    @cached_property
    def _rows(self) -> pa.Table:
        return from_bytes(self._checked(ROWS), self.spec.rows)

    @cached_property
    def _statistics(self) -> bytes:
        return self._checked(STATISTICS)

    def _in_use(self) -> InUse:
        """The context in which every method uses files and threads; `close` waits for it."""
        if self._process != os.getpid():
            self._after_fork()
        return self._use

    def _checked(self, name: str) -> bytes:
        if name not in self.commit.files:
            raise CacheError("damaged", f"{self.files}/{name}: is not named in {RECORD}; run h2t cache verify")
        size, digest = self.commit.files[name]

        def whole() -> bytes:
            data = self.files.read_all(name, size)
            if sha256(data) != digest:
                raise CacheError("damaged", f"{self.files}/{name}: sha256 differs from {RECORD}; run h2t cache verify")
            return data

        return self.once_more(name, whole)

    def _chunk_ranges(self, chunks: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shards = chunks // self.spec.chunks_per_shard
        for shard in np.unique(shards[~self._indexed[expert, shards]]).tolist():
            self._read_index(expert, shard)
        return shards, self._offsets[expert, chunks], self._sizes[expert, chunks]

    def _read_index(self, expert: int, shard: int) -> None:
        spec = self.spec
        name, rows, slots = spec.shard_file(expert, shard), spec.shard_range(shard), spec.chunks_per_shard
        first = shard * slots
        used = -(-len(rows) // spec.chunk_rows)
        if name in self.unchecked:
            self.check_size(name, self.files.size(name))
            self.unchecked.discard(name)

        def parsed() -> tuple[np.ndarray, np.ndarray]:
            data = self.files.read_ranges(name, [(0, shard_layout.index_bytes(slots))])[0]
            shard_bytes, _ = self.commit.files[name]
            try:
                return shard_layout.parse_index(data, slots, used, shard_bytes, spec.chunk_bytes(expert))
            except CacheError as error:
                held = numbered("row", rows.start, rows.stop - 1)
                says = f"{self.files}/{name}: {error.detail} ({held}); run h2t cache verify"
                raise CacheError(error.reason, says) from None

        offsets, sizes = self.once_more(name, parsed)
        self._offsets[expert, first : first + used] = offsets
        self._sizes[expert, first : first + used] = sizes
        self._indexed[expert, shard] = True

    def _gather(self, plan: Plan, out: np.ndarray, expert: int) -> None:
        shards, offsets, sizes = self._chunk_ranges(plan.chunks, expert)
        local = self.files.local
        whole_rows = local and self.spec.chunk_rows == 1 and self.spec.codec == "none"
        if whole_rows and (gather := compiled()):
            work = portions(shards, sizes, portion_bytes=PORTION_BYTES, max_shards=PORTION_SHARDS)
            self._share_out(_Compiled(self, gather, expert, plan, shards, offsets, out), work)
            return
        runs = units(shards, offsets, sizes, max_gap=0 if whole_rows else MAX_GAP_BYTES)
        reads = sum(len(unit.runs) for unit in runs) if whole_rows else len(runs)
        # Remote reads wait for the network, so they always run in parallel.
        alone = local and sizes.sum() < PARALLEL_READ_BYTES * reads
        job = _InPlace(self, expert, plan, out) if whole_rows else _Decode(self, expert, plan, offsets, sizes, out)
        self._share_out(job, runs, alone=alone)

    def _after_fork(self) -> None:
        """Sets this cache up in a forked child, where the parent's threads do not exist."""
        with _FORK:
            if self._process != os.getpid():  # another thread of the child may have done it already
                self._use.after_fork()
                self.files.after_fork()
                self._start_pool()

    def _start_pool(self) -> None:
        """Starts threads that work beside the calling thread."""
        self._pool = ThreadPoolExecutor(max(1, THREADS - 1), "cache-read")
        self._process = os.getpid()

    def _share_out(self, job: Callable[[T], None], work: Sequence[T], *, alone: bool = False) -> None:
        """Runs `job` for every piece of `work`, in the thread pool or, if `alone`, in the calling thread."""
        if alone or len(work) == 1:
            _each(job, work)
            return
        shared = iter(work)
        # The calling thread works too; it starts before the others wake up.
        tasks = [self._pool.submit(_each, job, shared) for _ in range(min(THREADS, len(work)) - 1)]
        try:
            _each(job, shared)
        finally:
            wait(tasks)  # for all, because no thread may write to `out` after this function returns
        for task in tasks:
            task.result()


def _check_size(files: FileStore, commit: Commit, name: str, size: int) -> None:
    expected = commit.files[name][0]
    if size != expected:
        raise CacheError("damaged", f"{files}/{name}: {size} bytes, {RECORD} says {expected}; run h2t cache verify")


def _reopened(files: FileStore, commit: Commit, unchecked: set[str]) -> Cache:
    cache = Cache(files, commit)
    cache.unchecked = set(unchecked)
    return cache


def _each(job: Callable[[T], None], work: Iterable[T]) -> None:
    for piece in work:
        job(piece)


class _Compiled:
    """Reads one-row chunks with the compiled gather, each row directly into its slot of `out`."""

    def __init__(
        self,
        cache: Cache,
        gather: Gather,
        expert: int,
        plan: Plan,
        shards: np.ndarray,
        offsets: np.ndarray,
        out: np.ndarray,
    ) -> None:
        self.cache, self.gather, self.expert, self.plan, self.out = cache, gather, expert, plan, out
        self.shards, self.offsets = shards, offsets
        self.row_bytes = cache.spec.row_bytes(expert)
        self.slots = plan.leads() * self.row_bytes

    def __call__(self, portion: tuple[int, int]) -> None:
        files, spec = self.cache.files, self.cache.spec
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
                raise self.cache.chunk_fault(self.expert, int(self.plan.chunks[j]), "crc32c mismatch")
            if outcome.result == REFUSED:
                with files.in_one_line(name):
                    raise OSError(outcome.errno, os.strerror(outcome.errno), f"{files}/{name}")
            start = int(self.offsets[j])
            raise files.ends_early(name, start, start + self.row_bytes + shard_layout.CRC_BYTES)
        for slot, lead in self.plan.repeats(first, last):
            self.out[slot] = self.out[lead]


class _InPlace:
    """Does the work of `_Compiled` if that was not built: reads rows into their slots and checksums beside them."""

    def __init__(self, cache: Cache, expert: int, plan: Plan, out: np.ndarray) -> None:
        self.cache, self.expert, self.plan = cache, expert, plan
        self.rows = out.reshape(len(out), -1)
        self.bytes = self.rows.reshape(-1).view(np.uint8).data
        self.starts = plan.leads() * cache.spec.row_bytes(expert)

    def __call__(self, unit: Unit) -> None:
        cache, begin, count = self.cache, unit.first, unit.last - unit.first
        size = cache.spec.row_bytes(self.expert)
        slots = [self.bytes[at : at + size] for at in self.starts[unit.first : unit.last].tolist()]
        expected = np.empty(count, "<u4")
        sums = expected.view(np.uint8).data
        buffers = slots * 2
        buffers[0::2] = slots
        buffers[1::2] = [sums[at : at + 4] for at in range(0, 4 * count, 4)]
        assert isinstance(cache.files, LocalFiles)
        cache.files.read_into(
            cache.spec.shard_file(self.expert, unit.shard),
            ((start, stop, buffers[2 * (a - begin) : 2 * (b - begin)]) for a, b, start, stop in unit.runs),
        )
        wrong = np.flatnonzero(np.fromiter(map(crc32c, slots), np.uint32, count) != expected)
        if len(wrong):
            raise cache.chunk_fault(self.expert, int(self.plan.chunks[begin + wrong[0]]), "crc32c mismatch")
        for slot, lead in self.plan.repeats(unit.first, unit.last):
            self.rows[slot] = self.rows[lead]


class _Decode:
    """Reads, checks and decodes chunks: one-row chunks directly into their slots of `out`, others through a copy."""

    def __init__(
        self, cache: Cache, expert: int, plan: Plan, offsets: np.ndarray, sizes: np.ndarray, out: np.ndarray
    ) -> None:
        self.cache, self.expert, self.plan, self.out = cache, expert, plan, out
        self.offsets, self.sizes, self.leads = offsets.tolist(), sizes.tolist(), plan.leads().tolist()

    def __call__(self, unit: Unit) -> None:
        name = self.cache.spec.shard_file(self.expert, unit.shard)
        self.cache.once_more(name, partial(self._fill, name, unit))

    def _fill(self, name: str, unit: Unit) -> None:
        cache, plan, out = self.cache, self.plan, self.out
        whole_rows = cache.spec.chunk_rows == 1
        scratch = np.empty((0 if whole_rows else cache.spec.chunk_rows, *out.shape[1:]), out.dtype)
        fetched = cache.files.read_ranges(name, [(run.start, run.stop) for run in unit.runs])
        for run, data in zip(unit.runs, fetched, strict=True):
            view = memoryview(data)
            for j in range(run.first, run.last):
                begin = self.offsets[j] - run.start
                self._decode(j, view[begin : begin + self.sizes[j]], out[self.leads[j]] if whole_rows else scratch)
                if not whole_rows:
                    wanted = plan.order[plan.bounds[j] : plan.bounds[j + 1]]
                    out[wanted] = scratch[plan.within[wanted]]
        if whole_rows:
            for slot, lead in plan.repeats(unit.first, unit.last):
                out[slot] = out[lead]

    def _decode(self, j: int, stored: memoryview, target: np.ndarray) -> None:
        cache = self.cache
        if not shard_layout.holds(stored):
            raise cache.chunk_fault(self.expert, int(self.plan.chunks[j]), "crc32c mismatch")
        try:
            cache._codec.decode(stored[: -shard_layout.CRC_BYTES], target)
        except (ValueError, RuntimeError) as error:
            raise cache.chunk_fault(self.expert, int(self.plan.chunks[j]), f"cannot be decoded ({error})") from None
