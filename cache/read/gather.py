"""The compiled gather (`gather.c`), where installing built it: uncompressed rows from files into their slots, checked.

It is the loop of `cache.reader` for such rows, several times faster: no interpreter runs between two rows, and its lock
is free meanwhile. Without a compiler at installation, on another processor or another system, `compiled()` is None and
the reader's own loop reads the same values.
"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np

DONE, MISMATCH, ENDS_EARLY, REFUSED, CHANGED = range(5)  # as in gather.c


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a gather: DONE, or what went wrong, at which row (CHANGED: file), with which errno if REFUSED."""

    result: int
    row: int
    errno: int


class Gather:
    """The function of the library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        self._call = library.gather_unchanged
        self._call.argtypes = [ctypes.c_int64, *[pointer] * 4, *[ctypes.c_int64] * 2, *[pointer] * 2]
        self._call.restype = ctypes.c_int

    def __call__(
        self,
        files: np.ndarray,
        offsets: np.ndarray,
        slots: np.ndarray,
        out: np.ndarray,
        row_bytes: int,
        opened: np.ndarray,
    ) -> Outcome:
        """Row i, the `row_bytes` bytes at `offsets[i]` of file descriptor `files[i]`, goes to byte `slots[i]` of `out`.

        `files`, `offsets`, `slots` (n,), contiguous int32, int64 and int64; `out` contiguous. The caller answers for
        the slots: they are not checked against the length of `out`. `opened` (m, 3) int64 are these files' descriptors,
        sizes and times of the last change (ns) when they were opened; CHANGED if a file differs afterwards.
        """
        for given, dtype in ((files, np.int32), (offsets, np.int64), (slots, np.int64)):
            assert given.dtype == np.dtype(dtype)
            assert given.shape == files.shape
            assert given.flags.c_contiguous
        assert out.flags.carray
        assert opened.dtype == np.int64
        assert opened.shape[1:] == (3,)
        assert opened.flags.c_contiguous
        found = np.zeros(2, np.int64)
        pointers: list[Any] = [array.ctypes.data for array in (files, offsets, slots, out)]
        result = self._call(len(files), *pointers, row_bytes, len(opened), opened.ctypes.data, found.ctypes.data)
        return Outcome(result, int(found[0]), int(found[1]))


@cache
def compiled() -> Gather | None:
    """The compiled gather; None where it was not built or this processor lacks the instruction it needs."""
    candidates = [Path(__file__).with_name(f"_gather{suffix}") for suffix in EXTENSION_SUFFIXES]
    built = next((path for path in candidates if path.is_file()), None)
    if built is None or sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(built))
        return Gather(library) if library.usable() else None
    except (OSError, AttributeError):  # built for another system
        return None
