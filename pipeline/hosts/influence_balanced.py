"""Influence-balanced loss: cross-entropy divided by the sample's influence, the 1-norm of its gradient in the weights.

Source: Park et al., "Influence-Balanced Loss for Imbalanced Visual Classification", ICCV 2021, section 3, as in the
authors' code: mean_i w_y alpha CE_i / (g_i f_i + epsilon) with g_i = sum_j |p_ij - [j = y]| = 2 (1 - p_y), f_i the
1-norm of the features (mean over experts) and w_j proportional to 1 / n_j with sum K. alpha 1000 and epsilon 0.001 as
there; alpha multiplies the learning rate, so tune that with it. As there, the gradient flows through g as well, and
vanishes as p_y nears 1; with `detach` the weight is a constant. f is that of the fused features, as these make the
gradient.

Published setting: the whole network, 100 epochs by cross-entropy, then 100 by this loss at rate 0.001 and less.
Cross-entropy is stage I here.
"""

import torch

from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.training.weighted import InfluenceBalanced

NUMBER = 2026112601  # other results, another number: docs/numbers.md

Loss = InfluenceBalanced


class Host(GradientHost):
    """Needs a linear classifier: for cosines, g f is not the norm of the gradient."""

    only_classifier = "linear"
    receiver = "instance"

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.weights = loss.class_weights(context.counts)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean over the batch of the weighted losses."""
        sizes = features.abs().sum(-1).mean(0)
        return self.constants.mean(self.logits(state, features), labels, sizes, self.weights)
