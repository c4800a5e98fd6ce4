"""Cross-entropy on the mean of the experts' logits, with a linear classifier.

With `mixup` set for the backbone this is "CE + mixup", stage I of DR and MiSLAS (H2T paper, section 4.2).
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.training import objective

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Objective(objective.LinearObjective):
    """A linear classifier with the initial weights of the published codes."""

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy of logits (B, K)."""
        return F.cross_entropy(outputs, labels)
