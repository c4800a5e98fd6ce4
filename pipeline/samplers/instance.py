"""Instance-balanced: each sample once per epoch, in random order; the last batch may be smaller.

This is the usual shuffled data loader (H2T paper, section 3.3, the head-biased branch).
"""

from functools import lru_cache

import numpy as np

from h2t.pipeline.base.seeds import permutation
from h2t.pipeline.data.classes import ClassIndex, Streams

NUMBER = 2026112601  # other results, another number: docs/numbers.md


@lru_cache(maxsize=64)
def _drawn(streams: Streams, samples: int) -> dict[int, np.ndarray]:
    """The permutation of the epoch that was drawn last from `streams`, by its number; filled by `_order`."""
    return {}


def _order(streams: Streams, epoch: int, samples: int) -> np.ndarray:
    """The permutation of the samples in `epoch`. Kept until another epoch is drawn, as each step takes a part of it."""
    kept = _drawn(streams, samples)
    order = kept.get(epoch)
    if order is None:
        kept.clear()
        order = kept[epoch] = permutation(streams(epoch), samples)
    return order


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int) -> np.ndarray:
    """The next `size` positions in the epoch's permutation, int64; fewer at the end of the epoch."""
    first = step * size
    return _order(streams, epoch, classes.samples)[first : first + size].astype(np.int64)
