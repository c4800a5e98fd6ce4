"""The bytes of a cache's files: a local directory here, anything behind a URL in `cache.remote`."""

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache import dvc_files
from cache.errors import CacheError
from cache.remote import RemoteFiles

NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
MAX_OPEN = 256  # file descriptors kept open per cache


class LocalFiles:
    """Files below a local directory; keeps a bounded number of descriptors open."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: OrderedDict[str, int] = OrderedDict()
        self._busy: dict[int, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["LocalFiles"], tuple[Path]]:
        return LocalFiles, (self.root,)

    def __str__(self) -> str:
        return str(self.root)

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of `name`; CacheError `missing` if it is not there."""
        with self.in_one_line(name):
            found = (self.root / name).stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device may never end
            raise CacheError("damaged", f"{self.root / name}: not a plain file")
        return found.st_size

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each of `names`; CacheError `missing` if one is not there."""
        return {name: self.size(name) for name in names}

    def read_all(self, name: str, at_most: int) -> bytes:
        """All bytes of `name`; CacheError `damaged` if there are more than `at_most`."""
        size = self.size(name)
        if size > at_most:
            raise CacheError("damaged", f"{self.root / name}: is longer than the {at_most} bytes that it may have")
        with self.in_one_line(name), (self.root / name).open("rb") as file:
            return file.read(size)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start` to `stop` of each range; a short read is CacheError `damaged`."""
        with self.handles([name]) as (handle,):
            found = [os.pread(handle, stop - start, start) for start, stop in ranges]
        for data, (start, stop) in zip(found, ranges, strict=True):
            if len(data) != stop - start:
                raise self.ends_early(name, start, stop)
        return found

    def read_into(self, name: str, pieces: Iterable[tuple[int, int, Sequence[Any]]]) -> None:
        """For each piece (start, stop, buffers), fills the buffers (at most 1024) one after the other with these bytes.

        One system call a piece, unless the kernel stops early. A file that ends too soon is CacheError `damaged`.
        """
        with self.handles([name]) as (handle,):
            for start, stop, buffers in pieces:
                position = start + os.preadv(handle, buffers, start)
                while position < stop:
                    got = os.preadv(handle, _after(buffers, position - start), position)
                    if got == 0:
                        raise self.ends_early(name, start, stop)
                    position += got

    @contextmanager
    def handles(self, names: Sequence[str]) -> Iterator[list[int]]:
        """Descriptors of `names`, open for reading while the context lasts; CacheError `missing`."""
        held: list[int] = []
        try:
            for name in names:
                held.append(self._acquire(name))  # noqa: PERF401 - those held when one fails are given back
            with self.in_one_line(names[0]):
                yield held
        finally:
            with self._lock:
                for handle in held:
                    self._busy[handle] -= 1
                    if not self._busy[handle]:
                        del self._busy[handle]

    def ends_early(self, name: str, start: int, stop: int) -> CacheError:
        """The error for a file that has no bytes left between `start` and `stop`."""
        return CacheError("damaged", f"{self.root / name}: ends before byte {stop} (reading from {start}); truncated")

    def close(self) -> None:
        with self._lock:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()

    def after_fork(self) -> None:
        """In a forked child: forgets what threads of the parent held, which do not exist here."""
        self._lock = threading.Lock()
        self._busy = {}

    @contextmanager
    def in_one_line(self, name: str) -> Iterator[None]:
        """Turns what the disk says of `name` into CacheError, where the file or the disk is to blame."""
        try:
            yield
        except OSError as error:
            if error.errno in NO_FILE:
                raise CacheError(
                    "missing", f"{self.root / name}: file is missing; restore it or extract again"
                ) from None
            if error.errno == errno.EIO:
                raise CacheError("damaged", f"{self.root / name}: cannot be read ({error.strerror})") from None
            raise

    def _acquire(self, name: str) -> int:
        with self._lock:
            handle = self._open.get(name)
            if handle is None:
                with self.in_one_line(name):
                    handle = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
                self._open[name] = handle
            self._open.move_to_end(name)
            self._busy[handle] = self._busy.get(handle, 0) + 1
            if len(self._open) > MAX_OPEN:
                idle = [key for key, fd in self._open.items() if not self._busy.get(fd)]
                for key in idle[: len(self._open) - MAX_OPEN]:
                    os.close(self._open.pop(key))
            return handle


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
