"""ResLT: branches for head, medium and tail classes share one linear layer; each has its own batch norm.

Source: Cui et al., "ResLT: Residual Learning for Long-tailed Recognition", TPAMI 2022. Loss: (1 - beta) CE(z_H + z_M +
z_T) + beta I, where I is the mean of the branches' own losses (`networks.branches`).

Published setting: ResLT itself is trained in one stage. For stage II of CIFAR-10-LT the authors of H2T have three
experts, batches of 512, rate 0.05, beta 0.5 without H2T and 0.3 with it. Here beta is the same for both, so that they
differ in the fusion only; the preset has the other values.
"""

import numpy as np
import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Index, Ratio, Section
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.networks.branches import branch_logits, group_starts, reslt_loss, running_statistics
from h2t.pipeline.networks.classifier import logits
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    beta: Ratio = 0.5
    """Weight of the branches' own losses; 1 - beta is that of their sum."""
    groups: list[Index] | None = None
    """First class of each branch after the first, as in stage I; null is medium and tail by `paper_index`."""


class Host(GradientHost):
    """Batch norm uses the statistics of the fused batch in training, and its running statistics at evaluation."""

    only_classifier = "linear"
    starts_from = "trained"
    numbers = 2
    fixed = frozenset({"running_mean", "running_var"})

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.classifier = "branches"
        self.starts = group_starts(loss.groups, context.counts.tolist())

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """The stage-I classifier. Raises UserError if its number of branches does not match `groups`."""
        state = super().initial(stage1, draws)
        branches = len(state["norm_weight"])
        if branches != 1 + len(self.starts):
            raise UserError(
                f"loss.groups: must have {counted(branches - 1, 'class index', 'class indices')}, because stage I has "
                f"{counted(branches, 'branch', 'branches')}; got {list(self.starts)}; copy loss.groups of the backbone"
            )
        return state

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Moments (E, B, D, 2) -> the sum of the branches' logits (B, K), with running statistics."""
        return logits(self.classifier, state, features[..., 0], self.scale)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """ResLT's loss, with the statistics of the batch."""
        return reslt_loss(self.scale * branch_logits(state, features), labels, self.starts, self.constants.beta)

    def update(self, state: State, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The new running statistics, (branches, D). All branches see the same maps."""
        return running_statistics(state, features, self.context.pixels)
