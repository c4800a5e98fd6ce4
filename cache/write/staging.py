"""The staging directory in which a cache is built: locked, beside the target, and kept between attempts.

It is not a DVC output, because DVC deletes outputs before a run. It is on the target's file system, so publishing is
one rename. A process holds its lock as long as it works there.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from h2t.cache.errors import NO_PLACE, CacheError
from h2t.cache.machine import LITTER, flush


def sync(path: Path) -> None:
    """Syncs `path` to disk, so that its content (for a directory: new and renamed entries) survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def of_the_disk(error: OSError, what: Path) -> CacheError | None:
    """`error` as CacheError `full` or `unwritable`; None if the cause is not the disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        way_out = "finished shards are kept; free space and run the same command again"
        return CacheError("full", f"{what}: no space left; {way_out}")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        why = os.strerror(error.errno).lower()
        return CacheError("unwritable", f"{what}: {why}; make it writable or choose another path, then run again")
    return None


@contextmanager
def bad_disk_is_one_line(what: Path) -> Iterator[None]:
    """Turns disk errors into CacheError `full` or `unwritable`; other errors of the system pass through."""
    try:
        yield
    except OSError as error:
        if (known := of_the_disk(error, what)) is None:
            raise
        raise known from None


@contextmanager
def durable_file(path: Path, partial: str | None = None) -> Iterator[BinaryIO]:
    """A file to write into, which becomes `path` once it is complete; the rest as `write_durably`."""
    unfinished = path.with_name(partial or f"{path.name}.partial")
    with bad_disk_is_one_line(path):
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                flush(file.fileno())
            unfinished.replace(path)
            sync(path.parent)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


def write_durably(path: Path, data: bytes | memoryview, partial: str | None = None) -> None:
    """Writes `data` to `path` atomically: the path holds either the old content or all of the new, and it is synced.

    Until then it is in the file `partial` beside it, by default `<name>.partial`; processes that may write the same
    path at once need different ones. Raises CacheError `full` or `unwritable`.
    """
    with durable_file(path, partial) as file:
        file.write(data)


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        flush(file.fileno())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(handle: int, path: Path, what: str, *, shared: bool = False) -> None:
    """Locks the open file `handle`, or closes it and raises CacheError `busy`."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise CacheError(
            "busy", f"{path}: another process is writing this {what}; wait until it ends, or stop it"
        ) from None


class Staging:
    """The staging directory of the cache `target`; a context manager that holds its lock.

    With `shared`, processes that each write a part (`cache.write.parts`) hold it together; a process that writes or
    commits the whole cache holds it alone. Raises CacheError `busy` if another process is writing the cache, `full` or
    `unwritable` if the disk is.
    """

    def __init__(self, target: Path, *, shared: bool = False) -> None:
        self.target = Path(target)
        self.shared = shared
        self.root = self.target.parent / f".{self.target.name}.staging"
        self.cache = self.root / "cache"
        self._done = self.target.parent / f"{self.root.name}.done"
        self._lock: int | None = None

    def __enter__(self) -> "Staging":
        with bad_disk_is_one_line(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if error.errno not in NO_PLACE:
                    raise
                why = os.strerror(error.errno).lower()
                raise CacheError(
                    "unwritable", f"{self.target}: cannot be created ({why}); choose another path"
                ) from None
            try:
                handle = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another process published and removed the directory since mkdir
                return self.__enter__()
        _lock(handle, self.root, "cache", shared=self.shared)
        # Another process may have removed the directory between our open and our lock.
        if not (self.root / "lock").exists() or os.fstat(handle).st_ino != (self.root / "lock").stat().st_ino:
            os.close(handle)
            return self.__enter__()
        self._lock = handle
        if not self.shared and (self.root / "replaced").exists() and not self.target.exists():
            (self.root / "replaced").rename(self.target)  # `publish` was killed between its two renames
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(error, OSError) and (known := of_the_disk(error, Path(error.filename or self.root))):
            raise known from None

    @contextmanager
    def holding(self, label: str) -> Iterator[None]:
        """Holds the lock file `label` for the block. Raises CacheError `busy` if another process does."""
        with bad_disk_is_one_line(self.root):
            handle = os.open(self.root / label, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(handle, self.root / label, "part")
        try:
            os.utime(handle)  # the latest one tells in how many parts the cache is written
            yield
        finally:
            os.close(handle)

    def labels(self) -> list[str]:
        """The parts that have been begun, the latest one first: the names of their lock files."""
        return [p.name for p in sorted(self.root.glob("part-*-of-*"), key=lambda p: p.stat().st_mtime_ns, reverse=True)]

    def claim(self, name: str, data: bytes) -> bytes:
        """Stores `data` under `name` unless another process has stored something there; returns what is stored."""
        unfinished = self.root / f"{name}.{uuid.uuid4().hex}.partial"
        with bad_disk_is_one_line(self.root / name):
            try:
                _write_synced(unfinished, data)
                with suppress(FileExistsError):
                    os.link(unfinished, self.root / name)
                    sync(self.root)
            finally:
                unfinished.unlink(missing_ok=True)
        return (self.root / name).read_bytes()

    def keep(self, name: str, data: bytes) -> None:
        """Stores `data` under `name` for later attempts."""
        write_durably(self.root / name, data)

    def kept(self, name: str) -> bytes | None:
        """The data that an earlier attempt stored under `name`, or None."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def drop(self, name: str) -> None:
        """Removes what is stored under `name`, if anything is."""
        (self.root / name).unlink(missing_ok=True)

    def discard_cache(self, but: Path | None = None) -> None:
        """Deletes the unfinished cache, its journal and shards of parts, except the folder `but`; what `keep` stored
        stays.
        """
        (self.root / "journal").unlink(missing_ok=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        for folder in self.root.glob("parts.*"):
            if folder != but:
                shutil.rmtree(folder, ignore_errors=True)

    def discard(self, *, strict: bool = False) -> None:
        """Removes the staging directory with everything in it; with `strict`, raises OSError for what cannot be.

        It is renamed first, so the next process never sees a half-deleted directory or loses its own lock file.
        """
        if not strict or self._done.exists():
            shutil.rmtree(self._done, ignore_errors=not strict)
        self.root.rename(self._done)
        shutil.rmtree(self._done, ignore_errors=not strict)

    def discard_if_alone(self) -> None:
        """Removes a shared staging directory unless another process holds it too."""
        if self._lock is not None:
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.discard()

    def clear_remains(self) -> None:
        """Removes what is left by a run that was killed right after publishing; skips a directory in use."""
        if self.root.exists() or self._done.exists():
            with suppress(CacheError), self:
                self.discard()

    def publish(self, *, replace: bool) -> None:
        """Renames the finished cache to its target and removes the staging directory.

        `replace` allows replacing an earlier cache. Raises CacheError `exists` if the target is not empty and
        `replace` is not given, or if it holds files that are not part of a cache.
        """
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            if not replace:
                raise CacheError("exists", f"{self.target}: already exists; remove it or pass --replace")
            parts = {path.name for path in self.cache.iterdir()}
            held = {path.name for path in self.target.iterdir()} if self.target.is_dir() else {self.target.name}
            if strangers := sorted(held - parts - LITTER):
                raise CacheError(
                    "exists",
                    f"{self.target}: contains {strangers[0]}, which is not part of a cache and would be deleted; move "
                    "it away and run again (the finished cache is kept)",
                )
            shutil.rmtree(self.root / "replaced", ignore_errors=True)
            self.target.rename(self.root / "replaced")
        self.cache.rename(self.target)
        sync(self.target.parent)
        self.discard()
