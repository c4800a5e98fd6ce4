"""Test images in groups: by how much a figure would vary if other groups were drawn, not other images one by one.

Images of a group (of one patient, plant or camera, or copies of one image) are right or wrong together. So what varies
is the group: for each class, its images' distances from the class's mean are added up within the group before they are
squared. A group may hold images of several classes. The correction for few groups is CR2 (Bell and McCaffrey, "Bias
Reduction in Standard Errors for Linear Regression with Multi-Stage Samples", Survey Methodology 28, 2002), for the
regression on the classes. Where each image is a group of its own this is the variance within classes.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from h2t.cache.format.spec import TEST_GROUPS
from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.batches import sample_rows

PIECE_ROWS = 2**18  # rows whose digests are in memory at a time


def groups_of(cache: Cache, statistics: str) -> np.ndarray:
    """The group of each test image, int64 (n,), in the order of the test rows under `statistics`.

    Numbers are the same in all replicates. Groups are those that `extract` recorded; without any, copies of one image
    are a group, by their digests. Raises UserError for a record that does not fit the test rows.
    """
    tests = sample_rows(cache.index, "test", statistics)
    rows, samples = tests.first, tests.samples
    recorded = cache.spec.provenance.get(TEST_GROUPS)
    if recorded is None:
        found = np.empty(len(rows), np.int64)
        for first in range(0, len(rows), PIECE_ROWS):
            piece = rows[first : first + PIECE_ROWS]
            digests = cache.lines(piece, ["digest"])["digest"].to_pylist()
            hashes = b"".join(blake2b(text.encode(), digest_size=8).digest() for text in digests)
            found[first : first + len(piece)] = np.frombuffer(hashes, "<i8")
        return found
    part = next(part for part in cache.index.parts if part.split == "test")
    known = cache.index.samples[part.start : part.stop]
    whole = isinstance(recorded, list) and all(type(number) is int and 0 <= number < 2**31 for number in recorded)
    if not whole or len(recorded) != len(known) or not np.isin(samples, known).all():
        raise UserError(f"{cache.files}: its record must give each test image a group; extract the cache again")
    order = np.argsort(known, kind="stable")
    return np.array(recorded, np.int64)[order[np.searchsorted(known, samples, sorter=order)]]


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
