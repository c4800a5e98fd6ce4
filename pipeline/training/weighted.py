"""Losses of both stages that weight samples: the constants, which are keys of the parameters, and the formulas.

`logits` (..., B, K), `labels` (..., B), int64; losses of samples (..., B). Sources: the plug-ins that bear the names.
"""

from typing import Literal

import torch

from h2t.pipeline.base.params import Beta, NonNegative, Positive, Section
from h2t.pipeline.training.longtail import effective_weights, focal_losses, log_likelihoods, sigmoid_focal_losses
from h2t.pipeline.training.objective import LinearObjective


class WeightedLoss(Section):
    """A loss that is the mean over the batch, not over its weights, of weighted losses of samples."""

    def class_weights(self, counts: torch.Tensor) -> torch.Tensor:
        """The weight of each class, float64 (K,), from its training samples, `counts` (K,); by default 1."""
        return torch.ones(len(counts), dtype=torch.float64)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The losses of samples before classes are weighted."""
        raise NotImplementedError

    def mean(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The mean weighted loss of each batch, (...), with the `weights` (K,) of `class_weights`."""
        losses = self.losses(logits, labels)
        return (weights.to(losses)[labels] * losses).mean(-1)


class Focal(WeightedLoss):
    """Focal loss: (1 - p_y)^gamma (-log p_y)."""

    gamma: NonNegative = 2.0
    """Exponent of the weight; 0 is cross-entropy."""
    form: Literal["softmax", "sigmoid"] = "softmax"
    """The true class's softmax probability, or a sigmoid for each class."""
    detach: bool = False
    """Treat the weight as a constant: no gradient flows through it. Softmax only."""

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The focal losses."""
        if self.form == "sigmoid":
            return sigmoid_focal_losses(logits, labels, self.gamma)
        return focal_losses(logits, labels, self.gamma, detach=self.detach)


class ClassBalanced(WeightedLoss):
    """Class-balanced loss: classes weighted by (1 - beta) / (1 - beta^n_j), scaled to sum K."""

    beta: Beta = 0.9999
    """At 0 all classes weigh alike; near 1 weights are proportional to 1 / n_j."""
    base: Literal["softmax", "focal", "sigmoid_focal"] = "softmax"
    """Cross-entropy, or the focal loss of the softmax or of a sigmoid per class."""
    gamma: NonNegative = 2.0
    """Exponent of the focal losses."""

    def class_weights(self, counts: torch.Tensor) -> torch.Tensor:
        """Weights by the effective number of samples."""
        return effective_weights(counts, self.beta)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy or focal losses."""
        if self.base == "softmax":
            return -log_likelihoods(logits, labels)
        if self.base == "focal":
            return focal_losses(logits, labels, self.gamma)
        return sigmoid_focal_losses(logits, labels, self.gamma)


class InfluenceBalanced(Section):
    """Influence-balanced loss: w_y alpha CE / (g f + epsilon) with g = 2 (1 - p_y) and f the 1-norm of the features."""

    alpha: Positive = 1000.0
    """Factor of the loss."""
    epsilon: Positive = 1e-3
    """Added to the influence, which is 0 for a perfect prediction."""
    weights: Literal["inverse", "none"] = "inverse"
    """Class weights proportional to 1 / n_j, for instance-wise batches; `none` suits balanced batches."""
    detach: bool = False
    """Treat the influence as a constant: no gradient flows through it."""

    def class_weights(self, counts: torch.Tensor) -> torch.Tensor:
        """The weights w, float64 (K,) with sum K, from the training samples of each class, `counts` (K,)."""
        inverse = 1 / counts.double()
        return inverse * len(counts) / inverse.sum() if self.weights == "inverse" else inverse**0

    def mean(
        self, logits: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss of a batch, a scalar. `sizes` (B,): f of each sample; `weights` (K,): `class_weights`."""
        losses = -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        influence = -2 * (-losses).expm1() * sizes + self.epsilon
        if self.detach:
            influence = influence.detach()
        return (weights.to(losses)[labels] * self.alpha * losses / influence).mean()


class WeightedObjective(LinearObjective):
    """Base of objectives with a `WeightedLoss` of the mean of the experts' logits."""

    constants: WeightedLoss

    def __init__(self, loss: WeightedLoss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__(loss, channels, experts, counts)
        self.constants = loss
        self.weights = loss.class_weights(counts)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Mean weighted loss of logits (B, K)."""
        return self.constants.mean(outputs, labels, self.weights)
