"""Attention: a weighted mean over the image; the weights are a softmax over each pixel's product with a trained query.

Source: Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, eq. (7) and (8), but
without a hidden layer: the query acts on the pixels directly. It starts at 0, which gives the average.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.networks import pool

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Pool(pool.Pool):
    """One query for all experts. The weights depend on all channels, so pooling does not commute with fusion."""

    def initial(self) -> dict[str, torch.Tensor]:
        """The query, (C,)."""
        return {"query": torch.zeros(self.channels)}

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., C, H, W) -> features (..., C)."""
        pixels = maps.flatten(-2)  # (..., C, P)
        weights = torch.einsum("c,...cp->...p", state["query"], pixels).softmax(-1)
        return torch.einsum("...cp,...p->...c", pixels, weights)
