"""Attention: a weighted mean over the image, the weights a softmax of a trained query's product with each pixel.

Source: Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, eq. (7) and (8), with
the query acting on the pixels themselves, without a hidden layer. The query starts at 0: the average.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.base.params import Section

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Nothing to choose."""


class Pool:
    """One query for all experts. The weights depend on every channel, so pooling before fusing would change them."""

    commutes = False
    linear = False

    def __init__(self, options: Options, channels: int) -> None:
        self.channels = channels

    def initial(self) -> dict[str, torch.Tensor]:
        """The query, (C,)."""
        return {"query": torch.zeros(self.channels)}

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """(..., C, H, W) -> (..., C)."""
        pixels = maps.flatten(-2)  # (..., C, P)
        weights = torch.einsum("c,...cp->...p", state["query"], pixels).softmax(-1)
        return torch.einsum("...cp,...p->...c", pixels, weights)
