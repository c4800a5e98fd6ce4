"""Manifold mixup: each feature vector is mixed with that of another sample of the batch, and so is the loss.

Source: Verma et al., "Manifold Mixup", ICML 2019, section 2, at the features before the classifier, as Zhang et al.,
"Bag of Tricks for Long-Tailed Visual Recognition", AAAI 2021, use it: h' = t h_i + (1 - t) h_s(i) and mean_i [t
CE(z(h'), y_i) + (1 - t) CE(z(h'), y_s(i))], with one t from Beta(alpha, alpha) and one permutation s for each batch.
alpha is 1 in their code. Batches are drawn instance-wise. With H2T, features are fused, pooled, then mixed. `selection:
mixup` of the grid is another thing: it mixes in donors, and the label stays the receiver's.

Published setting: the whole network, mixed at a layer that is drawn in each step. Bag of Tricks mixes after pooling, as
here, in each of 400 epochs.
"""

import torch

from h2t.pipeline.base.params import Positive, Section
from h2t.pipeline.heads.host import MixingHost

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    alpha: Positive = 1.0
    """Both parameters of the Beta distribution of t."""


class Host(MixingHost):
    """Labels are mixed with the same share as features."""

    def label_share(self, share: torch.Tensor, labels: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
        """The share t of each sample's own label, (B,)."""
        return share
