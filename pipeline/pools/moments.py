"""Mean and mean square over the image: what batch norm after the tap needs to know of a map (for host reslt).

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1: mean and variance follow from the two.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.branches import moments

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Nothing to choose."""


class Pool:
    """Nothing is trained; the features have a last axis of two moments."""

    commutes = True
    linear = False
    numbers = 2

    def __init__(self, options: Options, channels: int) -> None:
        self.channels = channels

    def initial(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """(..., C, H, W) -> (..., C, 2)."""
        return moments(maps)
