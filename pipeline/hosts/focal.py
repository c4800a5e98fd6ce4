"""Focal loss: cross-entropy weighted by (1 - p_y)^gamma, so that samples that are predicted well count less.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. (4): mean_i (1 - p_y)^gamma (-log p_y) with
p the softmax, as in long-tail repositories, or with a sigmoid per class, as published. gamma is 2 there; long-tail
repositories use 1 or 2. Batches are drawn instance-wise, as there; with `receiver: balanced` it is DR with this loss.
"""

from typing import Literal

import torch

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import Context, GradientHost, State, stackable
from h2t.pipeline.training.longtail import focal_losses, sigmoid_focal_losses

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`."""

    gamma: NonNegative = 2.0
    """Exponent of the weight; 0 is cross-entropy."""
    form: Literal["softmax", "sigmoid"] = "softmax"
    """The true class's softmax probability, or a sigmoid for each class."""
    detach: bool = False
    """Treat the weight as a constant: no gradient flows through it. Softmax only."""


class Host(GradientHost):
    """Starts from the stage-I classifier."""

    linear = True
    receiver = "instance"

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)
        self.constants = loss

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean focal loss of the batch."""
        logits, constants = self.logits(state, features), self.constants
        if constants.form == "sigmoid":
            return sigmoid_focal_losses(logits, labels, constants.gamma).mean(-1)
        return focal_losses(logits, labels, constants.gamma, detach=constants.detach).mean(-1)
