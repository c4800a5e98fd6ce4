"""Global average pooling: the mean over the image.

Source: Lin et al., "Network In Network", ICLR 2014, section 3.2.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.classifier import global_average

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Nothing to choose."""


class Pool:
    """Nothing is trained."""

    commutes = True
    linear = True

    def __init__(self, options: Options, channels: int) -> None:
        self.channels = channels

    def initial(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """(..., C, H, W) -> (..., C)."""
        return global_average(maps)
