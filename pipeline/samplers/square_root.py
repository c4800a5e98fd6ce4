"""Square root: draws a class with probability proportional to the root of its count, then one of its samples uniformly.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, eq. (1), q =
1/2; Mahajan et al., "Exploring the Limits of Weakly Supervised Pretraining", ECCV 2018, section 2.2.
"""

import numpy as np

from h2t.pipeline.data.classes import ClassIndex, Streams

NUMBER = 2026112601  # other results, another number: docs/numbers.md
AT_ONCE = True


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int) -> np.ndarray:
    """The positions of `size` independent draws, int64 (size,)."""
    return classes.drawn(streams(epoch, step), np.sqrt(classes.counts), size)
