"""MiSLAS: label-aware smoothing and learnable weight scaling.

Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, section 3.3. With e_y the
smoothing of the true class, the loss is (1 - e_y) (-log p_y) + e_y mean_j (-log p_j), the mean over all classes as in
the authors' code; logits are s * (W f + b) with a trained scale s per class that starts at 1.
"""

import math

import numpy as np
import torch

from h2t.pipeline.base.params import Rate, Ratio, Section
from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`; the defaults are those for CIFAR-100-LT, imbalance ratio 100."""

    smooth_head: Ratio = 0.4
    """Label smoothing of the largest class."""
    smooth_tail: Ratio = 0.1
    """Label smoothing of the smallest class."""
    classifier_rate: Rate = 0.2
    """Learning rate of the classifier, as a share of `optimiser.lr`, which the class scales have."""


def smoothing(counts: torch.Tensor, head: float, tail: float) -> torch.Tensor:
    """e_j = tail + (head - tail) sin((n_j - n_min) pi / (2 (n_max - n_min))), the concave form, (K,)."""
    n = counts.double()
    place = (n - n.min()) / (n.max() - n.min()).clamp_min(1e-12)
    return tail + (head - tail) * (place * math.pi / 2).sin()


class Host(GradientHost):
    """Trains the classifier slowly and `class_scale`, (E, K), at the full rate."""

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)
        self.rates = {"weight": loss.classifier_rate, "bias": loss.classifier_rate}
        self.smooth = smoothing(context.counts, loss.smooth_head, loss.smooth_tail)

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """The stage-I classifier with scales of 1."""
        state = self.stage1_state(stage1)
        return {**state, "class_scale": torch.ones(state["weight"].shape[:2])}

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """(E, B, D) -> (B, K)."""
        return (self.expert_logits(state, features) * state["class_scale"].unsqueeze(-2)).mean(0)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Label-aware smoothing, the mean of the batch."""
        surprise = -self.logits(state, features).log_softmax(-1)  # (B, K)
        own = surprise.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        smooth = self.smooth.to(surprise)[labels]
        return ((1 - smooth) * own + smooth * surprise.mean(-1)).mean()
