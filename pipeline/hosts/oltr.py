"""OLTR's dynamic meta-embedding: features gain a mix of class centroids and shrink far from all of them.

Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, section 3, as in the authors'
code: v = rho (h + e m) with m = softmax(W_h h + b_h) C, e = tanh(W_s h + b_s) and rho = 10 / min_c |h - C_c|; the
logits are 16 |v| / (1 + |v|) cos(v, w_k). The loss is CE + 0.01 R with R = sum_i |h_i - C_y|^2 / (2 B) + 0.01 max(0, 10
- the mean over all B K entries of |h_i - C_c|^2, own classes counted as 0). The centroids C start at the class means of
the training features, before fusion, W_h, b_h and w at the stage-I classifier, W_s and b_s uniform in +- 1 / sqrt(D).
Batches have four samples of a class at a time, as there. With several experts each has its own parts, and logits and R
are averaged.

Published setting: ImageNet-LT, ResNet-10, 60 epochs; backbone, attention on its maps and classifier are trained, the
classifier at rate 0.1. Here the backbone is frozen and without attention, centroids follow the plain gradient, and
distances are at least 0.000001, as the feature of a class of one sample is its centroid.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import NonNegative, Positive, Section
from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.longtail import own_class

NUMBER = 2026112601  # other results, another number: docs/numbers.md

NEAREST = 1e-6  # smallest distance between a feature and a centroid
REACH = 10.0  # rho is this over the smallest distance
SCALE = 16.0  # of the logits


class Loss(Section):
    centroid_weight: NonNegative = 0.01
    """Weight of R."""
    repel_weight: NonNegative = 0.01
    """Weight in R of the term that keeps centroids of other classes away."""
    repel_margin: NonNegative = 10.0
    """Mean squared distance from which that term is 0."""
    centroid_rate: Positive = 0.1
    """Learning rate of the centroids, as a share of `optimiser.lr`."""


class Host(GradientHost):
    """Needs a linear classifier in stage I, which becomes W_h and b_h."""

    only_classifier = "linear"
    receiver = "cyclic"
    constants: Loss
    means: torch.Tensor

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.rates = {"centroids": loss.centroid_rate}
        self.size = 3 + context.channels / context.classes

    def prepare(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Keeps the class means, (E, K, D)."""
        self.means = torch.stack([part.mean(1) for part in features.split(self.context.counts.tolist(), dim=1)], 1)

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """`weight`, `memory_weight`, `centroids` (E, K, D), `memory_bias` (E, K), `select_weight` (E, D, D) and
        `select_bias` (E, D).
        """
        state, size = self.stage1_state(stage1), (self.context.experts, self.context.channels)
        bound = 1 / math.sqrt(size[1])
        return {
            "weight": state["weight"],
            "memory_weight": state["weight"].clone(),
            "memory_bias": state["bias"],
            "centroids": self.means.clone(),
            "select_weight": torch.from_numpy(draws.uniform(-bound, bound, (*size, size[1]))),
            "select_bias": torch.from_numpy(draws.uniform(-bound, bound, size)),
        }

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits (B, K), the mean over the experts."""
        memory = features @ state["memory_weight"].mT + state["memory_bias"].unsqueeze(-2)
        selected = (features @ state["select_weight"].mT + state["select_bias"].unsqueeze(-2)).tanh()
        nearest = self._squares(state, features).amin(-1, keepdim=True).clamp_min(NEAREST**2).sqrt()
        v = (features + selected * (memory.softmax(-1) @ state["centroids"])) * REACH / nearest
        length = v.norm(dim=-1, keepdim=True)
        cosines = F.normalize(v, dim=-1) @ F.normalize(state["weight"], dim=-1).mT
        return (SCALE * length / (1 + length) * cosines).mean(0)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch, and what draws centroids to their class and away from others."""
        constants, squares = self.constants, self._squares(state, features)
        own = own_class(squares[0], labels)
        attract = torch.where(own, squares, 0).sum(-1).mean(-1) / 2
        apart = torch.where(own, 0, squares).mean((-2, -1))
        repel = (constants.repel_margin - apart).clamp_min(0)
        term = (attract + constants.repel_weight * repel).mean()
        return F.cross_entropy(self.logits(state, features), labels) + constants.centroid_weight * term

    def _squares(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Squared distances between features and centroids, (E, B, K)."""
        centroids = state["centroids"]
        lengths = features.square().sum(-1, keepdim=True) + centroids.square().sum(-1).unsqueeze(-2)
        return (lengths - 2 * features @ centroids.mT).clamp_min(0)
