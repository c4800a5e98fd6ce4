"""LWS: the stage-I classifier stays as it is, and one scale per class is trained by cross-entropy.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1.
"""

import numpy as np
import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Nothing to choose."""


class Host(GradientHost):
    """Logits s * (W f + b) with `class_scale` s, (E, K), from 1."""

    fixed = frozenset({"weight", "bias"})

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)

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
        """Mean cross-entropy of the batch."""
        return F.cross_entropy(self.logits(state, features), labels)
