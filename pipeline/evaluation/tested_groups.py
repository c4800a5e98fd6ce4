"""The groups that the test images of a cache come in. Apart from their statistics, as reports load no samplers."""

from hashlib import blake2b

import numpy as np

from h2t.cache.format.spec import TEST_GROUPS
from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.batches import sample_rows

PIECE_ROWS = 2**18  # rows whose digests are in memory at a time


def groups_of(cache: Cache, statistics: str) -> np.ndarray:
    """The group of each test image, int64 (n,), in the order of the test rows under `statistics`.

    Numbers are the same in all replicates. Groups are those that `extract` recorded; without any, copies of one image
    are a group, by their digests. Raises UserError for a record that does not fit the test rows.
    """
    tests = sample_rows(cache.index, "test", statistics)
    rows, samples = tests.first, tests.samples
    recorded = cache.spec.provenance.get(TEST_GROUPS)
    if recorded is None:
        found = np.empty(len(rows), np.int64)
        for first in range(0, len(rows), PIECE_ROWS):
            piece = rows[first : first + PIECE_ROWS]
            digests = cache.lines(piece, ["digest"])["digest"].to_pylist()
            hashes = b"".join(blake2b(text.encode(), digest_size=8).digest() for text in digests)
            found[first : first + len(piece)] = np.frombuffer(hashes, "<i8")
        return found
    part = next(part for part in cache.index.parts if part.split == "test")
    known = cache.index.samples[part.start : part.stop]
    whole = isinstance(recorded, list) and all(type(number) is int and 0 <= number < 2**31 for number in recorded)
    if not whole or len(recorded) != len(known) or not np.isin(samples, known).all():
        raise UserError(f"{cache.files}: its record must give each test image a group; extract the cache again")
    order = np.argsort(known, kind="stable")
    return np.array(recorded, np.int64)[order[np.searchsorted(known, samples, sorter=order)]]
