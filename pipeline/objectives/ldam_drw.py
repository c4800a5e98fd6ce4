"""LDAM with deferred re-weighting: larger margins for rarer classes, class weights late in training.

Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019. The loss is
CE_w(s (cos_j - 1[j = y] m_y)) with m_j = margin n_j^(-1/4) / max_l n_l^(-1/4). The class weights w_j are 1 before
`reweight_epoch`, then proportional to (1 - beta) / (1 - beta^n_j) with sum K (section 3.3).

Published setting: 200 epochs on CIFAR-LT, rate 0.1, times 0.01 at epochs 160 and 180 (`gamma: 0.01`), in the presets.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Beta, Index, NonNegative, Positive, Section
from h2t.pipeline.training import objective
from h2t.pipeline.training.longtail import effective_weights, ldam_margins

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    margin: NonNegative = 0.5
    """Largest margin, that of the rarest class."""
    scale: Positive = 30.0
    """Factor of the cosine logits."""
    beta: Beta = 0.9999
    """Class weights by the effective number of samples, from `reweight_epoch` on."""
    reweight_epoch: Index = 160
    """Epoch, counted from 0, from which classes are weighted; 160 of 200 as published."""


class Objective(objective.CosineObjective):
    """A cosine classifier; the loss is taken on the mean of the experts' cosines."""

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__(loss.scale, channels, experts, counts)
        self.reweight_epoch = loss.reweight_epoch
        self.margins = ldam_margins(counts, loss.margin)
        self.weights = effective_weights(counts, loss.beta)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Weighted cross-entropy of the cosines (B, K) less the true class's margin."""
        margins = F.one_hot(labels, len(self.margins)) * self.margins.to(outputs)
        weights = self.weights.to(outputs) if epoch >= self.reweight_epoch else None
        return F.cross_entropy(self.scale * (outputs - margins), labels, weights)
