"""The compiled gather (`gather.c`): reads uncompressed rows from files or memory into their slots and checks them.

Several times faster than Python: none runs between two rows, files are read without a copy, and the GIL is released. If
it was not built (no compiler, or another system or processor), `compiled()` returns None and `cache.read.jobs.Decode`
reads the same values without it.
"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np

from h2t.cache.format.shard import CRC_BYTES

DONE, MISMATCH, ENDS_EARLY, REFUSED, CHANGED = range(5)  # as in gather.c


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a gather: DONE or an error code, the row at fault (for CHANGED: the file), errno for REFUSED."""

    result: int
    row: int
    errno: int


class Gather:
    """The functions of the compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        self._call = library.gather_unchanged
        self._call.argtypes = [ctypes.c_int64, *[pointer] * 4, *[ctypes.c_int64] * 2, *[pointer] * 2]
        self._call.restype = ctypes.c_int
        self._unpack = library.unpack_rows
        self._unpack.argtypes = [ctypes.c_int64, *[pointer] * 4, ctypes.c_int64]
        self._unpack.restype = ctypes.c_int64

    def __call__(
        self,
        files: np.ndarray,
        offsets: np.ndarray,
        slots: np.ndarray,
        out: np.ndarray,
        row_bytes: int,
        opened: np.ndarray,
    ) -> Outcome:
        """Reads row i, the `row_bytes` bytes at `offsets[i]` of descriptor `files[i]`, to byte `slots[i]` of `out`.

        `files` int32, `offsets` and `slots` int64, all (n,) and contiguous; `out` contiguous. Slots are not checked
        against the size of `out`; the caller must keep them inside. `opened`, int64 (m, 3), holds the descriptor, size
        in bytes and mtime in ns of each file when it was opened; the result is CHANGED if a file differs afterwards.
        """
        for given, dtype in ((files, np.int32), (offsets, np.int64), (slots, np.int64)):
            assert given.dtype == np.dtype(dtype)
            assert given.shape == files.shape
            assert given.flags.c_contiguous
        assert out.flags.carray
        assert opened.dtype == np.int64
        assert opened.shape[1:] == (3,)
        assert opened.flags.c_contiguous
        at_fault = np.zeros(2, np.int64)  # row or file, errno
        pointers: list[Any] = [array.ctypes.data for array in (files, offsets, slots, out)]
        result = self._call(len(files), *pointers, row_bytes, len(opened), opened.ctypes.data, at_fault.ctypes.data)
        return Outcome(result, int(at_fault[0]), int(at_fault[1]))

    def unpack(
        self, stored: np.ndarray, starts: np.ndarray, slots: np.ndarray, out: np.ndarray, row_bytes: int
    ) -> int | None:
        """Copies row i, the `row_bytes` bytes of `stored` at `starts[i]`, to byte `slots[i]` of `out`, and checks it.

        The crc32c follows each row in `stored`, uint8 (bytes,). `starts` and `slots` int64 (n,), contiguous; slots are
        not checked against the size of `out`. Returns the first row whose checksum is wrong, or None.
        """
        for given in (starts, slots):
            assert given.dtype == np.int64
            assert given.shape == starts.shape
            assert given.flags.c_contiguous
        assert out.flags.carray
        if len(starts) and (starts.min() < 0 or starts.max() + row_bytes + CRC_BYTES > stored.size):
            raise ValueError("a row lies outside the bytes that were read")
        pointers = [array.ctypes.data for array in (stored, starts, slots, out)]
        wrong: int = self._unpack(len(starts), *pointers, row_bytes)
        return wrong if wrong < len(starts) else None


@cache
def compiled() -> Gather | None:
    """The compiled gather, or None if it was not built or this processor has no crc32c instruction."""
    candidates = [Path(__file__).with_name(f"_gather{suffix}") for suffix in EXTENSION_SUFFIXES]
    built = next((path for path in candidates if path.is_file()), None)
    if built is None or sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(built))
        return Gather(library) if library.usable() else None
    except (OSError, AttributeError):  # built for another system
        return None
