"""Checks the order and the identities of a row table of any length, batch by batch (format rules 3.2 and 3.3)."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from h2t.cache.format.rows import SPLITS, check_memory

KEYS = ("split", "statistics", "label", "source", "view")
IDENTITY = ("split", "statistics", "source", "view")

_ODD = np.int64(0x5851F42D4C957F2D)  # any odd number: products of 64 bits stay different

Batches = Callable[[], Iterator[tuple[int, pa.RecordBatch]]]


def row_fault(batches: Batches, rows: int) -> str | None:
    """What is wrong with the order of a row table of `rows` rows; None if nothing is.

    `batches` reads the columns `KEYS` from the start: (first row, batch). Takes 8 bytes of memory a row; raises
    CacheError `full` if they are not free.
    """
    check_memory(8 * rows)
    hashes = np.empty(rows, np.int64)
    ordered = True
    before: pa.RecordBatch | None = None
    for at, batch in batches():
        unknown = set(batch["split"].unique().to_pylist()) - set(SPLITS)
        if unknown:
            return f"split must be one of {', '.join(SPLITS)}; got {sorted(unknown)}"
        ordered &= _ascending(pa.concat_batches([before, batch]) if before else batch)
        before = batch.slice(len(batch) - 1)
        hashes[at : at + len(batch)] = _hashes(batch)
    twice = _repeated(hashes)
    if len(twice) and _same_identity(batches, twice):
        return "two rows have the same split, statistics, source and view"
    return None if ordered else "rows are not in the order of format 1"


def _ascending(batch: pa.RecordBatch) -> bool:
    """Whether no line of `batch` comes before the one above it, by `KEYS`; text by its UTF-8 bytes."""
    size = len(batch) - 1
    after, equal = np.zeros(size, bool), np.ones(size, bool)  # by the keys so far
    for name in KEYS:
        first, second = batch[name].slice(0, size), batch[name].slice(1)
        after |= equal & _array(pc.less(first, second))
        equal &= _array(pc.equal(first, second))
    return bool((after | equal).all())


def _array(mask: pa.BooleanArray) -> np.ndarray:
    return np.asarray(mask.to_numpy(zero_copy_only=False), bool)


def _hashes(batch: pa.RecordBatch) -> np.ndarray:
    """A 64-bit hash of each line's identity; Python's hash of text is random and different in each process."""
    hashes = np.fromiter(map(hash, batch["source"].to_pylist()), np.int64, len(batch))
    for name in ("split", "statistics"):
        texts = batch[name].dictionary_encode()
        values = np.fromiter(map(hash, texts.dictionary.to_pylist()), np.int64, len(texts.dictionary))
        hashes = hashes * _ODD + values[np.from_dlpack(texts.indices)]
    return hashes * _ODD + np.from_dlpack(batch["view"])


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """The values that occur more than once, sorted. Sorts `hashes` in place."""
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _same_identity(batches: Batches, hashes: np.ndarray) -> bool:
    """Whether two rows with one of these hashes have the same identity, as they almost always do."""
    seen: set[tuple[object, ...]] = set()
    for _, batch in batches():
        places = np.flatnonzero(np.isin(_hashes(batch), hashes))
        for line in batch.take(pa.array(places)).to_pylist():
            identity = tuple(line[name] for name in IDENTITY)
            if identity in seen:
                return True
            seen.add(identity)
    return False
