"""Global max pooling: the largest value over the image.

Source: Oquab et al., "Is Object Localization for Free?", CVPR 2015, section 3.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.base.params import Section

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Nothing to choose."""


class Pool:
    """Nothing is trained."""

    commutes = True
    linear = False

    def __init__(self, options: Options, channels: int) -> None:
        self.channels = channels

    def initial(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """(..., C, H, W) -> (..., C)."""
        return maps.amax((-2, -1))
