"""tau-normalisation: each class's stage-I weights divided by their norm to the power tau, no bias; nothing is trained.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, eq. (2).

Published setting: as here; the authors choose tau from 0, 0.1 ... 2 on validation images.
"""

import torch

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import FittedHost
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    tau: NonNegative = 1.0
    """0 keeps the weights, 1 gives them equal length; choose it on validation images."""


class Host(FittedHost):
    """Needs a linear classifier: a cosine classifier is already normalised."""

    only_classifier = "linear"

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """Weight w_j / |w_j|^tau (E, K, D) for each class and expert, and a bias of 0, (E, K)."""
        weight = self.stage1_state(stage1)["weight"]
        norm = weight.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return {"weight": weight / norm**self.constants.tau, "bias": torch.zeros(weight.shape[:2])}
