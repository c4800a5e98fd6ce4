"""Class-balanced loss: each class weighted by the inverse of its effective number of samples.

Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, eq. (10): mean_i w_y l_i with
w_j proportional to (1 - beta) / (1 - beta^n_j) and sum K; l is cross-entropy or the focal loss. The mean is over the
batch, not over its weights. The paper chooses beta among 0.9, 0.99, 0.999 and 0.9999 and weights from the first epoch
on; long-tail repositories also start at epoch 160 of 200 (`start_epoch`). Host `class_balanced` has the same loss.

Published setting: ResNet-32, 200 epochs on CIFAR-LT, rate 0.1, times 0.01 at epochs 160 and 180 (`gamma: 0.01`). Biases
start at 0 here, for the sigmoid too.
"""

import torch

from h2t.pipeline.base.params import Index
from h2t.pipeline.training.weighted import ClassBalanced, WeightedObjective

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(ClassBalanced):
    start_epoch: Index = 0
    """Epoch, counted from 0, from which classes are weighted; before it all weigh 1."""


class Objective(WeightedObjective):
    """A linear classifier; the loss is taken on the mean of the experts' logits."""

    constants: Loss

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Mean weighted loss of logits (B, K)."""
        weights = self.weights if epoch >= self.constants.start_epoch else torch.ones_like(self.weights)
        return self.constants.mean(outputs, labels, weights)
