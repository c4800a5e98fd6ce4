"""Reads committed caches: any rows in any order, each chunk read once and checked.

    cache = open_cache("data/extract/ce_mixup")
    maps = cache.read([3, 1, 3])            # (3, C, H, W), in this order

Each shard index is read once and kept. `read.plan` turns the rows into byte ranges, a small thread pool reads them, and
the crc32c of every chunk is checked before its values are returned. Uncompressed rows that are their own chunk are read
from a local file directly into the result, if the compiled gather was built.
"""

import io
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.format.row_index import RowIndex, read_index
from h2t.cache.format.rows import SCHEMA, read_rows, read_table
from h2t.cache.format.spec import MAX_RECORD_BYTES, RECORD, ROWS, STATISTICS, CacheSpec, Commit, parse_record, sha256
from h2t.cache.machine import open_files
from h2t.cache.read.chunks import Chunks, check_size
from h2t.cache.read.elsewhere import check_fingerprint, elsewhere
from h2t.cache.read.files import files_at
from h2t.cache.read.gather import compiled
from h2t.cache.read.in_use import InUse
from h2t.cache.read.jobs import Compiled, Decode
from h2t.cache.read.plan import Plan, in_turns, plan_rows, portions, units
from h2t.cache.read.store import FileStore
from h2t.cache.read.stored_file import StoredFile

T = TypeVar("T")

#: A row table up to this size is kept in memory as it is in the file: a million rows, or two.
KEPT_BYTES = 64 * 1024 * 1024

#: Held while a forked child sets up a cache. Also held around every fork, so that the child never inherits it locked.
_FORK = threading.RLock()
os.register_at_fork(before=_FORK.acquire, after_in_parent=_FORK.release, after_in_child=_FORK.release)

THREADS = min(4, os.cpu_count() or 1)
#: A remote cache is read by more threads and in larger pieces, as a server's answers take time. At most 32 MiB are
#: under way, or 128 MiB if blocks are kept on the disk.
REMOTE_THREADS = 8
REMOTE_UNIT_BYTES = 4 * 1024 * 1024
#: With fewer bytes per system call, passing the GIL between threads costs more than a second core gains.
PARALLEL_READ_BYTES = 64 * 1024
#: The compiled gather releases the GIL. One portion takes a thread 0.5 ms, far longer than passing the GIL.
PORTION_BYTES = 1024 * 1024
#: Files that one portion keeps open; those of all threads together must stay below the limit of the process.
PORTION_SHARDS = 128


def open_cache(location: str | Path, *, fingerprint: str | None = None) -> "Cache":
    """The committed cache in a directory, at an fsspec URL or at a `dvc+` address; `fingerprint`: the one it must have.

    Raises CacheError: `uncommitted` if there is no commit record, `newer-format`, `missing` if a file is, `damaged` if
    the record is invalid or a file has another size than recorded, `mismatch` if the fingerprint is another, `replaced`
    if the cache is replaced meanwhile, `unreachable`, `full`. Values are checked when they are read. So are the sizes
    of shards if a remote store needs one request for each.
    """
    there = elsewhere(location)
    files = files_at(location)
    if not files.exists(RECORD):
        what = f"no {RECORD}, so this is not a finished cache; run h2t extract to make one"
        if _is_begun(there.url if there else location):
            what = f"is unfinished: no {RECORD} yet; wait for its writer, or run the same command again"
        raise CacheError("uncommitted", f"{files}: {what}")
    record = files.read_all(RECORD, MAX_RECORD_BYTES)
    commit = parse_record(record)
    check_fingerprint(files, commit.spec, fingerprint or (there.fingerprint if there else None))
    files.expect({**commit.files, RECORD: (len(record), sha256(record))})
    try:
        sizes = files.known_sizes(commit.files)
        for name, size in sizes.items():
            check_size(files, commit, name, size)
    finally:
        files.check_record()  # every file is pinned now; this makes sure that they belong to the record
    return Cache(files, commit, set(commit.files) - sizes.keys())


def _is_begun(location: str | Path) -> bool:
    """Whether the staging folder of a cache lies beside `location`."""
    parent, slash, name = str(location).rstrip("/").rpartition("/")
    if not name or "?" in name or parent.startswith("dvc+"):
        return False
    with suppress(CacheError):
        return files_at(f"{parent}{slash}.{name}.staging").exists("token.json")
    return False


class Cache:
    """An open cache. It can be read from several threads, in forked processes and after pickling.

    If another cache takes its place on disk, reading returns the old values or raises CacheError `replaced`, never a
    mixture. `close` (or `with`) waits for reads in progress, then releases the files; every later call raises
    CacheError `closed`.
    """

    def __init__(self, files: FileStore, commit: Commit, unchecked: Collection[str] = ()) -> None:
        self.files = files
        self.commit = commit
        self.spec: CacheSpec = commit.spec
        self._chunks = Chunks(files, commit, unchecked)
        self._use = InUse(files)
        self._start_pool()

    def __repr__(self) -> str:
        """Where it is and what it holds, without reading anything."""
        spec = self.spec
        maps = ", ".join(" x ".join(map(str, shape)) for shape in spec.maps)
        return f"<Cache {self.files}: {spec.rows:,} rows of {maps} {spec.dtype}, {spec.codec}, {spec.fingerprint[:12]}>"

    def __reduce__(self) -> tuple[Callable[..., "Cache"], tuple[Any, ...]]:
        with self._in_use():
            return Cache, (self.files, self.commit, self._chunks.unchecked)

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
        """The whole row table (`cache.format.rows.SCHEMA`); its row i describes row i of the maps.

        It takes about 130 bytes of memory a row; `index` and `lines` do with less. Raises as `read`.
        """
        with self._in_use():
            return self._rows

    @property
    def index(self) -> RowIndex:
        """Split, statistics, class and sample of every row, in 4 to 8 bytes of memory a row. Raises as `read`."""
        with self._in_use():
            return self._index

    def lines(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """The lines of `rows` (n,) of the row table, in this order. Raises as `read`."""
        with self._in_use():
            return read_rows(self._row_file(), self.spec.rows, self._wanted(rows), columns)

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
        wanted = self._wanted(rows)
        if not 0 <= expert < self.experts:
            raise CacheError("out-of-range", f"expert: must be 0 to {self.experts - 1}; got {expert}")
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

    def chunk_ranges(self, chunks: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, offset and stored size in bytes of each of `chunks`, int64 (n,). Raises as `read`."""
        with self._in_use():
            return self._ranges(chunks, expert)

    def chunk_fault(self, expert: int, chunk: int, what: str) -> CacheError:
        """The error for a damaged chunk; names its file, its number within the shard, and its rows."""
        return self._chunks.fault(expert, chunk, what)

    def _wanted(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """`rows` as int64 (n,). Raises CacheError `out-of-range` unless they are row numbers of this cache."""
        given = np.asarray(rows)
        if given.size and given.dtype.kind not in "iu":  # converting a mask or fractions would select other rows
            raise CacheError("out-of-range", f"rows: row numbers expected; got {given.dtype}")
        wanted = given.astype(np.int64, copy=False)
        if wanted.ndim != 1:
            raise CacheError("out-of-range", f"rows: one dimension expected; got shape {wanted.shape}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.spec.rows):
            bad = wanted[(wanted < 0) | (wanted >= self.spec.rows)][0]
            raise CacheError("out-of-range", f"rows: must be 0 to {self.spec.rows - 1}; got {bad}")
        return wanted

    @cached_property
    def _rows(self) -> pa.Table:
        return read_table(self._row_file(), self.spec.rows)

    @cached_property
    def _index(self) -> RowIndex:
        return read_index(self._row_file(), self.spec.rows)

    def _row_file(self) -> BinaryIO:
        """The file of the row table, checked against the commit record and at its start."""
        if self._small_row_file is not None:
            return io.BytesIO(self._small_row_file)
        return cast("BinaryIO", StoredFile(self.files, ROWS, self.commit.files[ROWS][0]))

    @cached_property
    def _small_row_file(self) -> bytes | None:
        """The bytes of the row table, or None if they are many: then they are checked and stay in the store."""
        if self.commit.files.get(ROWS, (0, ""))[0] <= KEPT_BYTES:
            return self._chunks.whole_file(ROWS)
        self._chunks.check_file(ROWS)
        return None

    @cached_property
    def _statistics(self) -> bytes:
        return self._chunks.whole_file(STATISTICS)

    def _in_use(self) -> InUse:
        """The context in which every method uses files and threads; `close` waits for it."""
        if self._process != os.getpid():
            self._after_fork()
        return self._use

    def _gather(self, plan: Plan, out: np.ndarray, expert: int) -> None:
        shards, offsets, sizes = self._ranges(plan.chunks, expert)
        local = self.files.local
        plain = self.spec.codec == "none"
        if local and plain and self.spec.chunk_rows == 1 and (gather := compiled()):
            at_once = max(1, min(PORTION_SHARDS, open_files() // 8))
            parts = portions(shards, sizes, portion_bytes=PORTION_BYTES, max_shards=at_once)
            self._share_out(Compiled(self._chunks, gather, expert, plan, shards, offsets, out), parts)
            return
        if local:
            work = units(shards, offsets, sizes)
            calls = sum(len(unit.runs) for unit in work) if plain else len(work)  # decoding needs no GIL
            alone = sizes.sum() < PARALLEL_READ_BYTES * calls
        else:
            work, alone = in_turns(units(shards, offsets, sizes, unit_bytes=REMOTE_UNIT_BYTES)), False
        self._share_out(Decode(self._chunks, expert, plan, offsets, sizes, out), work, alone=alone)

    def _ranges(self, chunks: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        missing = self._chunks.without_index(chunks, expert)
        self._share_out(partial(self._chunks.read_index, expert), missing, alone=self.files.local)
        return self._chunks.ranges(chunks, expert)

    def _after_fork(self) -> None:
        """Sets this cache up in a forked child, where the parent's threads do not exist."""
        with _FORK:
            if self._process != os.getpid():  # another thread of the child may have done it already
                self._use.after_fork()
                self.files.after_fork()
                self._start_pool()

    def _start_pool(self) -> None:
        """Starts threads that work beside the calling thread."""
        self._threads = THREADS if self.files.local else REMOTE_THREADS
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "cache-read")
        self._process = os.getpid()

    def _share_out(self, job: Callable[[T], None], work: Sequence[T], *, alone: bool = False) -> None:
        """Runs `job` for every piece of `work`, in the thread pool or, if `alone`, in the calling thread."""
        if alone or len(work) == 1:
            _each(job, work)
            return
        shared = iter(work)
        # The calling thread works too; it starts before the others wake up.
        tasks = [self._pool.submit(_each, job, shared) for _ in range(min(self._threads, len(work)) - 1)]
        try:
            _each(job, shared)
        finally:
            wait(tasks)  # for all, because no thread may write to `out` after this function returns
        for task in tasks:
            task.result()


def _each(job: Callable[[T], None], work: Iterable[T]) -> None:
    """Runs `job` for what is left of `work`, which threads may share. After an error none begins another piece."""
    try:
        for piece in work:
            job(piece)
    except BaseException:
        for _ in work:
            pass
        raise
