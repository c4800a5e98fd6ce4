"""Generalised mean: (mean of x^p over the image)^(1/p); p = 1 is the average, and a large p approaches the maximum.

Source: Radenović, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019, eq. (3).
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.base.params import Positive, Section
from h2t.pipeline.networks import pool

NUMBER = 2026112601  # other results, another number: docs/numbers.md

SMALLEST = 1e-6  # smaller values are raised to it, as in the authors' code: a power of 0 may have no finite gradient


class Options(Section):
    exponent: Positive = 3.0
    """The exponent p: 1 is the average, a large one nears the maximum."""
    trained: bool = False
    """Train the exponent with the classifier, which needs whole maps."""


class Pool(pool.Pool):
    """One exponent for all channels and experts."""

    def __init__(self, options: Options, channels: int) -> None:
        super().__init__(options, channels)
        self.exponent = options.exponent
        self.commutes = not options.trained

    def initial(self) -> dict[str, torch.Tensor]:
        """The exponent, (1,), if it is trained; else nothing."""
        return {} if self.commutes else {"exponent": torch.tensor([self.exponent])}

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., C, H, W) -> features (..., C)."""
        exponent = state.get("exponent", torch.tensor([self.exponent], dtype=maps.dtype, device=maps.device))
        return maps.clamp_min(SMALLEST).pow(exponent).mean((-2, -1)).pow(1 / exponent)
