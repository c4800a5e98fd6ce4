"""Classifiers of stage I and stage II: from pooled features to logits.

Features (E, B, D): E experts, B samples, D features. Logits (B, K): K classes. A classifier's state holds `weight`
(E, K, D) and, unless it is a cosine classifier, `bias` (E, K). ResLT's (`branches`) adds batch norms of two or three
branches: `norm_weight`, `norm_bias`, `running_mean` and `running_var`, each (branches, D).
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn import functional as F

Classifier = Literal["linear", "cosine", "branches", "given"]

State = Mapping[str, torch.Tensor]

NORM_EPSILON = 1e-5


def fresh_linear(experts: int, classes: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial weight (E, K, D) and bias (E, K) of stage I, float32, drawn from torch's global generator.

    As in the published codes: weights are normal with variance 2 / D (He et al., ICCV 2015), biases uniform in
    [-1 / sqrt(D), 1 / sqrt(D)], torch's default.
    """
    bound = 1 / math.sqrt(channels)
    weight = torch.randn(experts, classes, channels) * math.sqrt(2 / channels)
    return weight, torch.empty(experts, classes).uniform_(-bound, bound)


def expert_logits(classifier: str, state: State, features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Logits of each expert, (E, B, K), from features (E, B, D).

    linear: `scale` (f w + b). cosine: `scale` cos(f, w), without bias (Li et al., "GCL", CVPR 2022; RIDE's cosine
    classifier). branches: `scale` times the sum of ResLT's branches, normalised by their running statistics. given: the
    features are the logits already; heads.linear_heads computes those of many heads at once.
    """
    if classifier == "given":
        return features
    weight = state["weight"]
    if classifier == "cosine":
        return scale * F.normalize(features, dim=-1) @ F.normalize(weight, dim=-1).transpose(-1, -2)
    if classifier == "branches":
        slope = state["norm_weight"] * torch.rsqrt(state["running_var"] + NORM_EPSILON)
        shift = state["norm_bias"] - slope * state["running_mean"]
        # With fixed statistics batch norm is affine and commutes with the mean over the image: one affine map for all.
        bias = len(slope) * state["bias"].unsqueeze(-2)
        return scale * ((features * slope.sum(0) + shift.sum(0)) @ weight.mT + bias)
    return scale * (features @ weight.transpose(-1, -2) + state["bias"].unsqueeze(-2))


def logits(classifier: str, state: State, features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Mean of the experts' logits, (B, K), from features (E, B, D)."""
    return expert_mean(expert_logits(classifier, state, features, scale))


def expert_mean(logits: torch.Tensor) -> torch.Tensor:
    """Mean over the experts: logits (..., E, B, K) -> (..., B, K)."""
    return logits.squeeze(-3) if logits.shape[-3] == 1 else logits.mean(-3)


def global_average(maps: torch.Tensor) -> torch.Tensor:
    """Mean over the image: maps (..., C, H, W) -> features (..., C)."""
    return maps.mean((-2, -1))
