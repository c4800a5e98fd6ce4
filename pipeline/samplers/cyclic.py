"""Cyclic: classes in shuffled rounds, four samples of a class at a time, each class's samples in shuffled rounds too.

Source: the authors' code of Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR
2020, which MiSLAS uses as well. Classes are as frequent as under `balanced`, but nothing is drawn twice before its
round ends, so that an epoch sees more of the large classes' samples. Rounds go on over epochs. The published loader
makes one batch more per epoch.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from h2t.pipeline.data.classes import ClassIndex

NUMBER = 2026112601  # other results, another number: docs/numbers.md

AT_A_TIME = 4

Streams = Callable[..., np.random.Generator]


@lru_cache(maxsize=16384)
def _order(streams: Streams, of: str, which: int, number: int, size: int) -> np.ndarray:
    """The order of round `number`, of the classes or of the samples of class `which`."""
    return streams(of, which, number).permutation(size)


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int) -> np.ndarray:
    """The next `size` positions of the rounds, int64."""
    steps = -(-classes.samples // size)
    visits, inside = np.divmod((epoch * steps + step) * size + np.arange(size), AT_A_TIME)
    class_rounds, places = np.divmod(visits, classes.classes)
    found = np.empty(size, np.int64)
    for i, (number, place) in enumerate(zip(class_rounds.tolist(), places.tolist(), strict=True)):
        label = int(_order(streams, "classes", 0, number, classes.classes)[place])
        count = int(classes.counts[label])
        round_, turn = divmod(number * AT_A_TIME + int(inside[i]), count)  # a class is visited once a round
        found[i] = classes.starts[label] + _order(streams, "samples", label, round_, count)[turn]
    return found
