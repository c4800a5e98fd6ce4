"""Reverse: draws a class with probability proportional to 1 / its count, then one of its samples uniformly.

Source: Zhou et al., "BBN: Bilateral-Branch Network", CVPR 2020, section 4.2; a donor in Table 5 of the H2T paper.
"""

import numpy as np

from h2t.pipeline.data.classes import ClassIndex, Streams

NUMBER = 2026112601  # other results, another number: docs/numbers.md
AT_ONCE = True


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int) -> np.ndarray:
    """The positions of `size` independent draws, int64 (size,)."""
    return classes.drawn(streams(epoch, step), 1 / classes.counts, size)
