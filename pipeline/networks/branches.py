"""ResLT's branches: one batch norm each for head, medium and tail classes, and a linear layer that they share.

Source: Cui et al., "ResLT: Residual Learning for Long-tailed Recognition", TPAMI 2022, section 3. As in the code of the
H2T authors, the experts share the batch norms, and each expert has its own linear layer.

Batch norm followed by the mean over the image depends only on each channel's mean and mean square over the image.
Features are therefore (E, B, D, 2) here: see `moments`. State: `networks.classifier`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data.classes import groups
from h2t.pipeline.networks.classifier import NORM_EPSILON

State = Mapping[str, torch.Tensor]

MOMENTUM = 0.1


def moments(maps: torch.Tensor) -> torch.Tensor:
    """Mean and mean square over the image: maps (..., C, H, W) -> (..., C, 2)."""
    return torch.stack([maps.mean((-2, -1)), maps.square().mean((-2, -1))], -1)


def batch_statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel over all pixels of a batch: features (E, B, D, 2) -> (E, D) each."""
    mean, square = features.mean(-3).unbind(-1)
    return mean, (square - mean.square()).clamp_min(0)


def branch_logits(state: State, features: torch.Tensor) -> torch.Tensor:
    """Logits of each branch in train mode, (branches, B, K), the mean over experts, from features (E, B, D, 2)."""
    mean, variance = batch_statistics(features)
    normal = (features[..., 0] - mean.unsqueeze(-2)) * torch.rsqrt(variance.unsqueeze(-2) + NORM_EPSILON)
    branches = normal * state["norm_weight"][:, None, None] + state["norm_bias"][:, None, None]  # (branches, E, B, D)
    return (branches @ state["weight"].mT + state["bias"].unsqueeze(-2)).mean(1)


def running_statistics(state: State, features: torch.Tensor, pixels: int) -> dict[str, torch.Tensor]:
    """Running mean and unbiased variance (branches, D) after a batch of features (E, B, D, 2).

    One update of momentum 0.1 per expert, in order. `pixels`: H x W of the maps.
    """
    count = features.shape[-3] * pixels
    mean, variance = state["running_mean"], state["running_var"]
    for new_mean, new_variance in zip(*batch_statistics(features), strict=True):
        mean = torch.lerp(mean, new_mean, MOMENTUM)
        variance = torch.lerp(variance, new_variance * (count / max(count - 1, 1)), MOMENTUM)
    return {"running_mean": mean, "running_var": variance}


def group_starts(chosen: Sequence[int] | None, counts: Sequence[int]) -> tuple[int, ...]:
    """The first class of each branch but the first: `chosen`, or else the first medium and the first tail class.

    Without `chosen` the groups are those of the papers' tables. Published values differ from these: CIFAR-10 2 and 4,
    CIFAR-100 35 and 70, ImageNet-LT 175 and 780; iNaturalist has two branches, the second for the 6,600 rarest classes.
    Raises UserError if `chosen` is not one or two ascending class indices.
    """
    if chosen is None:
        group_of = groups(list(counts))["paper_index"]
        return group_of.count("head"), group_of.count("head") + group_of.count("medium")
    if len(chosen) not in (1, 2) or list(chosen) != sorted(chosen) or not 0 <= chosen[0] <= chosen[-1] <= len(counts):
        raise UserError(
            f"loss.groups: must be one or two ascending class indices from 0 to {len(counts)}, the first medium and "
            f"the first tail class; got {list(chosen)}; leave it out for the groups of the report"
        )
    return tuple(chosen)


def reslt_loss(logits: torch.Tensor, labels: torch.Tensor, starts: tuple[int, ...], beta: float) -> torch.Tensor:
    """ResLT's loss, a scalar: (1 - beta) CE(z_H + z_M + z_T, y) + beta I, from logits (branches, B, K), labels (B,).

    I is the mean of the terms -log(softmax(z)_y + 1e-7) over all pairs of a branch and a sample that counts in it:
    every sample in branch H, medium and tail classes in M, tail classes in T (if there is a third branch). `starts`:
    see `group_starts`.
    """
    fusion = F.cross_entropy(logits.sum(0), labels)
    own = labels.unsqueeze(0).expand(len(logits), -1).unsqueeze(-1)
    terms = -(logits.softmax(-1).gather(-1, own).squeeze(-1) + 1e-7).log()  # (branches, B)
    within = torch.stack([labels >= start for start in (0, *starts)]).to(terms.dtype)
    return (1 - beta) * fusion + beta * (terms * within).sum() / within.sum()
