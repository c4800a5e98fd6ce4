"""Cross-entropy on the mean of the experts' logits, with a linear classifier.

With `mixup` set for the backbone this is "CE + mixup", stage I of DR and MiSLAS (H2T paper, section 4.2).
"""

import torch
from torch import nn
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.classifier import fresh_linear, global_average, logits
from h2t.pipeline.training import objective

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """No options."""


class Objective(objective.Objective):
    """A linear classifier with the initial weights of the published codes (`networks.classifier.fresh_linear`)."""

    classifier = "linear"
    scale = 1.0

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, fresh_linear(experts, len(counts), channels))

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits (B, K), the mean over experts."""
        features = torch.stack([global_average(m) for m in maps])
        return logits("linear", dict(self.named_parameters()), features)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy of logits (B, K)."""
        return F.cross_entropy(outputs, labels)
