"""cRT: the classifier trained anew by cross-entropy on class-balanced batches.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1.
"""

import math

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
    """Starts as a fresh linear layer, uniform within 1 / sqrt(D), whatever stage I's classifier was."""

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """Drawn from the head's seed."""
        context = self.context
        bound = 1 / math.sqrt(context.channels)
        shape = (context.experts, context.classes, context.channels)
        state = {"weight": torch.from_numpy(draws.uniform(-bound, bound, shape))}
        if self.classifier == "linear":
            state["bias"] = torch.from_numpy(draws.uniform(-bound, bound, shape[:2]))
        return state

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch."""
        return F.cross_entropy(self.logits(state, features), labels)
