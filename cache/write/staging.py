"""The place where a cache grows: a locked directory beside the target, with files kept from one attempt to the next.

It is no DVC output (DVC deletes outputs before a run), it sits on the target's file system so that publishing is one
rename, and a process holds its lock for as long as it works there.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from h2t.cache.errors import CacheError


def sync(path: Path) -> None:
    """Makes the content of `path` (of a directory: renames and new names in it) survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def of_the_disk(error: OSError, what: Path) -> CacheError | None:
    """`error` as CacheError `full` or `unwritable`; None if the disk is not to blame."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        way_out = "finished shards are kept, make space and run the same command again"
        return CacheError("full", f"{what}: no space left; {way_out}")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        why = os.strerror(error.errno).lower()
        return CacheError("unwritable", f"{what}: {why}; make it writable, or give another place, and run again")
    return None


@contextmanager
def bad_disk_is_one_line(what: Path) -> Iterator[None]:
    """Turns errors of the disk into CacheError."""
    try:
        yield
    except OSError as error:
        if (known := of_the_disk(error, what)) is None:
            raise
        raise known from None


def write_durably(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Writes `data` to `path` so that at every instant the path holds either the old content or all of the new."""
    partial = path.with_name(f"{path.name}.partial")
    with bad_disk_is_one_line(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Staging:
    """The staging directory of the cache `target`; a context manager that holds its lock.

    Raises CacheError `busy` if another process works there, `full` and `unwritable` if the disk is.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(target)
        self.root = self.target.parent / f".{self.target.name}.staging"
        self.cache = self.root / "cache"
        self._done = self.target.parent / f"{self.root.name}.done"
        self._lock: int | None = None

    def __enter__(self) -> "Staging":
        with bad_disk_is_one_line(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the last owner published between these two lines
                return self.__enter__()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise CacheError(
                "busy", f"{self.root}: another process is writing this cache; wait for it or stop it"
            ) from None
        # The last owner may have removed the directory between our open and our lock.
        if not (self.root / "lock").exists() or os.fstat(handle).st_ino != (self.root / "lock").stat().st_ino:
            os.close(handle)
            return self.__enter__()
        self._lock = handle
        if (self.root / "replaced").exists() and not self.target.exists():
            (self.root / "replaced").rename(self.target)  # stopped between the two renames of `publish`
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(error, OSError) and (known := of_the_disk(error, Path(error.filename or self.root))):
            raise known from None

    def keep(self, name: str, data: bytes) -> None:
        """Keeps `data` for later attempts."""
        write_durably(self.root / name, data)

    def kept(self, name: str) -> bytes | None:
        """What an earlier attempt kept under `name`, or None."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def discard_cache(self) -> None:
        """Forgets the unfinished cache; kept files stay."""
        (self.root / "journal").unlink(missing_ok=True)
        shutil.rmtree(self.cache, ignore_errors=True)

    def discard(self) -> None:
        """Removes the staging directory and all that is kept in it.

        Renamed first: a next owner never sees a half-deleted directory, nor loses its lock file to this deletion.
        """
        shutil.rmtree(self._done, ignore_errors=True)
        self.root.rename(self._done)
        shutil.rmtree(self._done, ignore_errors=True)

    def clear_remains(self) -> None:
        """Removes what a run leaves that is killed just after it published; not what another process works in."""
        if self.root.exists() or self._done.exists():
            with suppress(CacheError), self:
                self.discard()

    def publish(self, *, replace: bool) -> None:
        """Renames the finished cache to its target and removes the staging directory.

        With `replace` an earlier cache at the target goes. Raises CacheError `exists` for what holds anything else.
        """
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            if not replace:
                raise CacheError("exists", f"{self.target}: already holds something; remove it or pass --replace")
            parts = {path.name for path in self.cache.iterdir()}
            held = {path.name for path in self.target.iterdir()} if self.target.is_dir() else {self.target.name}
            if strangers := sorted(held - parts):
                raise CacheError(
                    "exists",
                    f"{self.target}: holds {strangers[0]}, which is no part of a cache and would be deleted; move it "
                    "away, and run again: the finished cache is kept",
                )
            shutil.rmtree(self.root / "replaced", ignore_errors=True)
            self.target.rename(self.root / "replaced")
        self.cache.rename(self.target)
        sync(self.target.parent)
        self.discard()
