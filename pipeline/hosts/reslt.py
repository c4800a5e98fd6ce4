"""ResLT: three branches for head, medium and tail share one linear layer, each with a batch norm of its own.

Source: Cui et al., "ResLT: Residual Learning for Long-tailed Recognition", TPAMI 2022. Loss: (1 - beta) CE(z_H + z_M
+ z_T) + beta I, with I the mean of every branch's own terms (`networks.branches`). The authors of H2T train with beta
0.5 without H2T and 0.3 with it; here one beta serves both, so that they differ in the fusion only.
"""

import numpy as np
import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Index, Ratio, Section
from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.networks.branches import branch_logits, group_starts, reslt_loss, running_statistics
from h2t.pipeline.networks.classifier import logits
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`."""

    beta: Ratio = 0.5
    """Weight of the branches' own losses; 1 - beta is that of their sum."""
    groups: list[Index] | None = None
    """First class of each branch after the first, as in stage I; null is medium and tail by `paper_index`."""


class Host(GradientHost):
    """Batch norm runs in train mode on the fused batch; its running statistics serve at evaluation."""

    numbers = 2
    fixed = frozenset({"running_mean", "running_var"})

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        if classifier != "linear":
            raise UserError(f"classifier: host reslt has three linear branches; got {classifier!r}; use linear")
        super().__init__("branches", scale, context)
        self.beta = loss.beta
        self.starts = group_starts(loss.groups, context.counts.tolist())

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """The stage-I classifier. Raises UserError if it has another number of branches than `groups` asks for."""
        state = super().initial(stage1, draws)
        if len(state["norm_weight"]) != 1 + len(self.starts):
            raise UserError(
                f"loss.groups: stage I has {len(state['norm_weight'])} branches, so {len(state['norm_weight']) - 1} "
                f"class indices; got {list(self.starts)}; set it as in the backbone's section"
            )
        return state

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Moments (E, B, D, 2) -> the sum of the branches' logits (B, K), by running statistics."""
        return logits(self.classifier, state, features[..., 0], self.scale)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """ResLT's loss, by the batch's own statistics."""
        return reslt_loss(self.scale * branch_logits(state, features), labels, self.starts, self.beta)

    def update(self, state: State, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The running statistics of the branches, which see the same maps."""
        return running_statistics(state, features, self.context.pixels)
