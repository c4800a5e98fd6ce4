"""DR: the stage-I classifier trained on by cross-entropy on class-balanced batches.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1
(cRT), started from stage I instead of anew, as H2T's Algorithm 1 does.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.heads.host import Context, GradientHost, State

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Nothing to choose."""


class Host(GradientHost):
    """Cross-entropy on the mean of the experts' logits."""

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch."""
        return F.cross_entropy(self.logits(state, features), labels)
