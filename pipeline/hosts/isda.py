"""ISDA: cross-entropy as if each feature vector were drawn from a Gaussian with the covariance of its class.

Source: Wang et al., "Implicit Semantic Data Augmentation for Deep Networks", NeurIPS 2019, section 3, as in the
authors' code: CE of z_k + (r / 2) d^T S_y d with d = w_k - w_y, which bounds the expected loss over features drawn from
N(h, r S_y). S_y is the covariance (divided by the count) of the training features of the class, before fusion. r =
strength * epoch / epochs, epochs from 0. With several experts each has its own S and its own term. A class of one
sample has S = 0. Batches are drawn instance-wise.

Published setting: the whole network, strength 0.5 with whole covariances on CIFAR, 7.5 with diagonal ones on ImageNet,
not long-tailed; covariances are estimated over the steps. Here the backbone is frozen, so they are computed once.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.covariances import CovarianceHost
from h2t.pipeline.heads.host import State, TrainingBatch

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    strength: NonNegative = 0.5
    """The r of the last epoch; it grows linearly from 0."""
    covariance: Literal["full", "diagonal"] = "full"
    """Whole covariances take K D^2 numbers per expert, diagonal ones K D."""


class Host(CovarianceHost):
    """Needs a linear classifier: the bound does not hold for cosines."""

    linear = True
    products = 4

    def batch_loss(self, state: State, batch: TrainingBatch) -> torch.Tensor:
        """Mean cross-entropy of the batch, with the terms of the covariances."""
        return F.cross_entropy(self.spread_logits(state, self.covariances, batch), batch.labels)
