"""GCL: cosine logits with Gaussian noise, larger for rarer classes, and a focal weight.

Source: Li et al., "Long-tailed Visual Recognition via Gaussian Clouded Logit Adjustment", CVPR 2022, section 3; stage
II as in the authors' code: CE(s c') (1 - p_y)^focal with c'_ij = cos_ij - amplitude |e_ij| d_j, minus `margin` for the
true class, and d_j = (log n_max - log n_j) / (log n_max - log n_min). No gradient flows through the focal weight.

Published setting: 30 epochs, batches of 64, rate 0.002, and on CIFAR mixup of images, of which a cache holds no maps,
so there is none here. Its sampler draws as `balanced` does. Batch size and rate are settings; presets of CIFAR have the
published ones, and 10 epochs.
"""

import numpy as np
import torch

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import Context, GradientHost, State, stackable
from h2t.pipeline.training.longtail import cloud_sizes, clouded, log_likelihoods

NUMBER = 2026112601  # other results, another number: docs/numbers.md

DEVIATION = 1 / 3  # standard deviation of the noise


class Loss(Section):
    amplitude: NonNegative = 0.5
    """Size of the noise clouds, in cosines."""
    margin: NonNegative = 0.1
    """Margin of the true class, in cosines."""
    focal: NonNegative = 1.0
    """Exponent of the focal weight; 0 is none."""


class Host(GradientHost):
    """Needs `classifier: cosine`. `scale` is the paper's s (20 in stage II on CIFAR)."""

    only_classifier = "cosine"
    linear = True

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.clouds = cloud_sizes(context.counts)

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor:
        """Noise e (batch, K), float64: normal with standard deviation 1/3, clamped to [-1, 1]."""
        drawn = draws.normal(0, DEVIATION, (batch, self.context.classes))
        return torch.from_numpy(drawn).clamp(-1, 1)

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Focal cross-entropy of the noisy logits, averaged over the batch."""
        assert noise is not None
        constants = self.constants
        cosines = self.logits(state, features) / self.scale
        noisy = clouded(cosines, labels, noise, self.clouds.to(cosines), constants.amplitude, constants.margin)
        losses = -log_likelihoods(self.scale * noisy, labels)  # (B,)
        weight = (1 - (-losses.detach()).exp()).clamp_min(0) ** constants.focal
        return (weight * losses).mean(-1)
