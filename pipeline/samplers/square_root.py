"""Square root: draws a class with probability proportional to the root of its count, then one of its samples uniformly.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, eq. (1), q =
1/2; Mahajan et al., "Exploring the Limits of Weakly Supervised Pretraining", ECCV 2018, section 2.2.
"""

from collections.abc import Callable

import numpy as np

from h2t.pipeline.data.classes import ClassIndex

NUMBER = 2026112601  # other results, another number: docs/numbers.md
AT_ONCE = True

Streams = Callable[..., np.random.Generator]


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int) -> np.ndarray:
    """The positions of `size` independent draws, int64 (size,)."""
    draws = streams(epoch, step)
    share = np.sqrt(classes.counts)
    label = draws.choice(classes.classes, size=size, p=share / share.sum())
    return classes.starts[label] + draws.integers(classes.counts[label])
