"""Class-balanced: draws a class uniformly, then one of its samples uniformly, with replacement.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, eq. (1), q = 0.
"""

import numpy as np

from h2t.pipeline.data.classes import ClassIndex, Streams

NUMBER = 2026112601  # other results, another number: docs/numbers.md
AT_ONCE = True


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int) -> np.ndarray:
    """The positions of `size` independent draws, int64 (size,)."""
    draws = streams(epoch, step)
    label = draws.integers(classes.classes, size=size)
    return classes.starts[label] + draws.integers(classes.counts[label])
