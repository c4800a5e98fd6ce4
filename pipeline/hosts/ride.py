"""RIDE: experts whose logits are averaged, with a linear or a cosine classifier each.

Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021, section 3; in
stage II only the basic cross-entropy is kept (H2T paper, section 4.2), on the mean of the logits or summed over
experts.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.heads.host import Context, GradientHost, State

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`."""

    experts: Literal["mean", "sum"] = "mean"
    """Cross-entropy of the mean of the experts' logits, or the sum of each expert's."""


class Host(GradientHost):
    """The classifier decides: linear with scale 1, or cosine with scale 30."""

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)
        self.each = loss.experts == "sum"

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean over the batch."""
        if not self.each:
            return F.cross_entropy(self.logits(state, features), labels)
        logits = self.expert_logits(state, features)  # (E, B, K)
        per_sample = F.cross_entropy(
            logits.movedim(0, -1), labels.unsqueeze(-1).expand(-1, len(logits)), reduction="none"
        )
        return per_sample.sum(-1).mean()
