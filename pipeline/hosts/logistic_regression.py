"""Multinomial logistic regression on all training features, solved by L-BFGS: what a linear classifier can reach.

Source: Liu and Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", Mathematical Programming
1989. Minimises the weighted mean cross-entropy + l2 / 2 |W|^2. The problem is convex, starts at 0 and needs no learning
rate.

Published setting: none; it is not a method for long-tailed data. Weighting classes alike is our default.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Epochs, NonNegative, Section
from h2t.pipeline.heads.host import Context, FittedHost
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    l2: NonNegative = 1e-3
    """Weight of the squared norm of the weights, halved, in the loss."""
    weights: Literal["instance", "balanced"] = "balanced"
    """Every sample counts alike (`instance`), or every class (`balanced`)."""
    iterations: Epochs = 200
    """Most iterations of L-BFGS."""


class Host(FittedHost):
    """The mean of the experts' logits is linear in their concatenated features, so one problem gives all weights."""

    only_classifier = "linear"
    starts_from = "own"
    holds_logits = True

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, 1.0, context)

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """Weight (E, K, D) and bias (E, K) at the minimum, solved in float64."""
        experts, _, channels = features.shape
        classes = self.context.classes
        joint = features.double().movedim(0, 1).flatten(1) / experts  # (N, E * D)
        counts = torch.bincount(labels, minlength=classes).double()
        share = 1 / counts if self.constants.weights == "balanced" else torch.ones_like(counts)
        share = share[labels] / share[labels].sum()
        weight = joint.new_zeros(classes, experts * channels).requires_grad_()
        bias = joint.new_zeros(classes).requires_grad_()
        solver = torch.optim.LBFGS(
            [weight, bias],
            max_iter=self.constants.iterations,
            history_size=20,
            tolerance_grad=1e-9,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            solver.zero_grad()
            losses = F.cross_entropy(joint @ weight.T + bias, labels, reduction="none")
            loss = (share * losses).sum() + self.constants.l2 / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        by_expert = weight.detach().view(classes, experts, channels).movedim(0, 1).contiguous()
        return {"weight": by_expert, "bias": bias.detach().expand(experts, -1).contiguous()}
