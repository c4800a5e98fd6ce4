"""MiSLAS: label-aware smoothing and learnable weight scaling.

Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, section 3.3. With the smoothing
e_y of the true class, the loss is (1 - e_y) (-log p_y) + e_y mean_j (-log p_j); the mean is over all classes, as in the
authors' code. Logits are s * (W f + b) with a trained scale s per class, initially 1.

Published setting: 10 epochs at rate 0.1 for the scales and `classifier_rate` times that for the weights, sampler
`cyclic`, batches of 128 on CIFAR; the smoothing is set for each data set. Here rate 0.02 and sampler `balanced`, unless
set otherwise; presets of CIFAR-10-LT have the published smoothing and rate.
"""

import math

import torch

from h2t.pipeline.base.params import Rate, Ratio, Section
from h2t.pipeline.heads.host import ClassScaleHost, Context, State, stackable

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
    """e_j = tail + (head - tail) sin((n_j - n_min) pi / (2 (n_max - n_min))), (K,) in float64: the concave form."""
    n = counts.double()
    place = (n - n.min()) / (n.max() - n.min()).clamp_min(1e-12)
    return tail + (head - tail) * (place * math.pi / 2).sin()


class Host(ClassScaleHost):
    """Trains `class_scale` (E, K) at the full learning rate, and the classifier at a fraction of it."""

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.rates = {"weight": loss.classifier_rate, "bias": loss.classifier_rate}
        self.smooth = smoothing(context.counts, loss.smooth_head, loss.smooth_tail)

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-entropy with label-aware smoothing, averaged over the batch."""
        losses = -self.logits(state, features).log_softmax(-1)  # (B, K): of each class, if it were the true one
        true = losses.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        smooth = self.smooth.to(losses)[labels]
        return ((1 - smooth) * true + smooth * losses.mean(-1)).mean(-1)
