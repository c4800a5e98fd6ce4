"""Mean and mean square over the image, from which batch norm after the tap can be computed (for host reslt).

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1: mean and variance follow from the two.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.networks import pool
from h2t.pipeline.networks.branches import moments

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Pool(pool.Pool):
    """Trains nothing. The last axis of the features holds the two moments."""

    commutes = True
    numbers = 2

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., C, H, W) -> features (..., C, 2)."""
        return moments(maps)
