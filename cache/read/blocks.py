"""The block cache: blocks of remote files on the local disk, within a budget of bytes.

Blocks are stored under a key. Once a file is known to have the sha256 in the commit record, its key is that sha256, so
copies of a cache at two places share blocks, and blocks of a replaced cache are never used. While a file is only partly
here, its key also includes its address and version (`arriving`), so blocks of different files are never mixed. The
content of a block is checked when it is used, by the checksums of the chunks; a wrong block is dropped and fetched
again.

Training reads all rows in random order, and a cache that evicts its own blocks would then keep none for long. So blocks
in use are never evicted: only the least recently used files of other caches make room.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

BLOCK_BYTES = 1024 * 1024
DEFAULT_BUDGET = 8 * 10**9
LEAST_FREE = 2 * 10**9  # bytes of disk space that are left free
WHOLE = "whole"  # name of an empty file beside the blocks of a file whose sha256 was checked
LOOK_AGAIN = 256  # blocks stored before disk space and the blocks of other processes are counted again


def from_environment() -> "BlockCache | None":
    """The block cache in directory H2T_BLOCK_CACHE with a budget of H2T_BLOCK_CACHE_BYTES; None if that is 0.

    The defaults are `h2t/blocks` below XDG_CACHE_HOME or ~/.cache, and 8 GB. None, too, for a user without a home
    folder who names no other. Raises ValueError if the budget is not a whole number.
    """
    text = os.environ.get("H2T_BLOCK_CACHE_BYTES") or str(DEFAULT_BUDGET)
    if not text.isdecimal():
        raise ValueError(f"H2T_BLOCK_CACHE_BYTES: a number of bytes expected; got {text!r}; write 8000000000 for 8 GB")
    folder = os.environ.get("H2T_BLOCK_CACHE")
    if not folder:
        try:
            folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "h2t", "blocks"))
        except RuntimeError:  # HOME is not set, and the system does not know this user
            return None
    return BlockCache(Path(folder), int(text)) if int(text) else None


def arriving(digest: str, version: str) -> str:
    """The key for one `version` of a file that should have the sha256 `digest`, while only parts of it are here."""
    return f"{digest}-{hashlib.sha256(version.encode()).hexdigest()[:16]}"


def spans_of(blocks: Iterable[int], size: int) -> list[tuple[int, int]]:
    """(start, stop) in bytes of each of `blocks` of a file of `size` bytes."""
    return [(block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, size)) for block in blocks]


class BlockCache:
    """Blocks below `folder`, at most `budget` bytes. Several threads and processes can use it at once.

    If the disk is full or cannot be written, blocks are not kept; nothing fails.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._mine: set[str] = set()
        self._lock = threading.Lock()
        self._used = 0
        self._until_look = 0

    def after_fork(self) -> None:
        """Resets the lock in a forked child, where the parent's threads do not exist."""
        self._lock = threading.Lock()

    def claim(self, digests: Collection[str]) -> None:
        """Marks files with these sha256 as in use, so that their blocks are not evicted."""
        with self._lock:
            self._mine.update(digests)
            self._look()
            for digest in digests:
                with suppress(OSError):
                    os.utime(self.folder / digest)

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` (exclusive) of the file, or None unless all their blocks are here."""
        parts = []
        try:
            for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
                at = max(start - block * BLOCK_BYTES, 0)
                size = min(stop - block * BLOCK_BYTES, BLOCK_BYTES) - at
                handle = os.open(self.folder / key / str(block), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    parts.append(os.pread(handle, size, at))
                finally:
                    os.close(handle)
        except OSError:
            return None
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data if len(data) == stop - start else None

    def holds(self, key: str, block: int) -> bool:
        """True if this block is here."""
        return (self.folder / key / str(block)).is_file()

    def room(self, size: int) -> bool:
        """True if `size` more bytes fit; evicts files of other caches for them."""
        with self._lock:
            if self._used + size > self.budget:
                self._look()
                self._give_up(size)
            return self._used + size <= self.budget

    def put(self, key: str, block: int, data: bytes | memoryview) -> None:
        """Stores a block if there is room and the disk can be written."""
        if not self.room(len(data)):
            return
        place = self.folder / key / str(block)
        partial = place.with_name(f".{block}.{os.getpid()}.{threading.get_ident()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(place)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            with self._lock:
                self.budget = 0
            return
        with self._lock:
            self._used += len(data)
            self._until_look -= 1
            if self._until_look <= 0:
                self._look()

    def is_whole(self, digest: str) -> bool:
        """True if the blocks under `digest` were checked to be that file; some may have been deleted since."""
        return (self.folder / digest / WHOLE).is_file()

    def put_whole(self, digest: str, data: bytes) -> None:
        """Stores all blocks of a file whose sha256 the caller has checked."""
        for block, at in enumerate(range(0, len(data), BLOCK_BYTES)):
            self.put(digest, block, data[at : at + BLOCK_BYTES])
        with suppress(OSError):
            (self.folder / digest / WHOLE).touch()

    def found_whole(self, key: str, digest: str, count: int) -> bool | None:
        """True if the `count` blocks under `key` have this sha256, False if not, None if some are not here.

        A shard in the place of another one passes the checksums of its chunks; only this check tells them apart. If
        the sha256 is right, the blocks move from `key` to `digest`.
        """
        folder, place = self.folder / key, self.folder / digest
        actual = hashlib.sha256()
        try:
            if sum(entry.name.isdecimal() for entry in os.scandir(folder)) < count:
                return None
            for block in range(count):
                actual.update((folder / str(block)).read_bytes())
            if actual.hexdigest() != digest:
                return False
            (folder / WHOLE).touch()
            if not self.is_whole(digest):
                shutil.rmtree(place, ignore_errors=True)  # unchecked blocks, stored by an earlier release
                folder.rename(place)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            return None
        return True

    def forget(self, key: str) -> None:
        """Deletes all blocks under `key`."""
        shutil.rmtree(self.folder / key, ignore_errors=True)
        with self._lock:
            self._look()

    def _look(self) -> None:
        """Counts all blocks here, also those of other processes, and limits the budget to the free disk space."""
        self._used = sum(_bytes_in(folder) for folder in self._folders())
        self._until_look = LOOK_AGAIN
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            spare = shutil.disk_usage(self.folder).free - LEAST_FREE
            self.budget = min(self.budget, max(0, self._used + spare))

    def _folders(self) -> list[Path]:
        try:
            return [Path(entry.path) for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return []

    def _give_up(self, size: int) -> None:
        others = [(_last_use(folder), folder) for folder in self._folders() if _digest(folder) not in self._mine]
        for _, folder in sorted(others):
            if self._used + size <= self.budget:
                return
            self._used -= _bytes_in(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _digest(folder: Path) -> str:
    return folder.name.partition("-")[0]


def _bytes_in(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except OSError:  # evicted by another process meanwhile
        return 0


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
