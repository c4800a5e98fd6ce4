"""Balanced softmax: cross-entropy on z_j + log n_j in training, plain logits z at test time.

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
    """No options."""


class Objective(objective.Objective):
    """A linear classifier; the loss is taken on the mean of the experts' logits."""

    classifier = "linear"
    scale = 1.0

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, fresh_linear(experts, len(counts), channels))
        self.prior = log_prior(counts)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits (B, K), the mean over experts."""
        features = torch.stack([global_average(m) for m in maps])
        return logits("linear", dict(self.named_parameters()), features)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy of logits (B, K) plus the log prior."""
        return F.cross_entropy(outputs + self.prior.to(outputs), labels)
