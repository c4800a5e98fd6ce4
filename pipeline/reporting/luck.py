"""How much of the best method's figure is luck, as it was chosen on the test images."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from h2t.pipeline.evaluation.intervals import figure_weights
from h2t.pipeline.evaluation.luck import luck_of_the_best
from h2t.pipeline.reporting.results import HostResult, Predicted


class Candidates:
    """All classifiers that the best is chosen from: hosts and their rows of metrics.json, without and with H2T."""

    def __init__(self, rows: Sequence[tuple[HostResult, str]]) -> None:
        """Those of `rows` that a host has."""
        self.rows = [(result, row) for result, row in rows if result.metrics[row] is not None]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _scored(self) -> tuple[list[Predicted], np.ndarray]:
        """The test images of each replicate, and the share of each classifier's seeds that is right on each.

        The shares are percent, float32 (classifiers, test images of all replicates); none if test images differ.
        """
        first: dict[int, Predicted] = {}
        right = []
        for result, row in self.rows:
            found = result.predictions(row)
            first = first or found
            if found.keys() != first.keys() or any(
                not np.array_equal(getattr(found[r], key), getattr(first[r], key))
                for r in first
                for key in ("images", "labels", "groups")
            ):
                return [], np.empty((0, 0), np.float32)
            right.append(np.concatenate([_share(found[r]) for r in sorted(found)]))
        return [first[r] for r in sorted(first)], np.stack(right)

    def luck(self, figure: str) -> float | None:
        """How far `figure` of the best by it is above that on images that did not choose it (`evaluation/luck.py`).

        In percentage points. None for a single classifier, for the calibration error, and where test images, or their
        groups, are few or not the same.
        """
        if len(self) < 2 or figure == "ece":
            return None
        replicates, right = self._scored
        if not replicates:
            return None
        group_of = self.rows[0][0].about["groups"]
        weights = np.concatenate([figure_weights(figure, of.labels, group_of) for of in replicates]) / len(replicates)
        labels = np.concatenate([of.labels for of in replicates])
        units = np.concatenate([of.images if of.groups is None else of.groups for of in replicates])
        inside = weights > 0
        return luck_of_the_best(right[:, inside], weights[inside], labels[inside], units[inside])


def _share(of: Predicted) -> np.ndarray:
    """The share of seeds that are right on each image, in percent, float32 (n,)."""
    right = np.array([said.guesses == of.labels for said in of.said.values()])
    return (100 * right.mean(0)).astype(np.float32)
