"""One file of a cache as a file object, for libraries that read from one: every read goes through the store."""

import hashlib
import io
import os
from typing import Any

from h2t.cache.read.store import FileStore

PIECE_BYTES = 8 * 1024 * 1024


class StoredFile(io.RawIOBase):
    """The file `name` of `files`, `size` bytes long, opened for reading. Errors are those of the store."""

    def __init__(self, files: FileStore, name: str, size: int) -> None:
        self._files, self._name, self._size = files, name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        (data,) = self._files.read_ranges(self._name, [(self._at, stop)])
        buffer[: len(data)] = data
        self._at = stop
        return len(data)


def sha256_of(files: FileStore, name: str, size: int) -> str:
    """The sha256 of the first `size` bytes of `name`, read a piece at a time."""
    digest = hashlib.sha256()
    for start in range(0, size, PIECE_BYTES):
        digest.update(*files.read_ranges(name, [(start, min(start + PIECE_BYTES, size))]))
    return digest.hexdigest()
