"""Pair mixup: class-balanced samples mixed with instance-wise ones, features and labels alike.

Source: the pairing of the two samplers is that of Zhou et al., "BBN", CVPR 2020, section 4, and of the mixup variants
in Zhang et al., "Bag of Tricks for Long-Tailed Visual Recognition", AAAI 2021; here it acts on features, as manifold
mixup does (Verma et al., ICML 2019): h' = t h_i + (1 - t) g_i and mean_i [t CE(z(h'), y_i) + (1 - t) CE(z(h'), y'_i)]
with one t from Beta(alpha, alpha) for each batch. g and y' are drawn by a sampler of their own, apart from H2T's
donors, and keep their labels.

Published setting: none; this combination is ours. The sources mix images and train the whole network.
"""

import numpy as np
import torch

from h2t.pipeline.base.params import Positive, Section
from h2t.pipeline.heads.host import GradientHost, State, TrainingBatch
from h2t.pipeline.training.longtail import mixed_cross_entropy

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    alpha: Positive = 1.0
    """Both parameters of the Beta distribution of t."""


class Host(GradientHost):
    """Starts from the stage-I classifier."""

    partner = "instance"

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor:
        """T in each line, (batch,), float64."""
        alpha = self.constants.alpha
        return torch.full((batch,), draws.beta(alpha, alpha), dtype=torch.float64)

    def batch_loss(self, state: State, batch: TrainingBatch) -> torch.Tensor:
        """The mixed loss, averaged over the batch."""
        mixed = torch.lerp(batch.partners, batch.features, batch.noise.unsqueeze(-1))
        return mixed_cross_entropy(self.logits(state, mixed), batch.labels, batch.partner_labels, batch.noise)
