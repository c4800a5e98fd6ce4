"""Cross-entropy on the mean of the experts' logits, with a linear classifier.

With `mixup` set for the backbone this is "CE + mixup", stage I of DR and MiSLAS (H2T paper, section 4.2).

Published setting: in the H2T paper 200 epochs on CIFAR-LT, batches of 128, rate 0.1 with steps at 160 and 180, mixup
with alpha 1: the defaults here with `mixup: 1.0`.
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
