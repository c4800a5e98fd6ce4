"""The bytes of a cache's files: a local directory here, anything behind a URL in `cache.read.remote`."""

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
from h2t.cache.read import dvc_files
from h2t.cache.read.in_use import InUse
from h2t.cache.read.remote import RemoteFiles

NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
MAX_OPEN = 256  # file descriptors kept open per cache


#: What tells a file from another that takes its name: inode, bytes, time of the last change of its content (ns). Not
#: the device, which differs between machines that mount the same disk, and not ctime, which linking and chmod change.
Stamp = tuple[int, int, int]
#: A descriptor, with the bytes and the time of the last change that its file had when it was opened.
Opened = tuple[int, int, int]


class LocalFiles:
    """Files below a local directory; keeps a bounded number of descriptors open.

    The first look at a file pins it. Whoever looks again, in any thread and in any process that this object was handed
    to, must find the same file, or one of the bytes that the commit record names (`expect`); else CacheError
    `replaced`. So nothing that this object reads is mixed from two caches.
    """

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
        self._lock = threading.Lock()
        self._use = InUse(self)

    def __reduce__(self) -> tuple[type["LocalFiles"], tuple[Any, ...]]:
        with self._use:
            return LocalFiles, (self.root, dict(self._pins), self._recorded)

    def __str__(self) -> str:
        return str(self.root)

    def expect(self, recorded: Mapping[str, tuple[int, str]]) -> None:
        """Says what the record knows, name -> (bytes, sha256): another file of the same bytes may take a file's place.

        DVC does that when it links outputs anew, and some network file systems number their files anew.
        """
        self._recorded = recorded

    def exists(self, name: str) -> bool:
        with self._use:
            return (self.root / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of `name`; CacheError `missing` if it is not there, `replaced` if another file is."""
        with self._use, self.in_one_line(name):
            found = (self.root / name).stat()
            if not stat.S_ISREG(found.st_mode) or self._pins.setdefault(name, _stamp(found)) != _stamp(found):
                os.close(self._opened(name)[0])
            return found.st_size

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each of `names`; CacheError `missing` if one is not there."""
        return {name: self.size(name) for name in names}

    def read_all(self, name: str, at_most: int) -> bytes:
        """All bytes of `name`; CacheError `damaged` if there are more than `at_most`."""
        with self._use, self.in_one_line(name), os.fdopen(self._opened(name)[0], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= at_most:
                return file.read(size)
        raise CacheError("damaged", f"{self.root / name}: is longer than the {at_most} bytes that it may have")

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start` to `stop` of each range; a short read is CacheError `damaged`."""
        with self._unchanged(name) as handle:
            found = [os.pread(handle, stop - start, start) for start, stop in ranges]
            for data, (start, stop) in zip(found, ranges, strict=True):
                if len(data) != stop - start:
                    raise self.ends_early(name, start, stop)
        return found

    def read_into(self, name: str, pieces: Iterable[tuple[int, int, Sequence[Any]]]) -> None:
        """For each piece (start, stop, buffers), fills the buffers (at most 1024) one after the other with these bytes.

        One system call a piece, unless the kernel stops early. A file that ends too soon is CacheError `damaged`.
        """
        with self._unchanged(name) as handle:
            for start, stop, buffers in pieces:
                position = start + os.preadv(handle, buffers, start)
                while position < stop:
                    got = os.preadv(handle, _after(buffers, position - start), position)
                    if got == 0:
                        raise self.ends_early(name, start, stop)
                    position += got

    @contextmanager
    def handles(self, names: Sequence[str]) -> Iterator[list[Opened]]:
        """Descriptors of `names`, open for reading while the context lasts; CacheError `missing`, `replaced`.

        Whoever has read from one makes sure afterwards that its file is as it was when it was opened.
        """
        with self._use:
            held: list[Opened] = []
            try:
                with self._lock:
                    for name in names:
                        held.append(self._acquire(name))  # noqa: PERF401 - those held when one fails are given back
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
        """A descriptor of `name`; on leaving, its file must be as it was when it was opened."""
        with self.handles([name]) as (opened,):
            try:
                yield opened[0]
            except CacheError:
                self._check_unchanged(name, opened)  # the better reason
                raise
            self._check_unchanged(name, opened)

    def _check_unchanged(self, name: str, opened: Opened) -> None:
        handle, *before = opened
        now = os.fstat(handle)
        if [now.st_size, now.st_mtime_ns] != before:
            raise self.replaced(name)

    def ends_early(self, name: str, start: int, stop: int) -> CacheError:
        """The error for a file that has no bytes left between `start` and `stop`."""
        return CacheError("damaged", f"{self.root / name}: ends before byte {stop} (reading from {start}); truncated")

    def replaced(self, name: str) -> CacheError:
        """The error for a file that is not, or no longer, what was opened."""
        what = "was replaced, changed or removed after this cache was opened"
        return CacheError("replaced", f"{self.root / name}: {what}; open what is there now")

    def close(self) -> None:
        """Waits for those who read, then closes all descriptors; whoever comes later gets CacheError `closed`."""
        self._use.close()
        with self._lock:
            for handle, *_ in self._open.values():
                os.close(handle)
            self._open.clear()

    def after_fork(self) -> None:
        """In a forked child: forgets what threads of the parent held, which do not exist here."""
        self._lock = threading.Lock()
        self._busy = {}
        self._use.after_fork()

    @contextmanager
    def in_one_line(self, name: str) -> Iterator[None]:
        """Turns what the disk says of `name` into CacheError, where the file or the disk is to blame."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ESTALE or (error.errno in NO_FILE and name in self._pins):
                raise self.replaced(name) from None
            if error.errno in NO_FILE:
                raise CacheError(
                    "missing", f"{self.root / name}: file is missing; restore it or extract again"
                ) from None
            if error.errno == errno.EIO:
                raise CacheError("damaged", f"{self.root / name}: cannot be read ({error.strerror})") from None
            raise

    def _acquire(self, name: str) -> Opened:
        found = self._open.get(name)
        if found is None:
            with self.in_one_line(name):
                found = self._open[name] = self._opened(name)
        else:
            self._open.move_to_end(name)
        self._busy[found[0]] = self._busy.get(found[0], 0) + 1
        return found

    def _close_idle(self) -> None:
        """Closes the descriptors unused for longest, as far as there are too many."""
        if len(self._open) > MAX_OPEN:
            idle = [name for name, (handle, *_) in self._open.items() if not self._busy.get(handle)]
            for name in idle[: len(self._open) - MAX_OPEN]:
                os.close(self._open.pop(name)[0])

    def _opened(self, name: str) -> Opened:
        """A new descriptor of `name`. Raises CacheError `replaced` unless it is that of the pinned file."""
        # A pipe would be waited for without O_NONBLOCK; plain files do not know it.
        handle = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):  # a device may never end
                raise (
                    self.replaced(name)
                    if name in self._pins
                    else CacheError("damaged", f"{self.root / name}: not a plain file")
                )
            stamp = _stamp(found)
            if self._pins.setdefault(name, stamp) != stamp:
                if not self._has_recorded_bytes(name, handle):
                    raise self.replaced(name)
                self._pins[name] = stamp
        except BaseException:
            os.close(handle)
            raise
        return handle, found.st_size, found.st_mtime_ns

    def _has_recorded_bytes(self, name: str, handle: int) -> bool:
        size, digest = self._recorded.get(name, (-1, ""))
        if os.fstat(handle).st_size != size:
            return False
        with os.fdopen(handle, "rb", closefd=False) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        os.lseek(handle, 0, os.SEEK_SET)  # for whoever reads on
        return found == digest


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _after(buffers: Sequence[Any], done: int) -> list[Any]:
    """What is left of `buffers` once the first `done` bytes are filled."""
    rest = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
        else:
            rest.append(memoryview(buffer)[done:])
            done = 0
    return rest


def files_at(location: str | Path) -> LocalFiles | RemoteFiles:
    """The files of the cache at a path or URL."""
    text = str(location)
    if text.startswith(dvc_files.PREFIX):
        return dvc_files.DvcFiles(text)
    if "://" in text and not text.startswith("file://"):
        return RemoteFiles(text)
    return LocalFiles(Path(text.removeprefix("file://")))
