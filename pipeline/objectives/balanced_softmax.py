"""Balanced softmax: cross-entropy on z_j + log n_j in training, plain logits z at test time.

Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. (3).

Published setting: 13,000 steps with batches of 512 and stronger augmentation (AutoAugment, Cutout) on CIFAR. The
paper's meta sampler is not part of it.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.training import objective
from h2t.pipeline.training.longtail import log_prior

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Objective(objective.LinearObjective):
    """A linear classifier; the loss is taken on the mean of the experts' logits."""

    def __init__(self, loss: Section, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__(loss, channels, experts, counts)
        self.prior = log_prior(counts)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy of logits (B, K) plus the log prior."""
        return F.cross_entropy(outputs + self.prior.to(outputs), labels)
