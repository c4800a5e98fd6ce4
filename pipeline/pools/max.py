"""Global max pooling: the largest value over the image.

Source: Oquab et al., "Is Object Localization for Free?", CVPR 2015, section 3.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.networks import pool

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Pool(pool.Pool):
    """Trains nothing."""

    commutes = True

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., C, H, W) -> features (..., C)."""
        return maps.amax((-2, -1))
