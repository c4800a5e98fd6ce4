"""Pool + classifier: how pooled features become logits, for stage I and stage II alike.

Shapes: features (E, B, D) for E experts; weight (E, K, D), bias (E, K) for K classes; logits (B, K). A classifier of
branches adds batch norm on the features: norm_weight, norm_bias, running_mean, running_var (branches, D), two or three.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn import functional as F

Classifier = Literal["linear", "cosine", "branches"]

State = Mapping[str, torch.Tensor]

NORM_EPSILON = 1e-5


def fresh_linear(experts: int, classes: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Starting weight (E, K, D) and bias (E, K) of stage I, from torch's generator, as the published codes draw them.

    Weight: normal with variance 2 / D (He et al., ICCV 2015); bias: uniform within 1 / sqrt(D), torch's own default.
    """
    bound = 1 / math.sqrt(channels)
    weight = torch.randn(experts, classes, channels) * math.sqrt(2 / channels)
    return weight, torch.empty(experts, classes).uniform_(-bound, bound)


def expert_logits(classifier: str, state: State, features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Logits of each expert, (E, B, K).

    linear: f w + b, times `scale`; cosine: `scale` times the cosine of f and w, without bias (Li et al., "GCL", CVPR
    2022, and RIDE's cosine classifier); branches: the sum of ResLT's, by their running statistics.
    """
    weight = state["weight"]
    if classifier == "cosine":
        return scale * F.normalize(features, dim=-1) @ F.normalize(weight, dim=-1).transpose(-1, -2)
    if classifier == "branches":
        slope = state["norm_weight"] * torch.rsqrt(state["running_var"] + NORM_EPSILON)
        shift = state["norm_bias"] - slope * state["running_mean"]
        # The mean over the image commutes with batch norm by fixed statistics, so the sum is one affine map.
        bias = len(slope) * state["bias"].unsqueeze(-2)
        return scale * ((features * slope.sum(0) + shift.sum(0)) @ weight.mT + bias)
    return scale * (features @ weight.transpose(-1, -2) + state["bias"].unsqueeze(-2))


def logits(classifier: str, state: State, features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The mean of the experts' logits, (B, K)."""
    return expert_logits(classifier, state, features, scale).mean(0)


def global_average(maps: torch.Tensor) -> torch.Tensor:
    """(..., C, H, W) -> (..., C)."""
    return maps.mean((-2, -1))
