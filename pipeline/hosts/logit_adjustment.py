"""Post-hoc logit adjustment: the stage-I logits minus tau times the log of the class prior; nothing is trained.

Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, eq. (9). Their logit-adjusted loss is host
balanced_softmax.

Published setting: the same formula, on a network trained by cross-entropy.
"""

import torch

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import FittedHost, State
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.longtail import log_prior

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    tau: NonNegative = 1.0
    """Strength of the adjustment; 0 is stage I."""


class Host(FittedHost):
    """The logits of stage I minus `prior` (K,)."""

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """The stage-I classifier, and `prior` = tau log(n_j / N), (K,)."""
        return {**self.stage1_state(stage1), "prior": self.constants.tau * log_prior(self.context.counts)}

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits (B, K)."""
        return super().logits(state, features) - state["prior"]
