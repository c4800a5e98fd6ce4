"""LADE: balanced softmax plus a term that brings the logits to those of a uniform label distribution.

Source: Hong et al., "Disentangling Label Distribution for Long-tailed Visual Recognition", CVPR 2021, section 3, as in
the authors' code: the loss is CE(z + log pi, y) + alpha R with R = -sum_c pi_c (a_c - q_c - penalty q_c^2). Here pi_c =
n_c / N, a_c is the mean of z_c over the batch's samples of class c (0 without any), and q_c = logsumexp_i (z_ic - log
pi_c - log K) - log B. Batches are drawn instance-wise, because the loss carries the prior. q is taken over the batch,
so the smaller last batch of an epoch changes it. Test time uses plain z.

Published setting: the whole network; on CIFAR-100-LT penalty 0.01, alpha 0.1, batches of 256, rate 0.2, 200 epochs; on
ImageNet-LT penalty 0.5, alpha 0.05. In the authors' code, as here, the weight inside q_c is that of the column's class.
"""

import math

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import PriorHost, State
from h2t.pipeline.training.longtail import own_class

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`; the defaults are those for CIFAR-100-LT."""

    alpha: NonNegative = 0.1
    """Weight of the term R; 0 is balanced softmax."""
    penalty: NonNegative = 0.01
    """Weight of q^2 in R, lambda in the paper."""


class Host(PriorHost):
    """Starts from the stage-I classifier."""

    tau = 1.0

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-entropy with the prior, averaged over the batch, plus alpha R."""
        logits = self.logits(state, features)
        prior = self.prior.to(logits)
        own = own_class(logits, labels).to(logits)
        a = (own * logits).sum(0) / own.sum(0).clamp_min(1)
        q = (logits - prior).logsumexp(0) - math.log(self.context.classes * len(labels))
        term = -(prior.exp() * (a - q - self.constants.penalty * q.square())).sum()
        return F.cross_entropy(logits + prior, labels) + self.constants.alpha * term
