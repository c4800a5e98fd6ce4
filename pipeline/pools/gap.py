"""Global average pooling: the mean over the image.

Source: Lin et al., "Network In Network", ICLR 2014, section 3.2.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.networks import pool
from h2t.pipeline.networks.classifier import global_average

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Pool(pool.Pool):
    """Trains nothing."""

    commutes = True
    linear = True

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., C, H, W) -> features (..., C)."""
        return global_average(maps)
