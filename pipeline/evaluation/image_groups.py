"""Test images in groups: by how much a figure would vary if other groups were drawn, not other images one by one.

Images of a group (of one patient, plant or camera, or copies of one image) are right or wrong together. So what varies
is the group: for each class, its images' distances from the class's mean are added up within the group before they are
squared. A group may hold images of several classes. The correction for few groups is CR2 (Bell and McCaffrey, "Bias
Reduction in Standard Errors for Linear Regression with Multi-Stage Samples", Survey Methodology 28, 2002), for the
regression on the classes. Where each image is a group of its own this is the variance within classes.
"""

from collections.abc import Sequence

import numpy as np


def group_numbers(groups: Sequence[np.ndarray | None], images: Sequence[np.ndarray]) -> list[np.ndarray] | list[None]:
    """The groups of each replicate's test images, int (n,), counted from 0 over all replicates.

    `images`: their numbers, int (n,), the same in all replicates. None in place of each where groups are unknown, or
    where each has one image.
    """
    known = [of for of in groups if of is not None]
    if len(known) < len(groups):
        return [None] * len(groups)
    every, numbers = np.unique(np.concatenate(known), return_inverse=True)
    if len(every) == len(np.unique(np.concatenate(images))):
        return [None] * len(groups)
    return np.split(numbers, np.cumsum([len(of) for of in known])[:-1])


def sums(values: np.ndarray, number: np.ndarray, many: int) -> np.ndarray:
    """For each line of `values` (lines, n), its sum over each of `many` groups, float64 (lines, many).

    `number` is the group of each of the n, counted from 0.
    """
    lines = len(values)
    place = (number + many * np.arange(lines)[:, None]).ravel()
    return np.bincount(place, values.ravel(), minlength=lines * many).reshape(lines, many)


def contributions(values: np.ndarray, labels: np.ndarray, weights: np.ndarray, number: np.ndarray) -> np.ndarray:
    """What each group adds to the error of the weighted sum of each line of `values` (lines, n): (lines, groups).

    The sum of their squares is the variance of the line's weighted sum, that of their products the covariance of two.
    `labels`, `weights` and `number`, the group from 0 on, are (n,); the weights of a class are equal. A class with
    all images in one group has no variance of its own: its weighted sum stands in, which is rather too large.
    """
    classes, many = int(labels.max()) + 1, int(number.max()) + 1
    cells, cell = np.unique(number * classes + labels, return_inverse=True)  # pairs of a group and a class
    group, label = np.divmod(cells, classes)
    images, of_class = np.bincount(cell), np.bincount(labels)
    weight = np.bincount(cell, weights) / images
    mean = sums(values, labels, classes) / np.maximum(of_class, 1)
    alone = images == of_class[label]
    centre = np.where(alone, 0, images * mean[:, label])
    rest = np.where(alone, 1, 1 - images / of_class[label])
    return sums((sums(values, cell, len(cells)) - centre) * weight / np.sqrt(rest), group, many)


def freedom(labels: np.ndarray, number: np.ndarray) -> float:
    """The degrees of freedom of the variance: groups less one, summed over classes; at most all groups less one.

    Groups of unequal sizes n count as sum(n)^2 / sum(n^2) equal ones (Kish, "Survey Sampling", 1965).
    """
    classes = int(labels.max()) + 1
    cells, images = np.unique(number * classes + labels, return_counts=True)
    of_class = np.bincount(cells % classes, images)
    square = np.bincount(cells % classes, images.astype(float) ** 2)
    held = of_class > 0
    within = np.maximum(of_class[held] ** 2 / square[held] - 1, 1).sum()
    sizes = np.bincount(number).astype(float)
    return float(min(within, max(sizes.sum() ** 2 / (sizes**2).sum() - 1, 1)))
