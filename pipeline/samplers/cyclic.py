"""Cyclic: visits the classes in shuffled rounds, takes four samples per visit, in shuffled rounds over each class.

Source: the authors' code of Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR
2020, also used by MiSLAS. Classes are as frequent as with `balanced`, but no class or sample is drawn twice in a round,
so an epoch covers more samples of large classes. Rounds continue across epochs. The published loader makes one more
batch per epoch.
"""

from functools import lru_cache

import numpy as np

from h2t.pipeline.base.seeds import permutation
from h2t.pipeline.data.classes import ClassIndex, Streams

NUMBER = 2026112601  # other results, another number: docs/numbers.md

AT_A_TIME = 4


@lru_cache(maxsize=16384)
def _order(streams: Streams, of: str, which: int, number: int, size: int) -> np.ndarray:
    """The permutation in round `number`: of all classes, or of the samples of class `which`. Cached for later steps."""
    return permutation(streams(of, which, number), size)


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int) -> np.ndarray:
    """The next `size` positions, int64 (size,)."""
    steps = -(-classes.samples // size)
    visits, inside = np.divmod((epoch * steps + step) * size + np.arange(size), AT_A_TIME)
    class_rounds, places = np.divmod(visits, classes.classes)
    positions = np.empty(size, np.int64)
    for i, (number, place) in enumerate(zip(class_rounds.tolist(), places.tolist(), strict=True)):
        label = int(_order(streams, "classes", 0, number, classes.classes)[place])
        count = int(classes.counts[label])
        round_, turn = divmod(number * AT_A_TIME + int(inside[i]), count)  # one visit per class and round
        positions[i] = classes.starts[label] + _order(streams, "samples", label, round_, count)[turn]
    return positions
