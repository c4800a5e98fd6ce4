"""The bytes of a cache's files: a local directory, or any fsspec URL read by ranges."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache.errors import CacheError

MAX_OPEN = 256  # file descriptors kept open per cache


class LocalFiles:
    """Files below a local directory; keeps a bounded number of descriptors open."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: OrderedDict[str, int] = OrderedDict()
        self._busy: dict[int, int] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self.root)

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of `name`; CacheError `missing` if it is not there."""
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError("missing", f"{self.root / name}: file is missing; restore it or extract again") from None

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each of `names`; CacheError `missing` if one is not there."""
        return {name: self.size(name) for name in names}

    def read_all(self, name: str) -> bytes:
        self.size(name)
        return (self.root / name).read_bytes()

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start` to `stop` of each range; a short read is CacheError `damaged`."""
        handle = self._acquire(name)
        try:
            found = [os.pread(handle, stop - start, start) for start, stop in ranges]
        finally:
            self._release(handle)
        for data, (start, stop) in zip(found, ranges, strict=True):
            if len(data) != stop - start:
                raise self._short(name, start, stop)
        return found

    def read_into(self, name: str, pieces: Iterable[tuple[int, int, Sequence[Any]]]) -> None:
        """For each piece (start, stop, buffers), fills the buffers (at most 1024) one after the other with these bytes.

        One system call a piece, unless the kernel stops early. A file that ends too soon is CacheError `damaged`.
        """
        handle = self._acquire(name)
        try:
            for start, stop, buffers in pieces:
                position = start + os.preadv(handle, buffers, start)
                while position < stop:
                    got = os.preadv(handle, _after(buffers, position - start), position)
                    if got == 0:
                        raise self._short(name, start, stop)
                    position += got
        finally:
            self._release(handle)

    def close(self) -> None:
        with self._lock:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()

    def _short(self, name: str, start: int, stop: int) -> CacheError:
        return CacheError("damaged", f"{self.root / name}: ends before byte {stop} (reading from {start}); truncated")

    def _acquire(self, name: str) -> int:
        with self._lock:
            handle = self._open.get(name)
            if handle is None:
                self.size(name)
                handle = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
                self._open[name] = handle
            self._open.move_to_end(name)
            self._busy[handle] = self._busy.get(handle, 0) + 1
            if len(self._open) > MAX_OPEN:
                idle = [key for key, fd in self._open.items() if not self._busy.get(fd)]
                for key in idle[: len(self._open) - MAX_OPEN]:
                    os.close(self._open.pop(key))
            return handle

    def _release(self, handle: int) -> None:
        with self._lock:
            self._busy[handle] -= 1
            if not self._busy[handle]:
                del self._busy[handle]


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


class RemoteFiles:
    """Files below an fsspec URL (`s3://`, `ssh://`, `https://`, `memory://`), read by ranges.

    What a store raises becomes CacheError: `missing`, `damaged` where it sends other than the bytes asked for, else
    `unreachable`.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._url = url

    def __str__(self) -> str:
        return self._url

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        with self._answering(name):
            return bool(self._fs.exists(self._path(name)))

    def size(self, name: str) -> int:
        with self._answering(name):
            found = self._fs.size(self._path(name))
        return len(self.read_all(name)) if found is None else int(found)

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of `names` that a listing of their folder tells, one request a folder and not one a file.

        Where a listing gives no sizes (web servers), its folder's files are left out. CacheError `missing` for a file
        that is not there.
        """
        found = {}
        listings: dict[str, dict[str, int]] = {}
        for name in names:
            folder = name.rpartition("/")[0]
            if folder not in listings:
                listings[folder] = self._listing(folder)
            if listings[folder]:
                # Asked for by itself before it counts as missing: some listings lag behind.
                found[name] = listings[folder].get(name) or self.size(name)
        return found

    def _listing(self, folder: str) -> dict[str, int]:
        """Sizes of the files in `folder`; empty where the store cannot tell those of all of them."""
        path = self._path(folder).rstrip("/")
        try:
            self._fs.invalidate_cache(path)
            entries = [entry for entry in self._fs.ls(path, detail=True) if entry["type"] == "file"]
        except Exception:  # noqa: BLE001 - each store refuses in its own words; the files are asked for one by one then
            return {}
        sizes = {str(entry["name"]).rpartition("/")[2]: entry.get("size") for entry in entries}
        if any(size is None for size in sizes.values()):
            return {}
        return {f"{folder}/{base}".lstrip("/"): int(size) for base, size in sizes.items() if size is not None}

    def read_all(self, name: str) -> bytes:
        with self._answering(name):
            return bytes(self._fs.cat_file(self._path(name)))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start` to `stop` of each range; fewer or more of them are CacheError `damaged`."""
        path = self._path(name)
        with self._answering(name):
            found = self._fs.cat_ranges([path] * len(ranges), [r[0] for r in ranges], [r[1] for r in ranges])
            for data in found:
                if isinstance(data, Exception):  # fsspec gives errors in place of the bytes
                    raise data
        for data, (start, stop) in zip(found, ranges, strict=True):
            if len(data) != stop - start:
                raise CacheError(
                    "damaged", f"{self._url}/{name}: bytes {start} to {stop} were asked for, {len(data)} bytes came"
                )
        return [bytes(data) for data in found]

    @contextmanager
    def _answering(self, name: str) -> Iterator[None]:
        where = f"{self._url}/{name}"
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError("missing", f"{where}: file is missing") from None
        except Exception as error:  # noqa: BLE001 - each store fails in its own words
            if getattr(error, "status", None) == 416:  # HTTP: the range lies beyond the end
                raise CacheError("damaged", f"{where}: is shorter than its index or record says") from None
            said = " ".join(str(error).split()) or type(error).__name__
            raise CacheError("unreachable", f"{where}: the store did not answer ({said}); try again") from None

    def close(self) -> None:
        """Nothing is held open."""


def files_at(location: str | Path) -> LocalFiles | RemoteFiles:
    """The files of the cache at a path or URL."""
    text = str(location)
    if "://" in text and not text.startswith("file://"):
        return RemoteFiles(text)
    return LocalFiles(Path(text.removeprefix("file://")))
