"""Balanced softmax: cross-entropy of z_j + tau log n_j on instance-sampled batches; plain logits z at test time.

Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. (3). With tau other
than 1 it is the logit-adjusted loss of Menon et al., ICLR 2021, eq. (10). The prior corrects for the class imbalance of
the batches, so receivers are drawn instance-wise: class-balanced batches would be corrected twice.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.training.longtail import log_prior

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`."""

    tau: NonNegative = 1.0
    """Strength of the class prior; 1 is balanced softmax, 0 cross-entropy."""


class Host(GradientHost):
    """Starts from the stage-I classifier."""

    linear = True
    receiver = "instance"

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)
        self.prior = loss.tau * log_prior(context.counts)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch."""
        logits = self.logits(state, features)
        return F.cross_entropy(logits + self.prior.to(logits), labels)
