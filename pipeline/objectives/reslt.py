"""ResLT: branches for head, medium and tail classes share one linear layer; each has a batch norm of its own.

Source: Cui et al., "ResLT: Residual Learning for Long-tailed Recognition", TPAMI 2022. The loss is
(1 - beta) CE(z_H + z_M + z_T) + beta I, with I the mean of the branches' own terms (`networks.branches.reslt_loss`). At
test time the logits are z_H + z_M + z_T.

Published setting: on CIFAR-LT one network, 200 epochs, Nesterov's momentum, weight decay 0.0005; the authors of H2T
take three experts and mixup. Presets have three experts without mixup.
"""

import torch
from torch import nn

from h2t.pipeline.base.params import Index, Ratio, Section
from h2t.pipeline.networks.branches import branch_logits, group_starts, moments, reslt_loss, running_statistics
from h2t.pipeline.networks.classifier import fresh_linear
from h2t.pipeline.training import objective

NUMBER = 2026112602  # other results, another number: docs/numbers.md


class Loss(Section):
    beta: Ratio = 0.995
    """Weight of the branches' own losses; 1 - beta is that of their sum."""
    groups: list[Index] | None = None
    """First class of each branch after the first, one or two indices; null is medium and tail by `paper_index`."""


class Objective(objective.Objective):
    """The classifier of branches. Experts share its batch norms; each has its own linear layer."""

    classifier = "branches"
    scale = 1.0

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, fresh_linear(experts, len(counts), channels))
        self.beta = loss.beta
        self.starts = group_starts(loss.groups, counts.tolist())
        shape = (1 + len(self.starts), channels)
        self.norm_weight = nn.Parameter(torch.ones(shape))
        self.norm_bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits of each branch, (branches, B, K). Updates the running statistics."""
        features = torch.stack([moments(m) for m in maps])
        state = dict(self.state_dict(keep_vars=True))
        with torch.no_grad():
            height, width = maps[0].shape[-2:]
            for name, value in running_statistics(state, features.detach(), height * width).items():
                getattr(self, name).copy_(value)
        return branch_logits(state, features)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """ResLT's loss, from logits of each branch (branches, B, K)."""
        return reslt_loss(outputs, labels, self.starts, self.beta)
