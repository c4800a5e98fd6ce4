"""GCL: cosine logits with Gaussian noise that is larger for rarer classes.

Source: Li et al., "Long-tailed Visual Recognition via Gaussian Clouded Logit Adjustment", CVPR 2022, section 3. The
loss is CE(s c'), with c'_ij = cos_ij - amplitude |e_ij| d_j, less `margin` for the true class; e_ij is normal with
standard deviation 1/3, clamped to [-1, 1]; d_j = (log n_max - log n_j) / (log n_max - log n_min).

Published setting: on CIFAR-LT 200 epochs, batches of 64, mixup with alpha 1, in the presets.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import NonNegative, Positive, Section
from h2t.pipeline.training import objective
from h2t.pipeline.training.longtail import cloud_sizes, clouded

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `backbones.NAME.loss`; the defaults are those for CIFAR."""

    amplitude: NonNegative = 0.5
    """Size of the noise clouds, in cosines."""
    margin: NonNegative = 0.0
    """Margin of the true class, in cosines."""
    scale: Positive = 30.0
    """Factor of the cosine logits."""


class Objective(objective.CosineObjective):
    """A cosine classifier; the loss is taken on the mean of the experts' cosines."""

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__(loss.scale, channels, experts, counts)
        self.amplitude, self.margin = loss.amplitude, loss.margin
        self.clouds = cloud_sizes(counts)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy of the adjusted cosines (B, K). Draws noise from torch's generator at each call."""
        noise = (torch.randn_like(outputs) / 3).clamp(-1, 1)
        adjusted = clouded(outputs, labels, noise, self.clouds.to(outputs), self.amplitude, self.margin)
        return F.cross_entropy(self.scale * adjusted, labels)
