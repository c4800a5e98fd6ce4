"""LWS: the stage-I classifier stays fixed, and one scale per class is trained by cross-entropy.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1.
"""

import torch

from h2t.pipeline.heads.host import ClassScaleHost, State, stackable
from h2t.pipeline.training.longtail import cross_entropy

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Host(ClassScaleHost):
    """Trains `class_scale` (E, K) only."""

    fixed = frozenset({"weight", "bias"})

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch."""
        return cross_entropy(self.logits(state, features), labels)
