"""Class-balanced loss: each class weighted by the inverse of its effective number of samples.

Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, eq. (10): mean_i w_y l_i with
w_j proportional to (1 - beta) / (1 - beta^n_j) and sum K; l is cross-entropy or the focal loss. The mean is over the
batch, not over its weights. The paper chooses beta among 0.9, 0.99, 0.999 and 0.9999. Batches are drawn instance-wise:
class-balanced ones would be weighted twice.
"""

from typing import Annotated, Literal

import torch

from h2t.pipeline.base.params import NonNegative, Section, within
from h2t.pipeline.heads.host import Context, GradientHost, State, stackable
from h2t.pipeline.training.longtail import effective_weights, focal_losses, log_likelihoods, sigmoid_focal_losses

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`."""

    beta: Annotated[float, within(0, 0.999999)] = 0.9999
    """At 0 all classes weigh alike; near 1 weights are proportional to 1 / n_j."""
    base: Literal["softmax", "focal", "sigmoid_focal"] = "softmax"
    """Cross-entropy, or the focal loss of the softmax or of a sigmoid per class."""
    gamma: NonNegative = 2.0
    """Exponent of the focal losses."""


class Host(GradientHost):
    """Starts from the stage-I classifier."""

    linear = True
    receiver = "instance"

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)
        self.constants = loss
        self.weights = effective_weights(context.counts, loss.beta)

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean over the batch of the weighted losses."""
        logits, gamma = self.logits(state, features), self.constants.gamma
        if self.constants.base == "softmax":
            losses = -log_likelihoods(logits, labels)
        elif self.constants.base == "focal":
            losses = focal_losses(logits, labels, gamma)
        else:
            losses = sigmoid_focal_losses(logits, labels, gamma)
        return (self.weights.to(losses)[labels] * losses).mean(-1)
