"""Progressive: class probabilities move from those of the training samples to equal ones, epoch by epoch.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, eq. (2): p_j =
(1 - t / T) n_j / N + t / T / K in epoch t of T. Here t counts from 0 to T - 1 and T - 1 is the divisor, so the first
epoch is instance-wise (with replacement) and the last one class-balanced.
"""

import numpy as np

from h2t.pipeline.data.classes import ClassIndex, Streams

NUMBER = 2026112601  # other results, another number: docs/numbers.md
AT_ONCE = True


def draw(classes: ClassIndex, streams: Streams, epoch: int, step: int, size: int, epochs: int) -> np.ndarray:
    """The positions of `size` independent draws, int64 (size,). `epochs`: the length of the training, T."""
    balanced = min(epoch / max(epochs - 1, 1), 1.0)
    share = (1 - balanced) * classes.counts / classes.samples + balanced / classes.classes
    return classes.drawn(streams(epoch, step), share, size)
