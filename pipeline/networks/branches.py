"""ResLT's branches: batch norm of its own for head, medium and tail classes, one linear layer for all of them.

Source: Cui et al., "ResLT: Residual Learning for Long-tailed Recognition", TPAMI 2022, section 3. The experts share the
batch norms and own their linear layers, as the H2T authors have it. The mean over the image of a batch-normalised map
needs no more of the map than its mean and its mean square per channel, so features here are (E, B, D, 2): `moments`.
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
    """Mean and mean square over the image: (..., C, H, W) -> (..., C, 2)."""
    return torch.stack([maps.mean((-2, -1)), maps.square().mean((-2, -1))], -1)


def batch_statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel over a batch's pixels, (E, D) each."""
    mean, square = features.mean(-3).unbind(-1)
    return mean, (square - mean.square()).clamp_min(0)


def branch_logits(state: State, features: torch.Tensor) -> torch.Tensor:
    """Logits of the branches in train mode, (branches, B, K), each the mean of the experts."""
    mean, variance = batch_statistics(features)
    normal = (features[..., 0] - mean.unsqueeze(-2)) * torch.rsqrt(variance.unsqueeze(-2) + NORM_EPSILON)
    branches = normal * state["norm_weight"][:, None, None] + state["norm_bias"][:, None, None]  # (branches, E, B, D)
    return (branches @ state["weight"].mT + state["bias"].unsqueeze(-2)).mean(1)


def running_statistics(state: State, features: torch.Tensor, pixels: int) -> dict[str, torch.Tensor]:
    """Running mean and unbiased variance (branches, D) after a batch: a step of momentum 0.1 per expert, in order."""
    count = features.shape[-3] * pixels
    mean, variance = state["running_mean"], state["running_var"]
    for new_mean, new_variance in zip(*batch_statistics(features), strict=True):
        mean = torch.lerp(mean, new_mean, MOMENTUM)
        variance = torch.lerp(variance, new_variance * (count / max(count - 1, 1)), MOMENTUM)
    return {"running_mean": mean, "running_var": variance}


def group_starts(chosen: Sequence[int] | None, counts: Sequence[int]) -> tuple[int, ...]:
    """The first class of each branch after the first: `chosen`, or medium and tail as in the papers' tables.

    Published: CIFAR-10 2 and 4, CIFAR-100 35 and 70, ImageNet-LT 175 and 780; iNaturalist has two branches, the second
    of the 6,600 rarest classes. Those are not the groups that tables report. Raises UserError.
    """
    if chosen is None:
        found = groups(list(counts))["paper_index"]
        return found.count("head"), found.count("head") + found.count("medium")
    if len(chosen) not in (1, 2) or list(chosen) != sorted(chosen) or not 0 <= chosen[0] <= chosen[-1] <= len(counts):
        raise UserError(
            f"loss.groups: must be one or two rising class indices up to {len(counts)}, where medium and tail begin; "
            f"got {list(chosen)}"
        )
    return tuple(chosen)


def reslt_loss(logits: torch.Tensor, labels: torch.Tensor, starts: tuple[int, ...], beta: float) -> torch.Tensor:
    """(1 - beta) CE(z_H + z_M + z_T) + beta I of logits (branches, B, K).

    I is the mean over all terms -log(softmax_y + 1e-7): every sample for H, those of medium and tail classes for M,
    those of tail classes for T, if there is such a branch.
    """
    fusion = F.cross_entropy(logits.sum(0), labels)
    places = labels.unsqueeze(0).expand(len(logits), -1).unsqueeze(-1)
    terms = -(logits.softmax(-1).gather(-1, places).squeeze(-1) + 1e-7).log()  # (branches, B)
    within = torch.stack([labels >= start for start in (0, *starts)]).to(terms.dtype)
    return (1 - beta) * fusion + beta * (terms * within).sum() / within.sum()
