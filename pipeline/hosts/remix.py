"""Remix: features are mixed as in manifold mixup, but the label may go to the rarer class alone.

Source: Chou et al., "Remix: Rebalanced Mixup", ECCV 2020 workshops, section 3. With features h' = t h_i + (1 - t) h_j,
the share u of the label y_i is 0 if n_i / n_j >= kappa and t < tau; 1 if n_i / n_j <= 1 / kappa and 1 - t < tau; else
t. The loss is mean_i [u CE(z(h'), y_i) + (1 - u) CE(z(h'), y_j)]. kappa 3 and tau 0.5 as there; t is from Beta(alpha,
alpha) with alpha 1. Batches are drawn instance-wise; the rule uses the training counts whatever draws them.

Published setting: the whole network, on images, so mixing features is our variant.
"""

import torch

from h2t.pipeline.base.params import Positive, Ratio, Section
from h2t.pipeline.heads.host import MixingHost

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    alpha: Positive = 1.0
    """Both parameters of the Beta distribution of t."""
    kappa: Positive = 3.0
    """Ratio of the classes' counts from which the rarer class may get the whole label."""
    tau: Ratio = 0.5
    """It does if the other sample's share is below this."""


class Host(MixingHost):
    """Labels follow Remix's rule."""

    def label_share(self, share: torch.Tensor, labels: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
        """The share u of each sample's own label, (B,)."""
        counts = self.context.counts.double().to(labels.device)
        own, other = counts[labels], counts[partners]
        kappa, tau = self.constants.kappa, self.constants.tau
        share = torch.where((own >= kappa * other) & (share < tau), 0.0, share)
        return torch.where((kappa * own <= other) & (1 - share < tau), 1.0, share)
