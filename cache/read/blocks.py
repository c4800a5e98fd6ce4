"""Blocks of remote files kept on the local disk, within a budget of bytes.

Blocks are filed under a key. That of a file which is known to be the one in the commit record is its sha256: copies of
a cache at two places share such blocks, and those of a replaced cache are never asked for again. A file that arrives
bit by bit is known only once it is whole; until then its key also names where it came from and in which version
(`arriving`), so blocks of two files that were given out as one never meet. What is in a block is checked where it is
used, by the checksums of the chunks; one that does not hold is forgotten and fetched again.

Training comes back to all rows at random, and then a cache that evicts its own blocks keeps none for long. So what is
in stays in: only files of other caches, those used longest ago, make room.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

BLOCK_BYTES = 1024 * 1024
DEFAULT_BUDGET = 8 * 10**9
LEAST_FREE = 2 * 10**9  # bytes of the disk that are left to others
WHOLE = "whole"  # an empty file beside the blocks of a file that was found to have its sha256
LOOK_AGAIN = 256  # blocks stored between two looks at what the disk and other processes do


def from_environment() -> "BlockCache | None":
    """The block cache in H2T_BLOCK_CACHE (a directory) of H2T_BLOCK_CACHE_BYTES; None if these are 0.

    By default `h2t/blocks` below XDG_CACHE_HOME or ~/.cache, and 8 GB.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("H2T_BLOCK_CACHE") or Path(home, "h2t", "blocks")
    text = os.environ.get("H2T_BLOCK_CACHE_BYTES") or str(DEFAULT_BUDGET)
    if not text.isdecimal():
        raise ValueError(f"H2T_BLOCK_CACHE_BYTES: a number of bytes expected; got {text!r}")
    return BlockCache(Path(folder), int(text)) if int(text) else None


def arriving(digest: str, version: str) -> str:
    """The key of parts of one `version` of a file that should have the sha256 `digest`, until all of it is here."""
    return f"{digest}-{hashlib.sha256(version.encode()).hexdigest()[:16]}"


class BlockCache:
    """Blocks below `folder`, at most `budget` bytes of them. Safe from several threads, and beside other processes.

    A disk that is full or cannot be written costs speed, nothing else.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._mine: set[str] = set()
        self._lock = threading.Lock()
        self._used = 0
        self._until_look = 0

    def after_fork(self) -> None:
        """In a forked child: forgets what threads of the parent held."""
        self._lock = threading.Lock()

    def claim(self, digests: Collection[str]) -> None:
        """Says that files with these sha256 are in use: their blocks are not given up."""
        with self._lock:
            self._mine.update(digests)
            self._look()
            for digest in digests:
                with suppress(OSError):
                    os.utime(self.folder / digest)

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` of the file, or None unless all their blocks are here."""
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
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        return found if len(found) == stop - start else None

    def holds(self, key: str, block: int) -> bool:
        return (self.folder / key / str(block)).is_file()

    def room(self, size: int) -> bool:
        """Whether `size` more bytes fit, once files of others are given up for them."""
        with self._lock:
            if self._used + size > self.budget:
                self._look()
                self._give_up(size)
            return self._used + size <= self.budget

    def put(self, key: str, block: int, data: bytes) -> None:
        """Keeps a block, if there is room and the disk lets us."""
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
        """Whether the blocks under `digest` were found to be that file; single ones may have gone since."""
        return (self.folder / digest / WHOLE).is_file()

    def put_whole(self, digest: str, data: bytes) -> None:
        """Keeps a file whose sha256 was compared."""
        for block, at in enumerate(range(0, len(data), BLOCK_BYTES)):
            self.put(digest, block, data[at : at + BLOCK_BYTES])
        with suppress(OSError):
            (self.folder / digest / WHOLE).touch()

    def found_whole(self, key: str, digest: str, count: int) -> bool | None:
        """Whether the `count` blocks under `key` make up the file with this sha256; None while some are not here.

        Chunks carry their checksums with them, so a shard in the place of another one looks right chunk by chunk; this
        is what tells them apart. Asked once: those of the right file are filed under its digest from then on.
        """
        folder, place = self.folder / key, self.folder / digest
        found = hashlib.sha256()
        try:
            if sum(entry.name.isdecimal() for entry in os.scandir(folder)) < count:
                return None
            for block in range(count):
                found.update((folder / str(block)).read_bytes())
            if found.hexdigest() != digest:
                return False
            (folder / WHOLE).touch()
            if not self.is_whole(digest):
                shutil.rmtree(place, ignore_errors=True)  # blocks of an earlier release, which were never compared
                folder.rename(place)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            return None
        return True

    def forget(self, key: str) -> None:
        """Drops all blocks under `key`."""
        shutil.rmtree(self.folder / key, ignore_errors=True)
        with self._lock:
            self._look()

    def _look(self) -> None:
        """Counts what lies here, also by other processes; leaves the disk some air."""
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
    except OSError:  # given up by another process meanwhile
        return 0


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
