"""ResLT's three branches: batch norm of its own for head, medium and tail, one linear layer for all three.

Source: Cui et al., "ResLT: Residual Learning for Long-tailed Recognition", TPAMI 2022, section 3. The experts share the
batch norms and own their linear layers, as the H2T authors have it. The mean over the image of a batch-normalised map
needs no more of the map than its mean and its mean square per channel, so features here are (E, B, D, 2): `moments`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from pipeline.classes import groups
from pipeline.errors import UserError
from pipeline.head import NORM_EPSILON

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
    """Logits of the three branches in train mode, (3, B, K), each the mean of the experts."""
    mean, variance = batch_statistics(features)
    normal = (features[..., 0] - mean.unsqueeze(-2)) * torch.rsqrt(variance.unsqueeze(-2) + NORM_EPSILON)
    branches = normal * state["norm_weight"][:, None, None] + state["norm_bias"][:, None, None]  # (3, E, B, D)
    return (branches @ state["weight"].mT + state["bias"].unsqueeze(-2)).mean(1)


def running_statistics(state: State, features: torch.Tensor, pixels: int) -> dict[str, torch.Tensor]:
    """The running mean and unbiased variance (3, D) after a batch: one step of momentum 0.1 per expert, in order."""
    count = features.shape[-3] * pixels
    mean, variance = state["running_mean"], state["running_var"]
    for new_mean, new_variance in zip(*batch_statistics(features), strict=True):
        mean = torch.lerp(mean, new_mean, MOMENTUM)
        variance = torch.lerp(variance, new_variance * (count / max(count - 1, 1)), MOMENTUM)
    return {"running_mean": mean, "running_var": variance}


def group_starts(chosen: Sequence[int] | None, counts: Sequence[int]) -> tuple[int, int]:
    """The first class of medium and of tail: `chosen`, or as in the papers' tables. Raises UserError."""
    if chosen is None:
        found = groups(list(counts))["paper_index"]
        return found.count("head"), found.count("head") + found.count("medium")
    if len(chosen) != 2 or not 0 <= chosen[0] <= chosen[1] <= len(counts):
        raise UserError(f"loss.groups: must be two rising class indices up to {len(counts)}; got {list(chosen)}")
    return chosen[0], chosen[1]


def reslt_loss(logits: torch.Tensor, labels: torch.Tensor, starts: tuple[int, int], beta: float) -> torch.Tensor:
    """(1 - beta) CE(z_H + z_M + z_T) + beta I of logits (3, B, K).

    I is the mean over all terms -log(softmax_y + 1e-7): every sample for H, those of medium and tail classes for M,
    those of tail classes for T.
    """
    fusion = F.cross_entropy(logits.sum(0), labels)
    places = labels.unsqueeze(0).expand(3, -1).unsqueeze(-1)
    terms = -(logits.softmax(-1).gather(-1, places).squeeze(-1) + 1e-7).log()  # (3, B)
    within = torch.stack([torch.ones_like(labels), labels >= starts[0], labels >= starts[1]]).to(terms.dtype)
    return (1 - beta) * fusion + beta * (terms * within).sum() / within.sum()
