"""The files of a cache in a local directory, and `files_at`, which picks the store for a path or URL."""

import errno
import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD
from h2t.cache.machine import open_files
from h2t.cache.read.elsewhere import elsewhere
from h2t.cache.read.in_use import InUse
from h2t.cache.read.store import FileStore

NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
MAX_OPEN = 256  # file descriptors kept open per cache; fewer where the process may open few


#: Identifies a file: inode, size in bytes, mtime in ns. Not its device, which differs between machines that mount the
#: same disk, and not its ctime, which linking and chmod change.
Stamp = tuple[int, int, int]
#: A file descriptor, and the size in bytes and mtime in ns that its file had when it was opened.
Opened = tuple[int, int, int]


class LocalFiles(FileStore):
    """The files below a local directory; at most `MAX_OPEN` descriptors, and a fourth of those that
    the process may have, stay open while unused.

    The first access pins a file. Later accesses, in any thread and in any process that received this object, must find
    the same file or one with the sha256 in the commit record (`expect`); else they raise CacheError `replaced`. So
    reads never mix two caches.
    """

    local = True

    def __init__(
        self,
        root: Path,
        pins: Mapping[str, Stamp] | None = None,
        recorded: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self.root = root
        self._pins: dict[str, Stamp] = dict(pins or {})
        self._recorded: Mapping[str, tuple[int, str]] = recorded or {}
        self._open: OrderedDict[str, Opened] = OrderedDict()
        self._busy: dict[int, int] = {}
        self._most = min(MAX_OPEN, open_files() // 4)
        self._lock = threading.Lock()
        self._use = InUse(self)

    def __reduce__(self) -> tuple[type["LocalFiles"], tuple[Any, ...]]:
        with self._use:
            return LocalFiles, (self.root, dict(self._pins), self._recorded)

    def __str__(self) -> str:
        return str(self.root)

    def expect(self, recorded: Mapping[str, tuple[int, str]]) -> None:
        """Takes name -> (bytes, sha256) from the commit record: a file may be replaced by one with the same bytes.

        DVC does that when it links outputs again, and some network file systems change inode numbers.
        """
        self._recorded = recorded

    def check_record(self) -> None:
        self.size(RECORD)

    def exists(self, name: str) -> bool:
        with self._use:
            return (self.root / name).is_file()

    def size(self, name: str) -> int:
        """Size of `name` in bytes. Raises CacheError `missing`, `damaged` if it is not a plain file, `replaced`."""
        with self._use, self.in_one_line(name):
            now = (self.root / name).stat()
            if not stat.S_ISREG(now.st_mode) or self._pins.setdefault(name, _stamp(now)) != _stamp(now):
                os.close(self._opened(name)[0])  # raises, unless the file has the recorded sha256
            return now.st_size

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.size(name) for name in names}

    def names(self) -> set[str]:
        names = set()
        for folder, folders, files in os.walk(self.root):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
            names |= {Path(folder, name).relative_to(self.root).as_posix() for name in [*files, *links]}
        return names

    def read_all(self, name: str, at_most: int) -> bytes:
        with self._use, self.in_one_line(name), os.fdopen(self._opened(name)[0], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= at_most:
                return file.read(size)
        raise CacheError("damaged", f"{self.root / name}: must be at most {at_most} bytes; it is longer")

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        with self._unchanged(name) as handle:
            parts = [os.pread(handle, stop - start, start) for start, stop in ranges]
            for data, (start, stop) in zip(parts, ranges, strict=True):
                if len(data) != stop - start:
                    raise self.ends_early(name, start, stop)
        return parts

    @contextmanager
    def handles(self, names: Sequence[str]) -> Iterator[list[Opened]]:
        """Descriptors of `names`, open for reading inside the context. Raises CacheError `missing`, `replaced`.

        After reading, the caller must check that each file still has the size and mtime it was opened with.
        """
        with self._use:
            held: list[Opened] = []
            try:
                with self._lock:
                    for name in names:
                        held.append(self._acquire(name))  # noqa: PERF401 - if one fails, the others are released below
                    self._close_idle()
                with self.in_one_line(names[0]):
                    yield held
            finally:
                with self._lock:
                    for handle, *_ in held:
                        self._busy[handle] -= 1
                        if not self._busy[handle]:
                            del self._busy[handle]

    @contextmanager
    def _unchanged(self, name: str) -> Iterator[int]:
        """A descriptor of `name`. Raises CacheError `replaced` on exit if the file changed since it was opened."""
        with self.handles([name]) as (opened,):
            try:
                yield opened[0]
            except CacheError:
                self._check_unchanged(name, opened)  # `replaced` explains the failure better
                raise
            self._check_unchanged(name, opened)

    def _check_unchanged(self, name: str, opened: Opened) -> None:
        handle, *before = opened
        now = os.fstat(handle)
        if [now.st_size, now.st_mtime_ns] != before:
            raise self.replaced(name)

    def ends_early(self, name: str, start: int, stop: int) -> CacheError:
        """The error for a file that ends before `stop` in a read that began at `start`."""
        return CacheError(
            "damaged",
            f"{self.root / name}: truncated, it ends before byte {stop} (read from byte {start}); restore it from a "
            "copy, or run h2t extract again",
        )

    def replaced(self, name: str) -> CacheError:
        """The error for a file that is no longer the one that was opened."""
        what = "was replaced, changed or removed after this cache was opened"
        return CacheError("replaced", f"{self.root / name}: {what}; open the cache again")

    def close(self) -> None:
        """Waits for reads in progress, then closes all descriptors. Later calls raise CacheError `closed`."""
        self._use.close()
        with self._lock:
            for handle, *_ in self._open.values():
                os.close(handle)
            self._open.clear()

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._busy = {}
        self._use.after_fork()

    @contextmanager
    def in_one_line(self, name: str) -> Iterator[None]:
        """Turns errors of the system about `name` into CacheError `missing`, `replaced` or `damaged`."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ESTALE or (error.errno in NO_FILE and name in self._pins):
                raise self.replaced(name) from None
            if error.errno in NO_FILE:
                raise CacheError(
                    "missing", f"{self.root / name}: file is missing; restore it from a copy, or run h2t extract again"
                ) from None
            if error.errno == errno.EIO:
                raise CacheError(
                    "damaged", f"{self.root / name}: cannot be read ({error.strerror}); check the disk, or use a copy"
                ) from None
            raise

    def _acquire(self, name: str) -> Opened:
        opened = self._open.get(name)
        if opened is None:
            with self.in_one_line(name):
                opened = self._open[name] = self._opened(name)
        else:
            self._open.move_to_end(name)
        self._busy[opened[0]] = self._busy.get(opened[0], 0) + 1
        return opened

    def _close_idle(self) -> None:
        """Closes the least recently used idle descriptors until at most `_most` are left."""
        if len(self._open) > self._most:
            idle = [name for name, (handle, *_) in self._open.items() if not self._busy.get(handle)]
            for name in idle[: len(self._open) - self._most]:
                os.close(self._open.pop(name)[0])

    def _opened(self, name: str) -> Opened:
        """A new descriptor of `name`. Raises CacheError `replaced` if it is not the pinned file."""
        # O_NONBLOCK keeps a named pipe from blocking; it does nothing for plain files.
        handle = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            now = os.fstat(handle)
            if not stat.S_ISREG(now.st_mode):  # a device may never end
                raise (
                    self.replaced(name)
                    if name in self._pins
                    else CacheError("damaged", f"{self.root / name}: not a plain file; put the cache's file there")
                )
            stamp = _stamp(now)
            if self._pins.setdefault(name, stamp) != stamp:
                if not self._has_recorded_bytes(name, handle):
                    raise self.replaced(name)
                self._pins[name] = stamp
        except BaseException:
            os.close(handle)
            raise
        return handle, now.st_size, now.st_mtime_ns

    def _has_recorded_bytes(self, name: str, handle: int) -> bool:
        size, digest = self._recorded.get(name, (-1, ""))
        if os.fstat(handle).st_size != size:
            return False
        with os.fdopen(handle, "rb", closefd=False) as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        os.lseek(handle, 0, os.SEEK_SET)  # the caller may read from the start
        return actual == digest


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def files_at(location: str | Path) -> FileStore:
    """The files of the cache at a path, an fsspec URL or a `dvc+` address; raises CacheError `unreachable`.

    For a directory that stands for a cache elsewhere (`read.elsewhere`), the files of that cache.
    """
    there = elsewhere(location)
    text = there.url if there else str(location)
    # Imported here: the code for servers takes as long to import as all the rest of the reader.
    if text.startswith("dvc+"):
        from h2t.cache.read.dvc_files import DvcFiles

        return DvcFiles(text)
    if "://" in text and not text.startswith("file://"):
        from h2t.cache.read.remote import RemoteFiles

        return RemoteFiles(text)
    return LocalFiles(Path(text.removeprefix("file://")))
