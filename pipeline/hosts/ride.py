"""RIDE: several experts, each with a linear or a cosine classifier; their logits are averaged.

Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021, section 3.
Stage II keeps only the basic cross-entropy (H2T paper, section 4.2), of the mean logits or summed over experts.

Published setting: RIDE itself is trained in one stage. Its second stage, which chooses the experts that a sample needs,
is not part of it; all are averaged. The code of H2T on RIDE is not public.
"""

from typing import Literal

import torch

from h2t.pipeline.base.params import Section
from h2t.pipeline.heads.host import GradientHost, State, stackable
from h2t.pipeline.training.longtail import cross_entropy

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    experts: Literal["mean", "sum"] = "mean"
    """Cross-entropy of the mean of the experts' logits, or the sum of each expert's."""


class Host(GradientHost):
    """Takes both kinds of classifier; the usual scales are 1 for linear and 30 for cosine."""

    starts_from = "trained"
    linear = True

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-entropy, averaged over the batch."""
        if self.constants.experts == "mean":
            return cross_entropy(self.logits(state, features), labels)
        logits = self.expert_logits(state, features)  # (E, B, K)
        return cross_entropy(logits, labels.unsqueeze(-2).expand(logits.shape[:-1])).sum(-1)
