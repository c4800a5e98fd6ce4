"""Balanced softmax: cross-entropy on z_j + log n_j while training, plain logits at test time.

Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. (3).
"""

import torch
from torch import nn
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.classifier import fresh_linear, global_average, logits
from h2t.pipeline.training import objective
from h2t.pipeline.training.longtail import log_prior

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Nothing to choose."""


class Objective(objective.Objective):
    """On the mean of the experts' logits, with a linear classifier."""

    classifier = "linear"
    scale = 1.0

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, fresh_linear(experts, len(counts), channels))
        self.prior = log_prior(counts)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits (B, K)."""
        features = torch.stack([global_average(m) for m in maps])
        return logits("linear", dict(self.named_parameters()), features)

    def cost(self, found: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy of the logits (B, K) with the prior added."""
        return F.cross_entropy(found + self.prior.to(found), labels)
