"""Influence-balanced loss: cross-entropy divided by the sample's influence, the 1-norm of its gradient in the weights.

Source: Park et al., "Influence-Balanced Loss for Imbalanced Visual Classification", ICCV 2021, section 3, as in the
authors' code: cross-entropy before `start_epoch`, then mean_i w_y alpha CE_i / (g_i f_i + epsilon) with g_i = sum_j
|p_ij - [j = y]| = 2 (1 - p_y), f_i the 1-norm of the features (mean over experts) and w_j proportional to 1 / n_j with
sum K. As there, the gradient flows through g and f, unless `detach` makes the influence a constant. Host
`influence_balanced` has the same loss.

Published setting: 200 epochs on CIFAR-LT with `milestones: [100, 160, 180]` and `gamma: 0.01`; alpha multiplies the
learning rate.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Index
from h2t.pipeline.networks.classifier import global_average, logits
from h2t.pipeline.training import objective
from h2t.pipeline.training.weighted import InfluenceBalanced

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(InfluenceBalanced):
    """Keys of `backbones.NAME.loss`; the defaults are those for CIFAR."""

    start_epoch: Index = 100
    """Epoch, counted from 0, from which samples are weighted; 100 of 200 as published."""


class Objective(objective.LinearObjective):
    """A linear classifier; the loss is taken on the mean of the experts' logits."""

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__(loss, channels, experts, counts)
        self.constants = loss
        self.weights = loss.class_weights(counts)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits, the mean over experts, and in the last column the 1-norm of the features, (B, K + 1)."""
        features = torch.stack([global_average(m) for m in maps])
        sizes = features.abs().sum(-1).mean(0)
        return torch.cat([logits("linear", dict(self.named_parameters()), features), sizes.unsqueeze(-1)], -1)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy or the influence-balanced loss, from the result of `forward`."""
        found, sizes = outputs[:, :-1], outputs[:, -1]
        if epoch < self.constants.start_epoch:
            return F.cross_entropy(found, labels)
        return self.constants.mean(found, labels, sizes, self.weights)
