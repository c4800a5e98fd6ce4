"""How much of the best classifier's figure is luck: that it is the best of many on these images.

The best of many on some images owes part of its figure to luck on these images, more so the more classifiers there are
and the fewer images (Varma and Simon, "Bias in error estimation when using cross-validation for model selection", BMC
Bioinformatics 7, 2006). Here the best on nine tenths of the images is measured on the last tenth, for each tenth.
"""

import numpy as np

PARTS = 10
DIVISIONS = 20  # of the images into parts; the mean over them depends little on any one
EQUAL = 1e-5  # percentage points: beyond the rounding of float32, below one image of a million


def luck_of_the_best(right: np.ndarray, weights: np.ndarray, labels: np.ndarray, units: np.ndarray) -> float | None:
    """The best figure on all images minus what the best on nine tenths of them has on the rest; 0 or more.

    `right`, float (classifiers, n): the share of seeds that are right on each of n images, in percent. A figure is
    their sum by `weights`, float (n,). `labels`, int (n,): classes, of which each tenth has about as many images.
    `units`, int (n,): images of one unit (one image in several replicates, or a group) are in the same tenth. None for
    fewer than ten units.
    """
    names, first, unit = np.unique(units, return_index=True, return_inverse=True)
    if len(names) < PARTS:
        return None
    kind = np.unique(labels[first], return_inverse=True)[1]
    weighted = right.astype(np.float64) * weights
    totals = weighted.sum(1)
    draws = np.random.default_rng(0)
    found = []
    for _ in range(DIVISIONS):
        order = np.lexsort((draws.random(len(names)), draws.random(len(names))[kind]))  # by class, in random order
        part = np.empty(len(names), int)
        part[order] = np.arange(len(names)) % PARTS
        own = weighted @ (part[unit][:, None] == np.arange(PARTS))  # (classifiers, parts)
        rest = totals[:, None] - own
        best = rest > rest.max(0) - EQUAL  # several where they are equal, which of them is not left to rounding
        found.append(((own * best).sum(0) / best.sum(0)).sum())
    return max(float(totals.max() - np.mean(found)), 0.0)
