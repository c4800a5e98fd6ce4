"""HTTN: head classes teach a map from class prototypes to classifier weights, which gives tail classes their weights.

Source: Xiao et al., "Does Head Label Help for Long-Tailed Multi-Label Text Classification", AAAI 2021, section 3. The
prototype p of a class is the mean of its features of length 1, scaled to length 1. The matrix M minimises sum_j |M p_j
- w_j|^2 + ridge |M|^2 over the head classes, with w_j their stage-I weights. The weight of a tail class t is M r with r
= (p_t + sum_j a_j p_j) / 2 and a = softmax_j(p_t p_j) over the head classes; without attention r = p_t. Head classes
keep their weights.

Published setting: text with several labels, so there are no figures for images. In the authors' code prototypes are
means of five drawn samples, redrawn 30 times; M is trained; there are no biases; and the sum over a is divided by the
number of head classes a second time. Here prototypes are means of all samples, M is solved for, a tail class has the
mean of the head classes' biases, and the sum is not divided again.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Count, Positive, Section
from h2t.pipeline.heads.host import Context, FittedHost
from h2t.pipeline.networks.probe import class_means
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.longtail import without_tail

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    head_classes: Count | None = None
    """Number of largest classes that count as head classes; null is all but the tail classes of `paper_index`."""
    ridge: Positive = 1e-3
    """Weight of the squared norm of M; it matters where there are fewer head classes than features."""
    attention: bool = True
    """Mix the tail class's prototype with those of the head classes that it resembles."""


class Host(FittedHost):
    """Needs a linear classifier. Each expert has its own M."""

    only_classifier = "linear"

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        if loss.head_classes and loss.head_classes > context.classes:
            raise UserError(
                f"loss.head_classes: must be at most {context.classes}, the number of classes; got "
                f"{loss.head_classes}; lower it"
            )
        self.head_classes = without_tail(context.counts.tolist(), loss.head_classes)

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """Weight (E, K, D) and bias (E, K): stage I's for head classes, transferred ones for tail classes."""
        state = self.stage1_state(stage1)
        first = self.head_classes
        means = class_means(F.normalize(features, dim=-1), labels, self.context.classes)
        prototypes = F.normalize(means.double(), dim=-1)
        head, tail = prototypes[:, :first], prototypes[:, first:]
        weight = state["weight"].to(prototypes)
        square = head.mT @ head + self.constants.ridge * torch.eye(head.shape[-1]).to(head)
        transfer = torch.linalg.solve(square, head.mT @ weight[:, :first])  # M transposed, (E, D, D)
        if self.constants.attention:
            tail = (tail + (tail @ head.mT).softmax(-1) @ head) / 2
        weight[:, first:] = tail @ transfer
        bias = state["bias"].to(prototypes)
        bias[:, first:] = bias[:, :first].mean(1, keepdim=True)
        return {"weight": weight.to(features), "bias": bias.to(features)}
