"""Pool + classifier: how pooled features become logits, for stage I and stage II alike.

Shapes: features (E, B, D) for E experts; weight (E, K, D), bias (E, K) for K classes; logits (B, K).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn import functional as F

Classifier = Literal["linear", "cosine"]

State = Mapping[str, torch.Tensor]


def expert_logits(classifier: str, state: State, features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Logits of each expert, (E, B, K).

    linear: f w + b, times `scale`; cosine: `scale` times the cosine of f and w, without bias (Li et al., "GCL", CVPR
    2022, and RIDE's cosine classifier).
    """
    weight = state["weight"]
    if classifier == "cosine":
        return scale * F.normalize(features, dim=-1) @ F.normalize(weight, dim=-1).transpose(-1, -2)
    return scale * (features @ weight.transpose(-1, -2) + state["bias"].unsqueeze(-2))


def logits(classifier: str, state: State, features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The mean of the experts' logits, (B, K)."""
    return expert_logits(classifier, state, features, scale).mean(0)


def global_average(maps: torch.Tensor) -> torch.Tensor:
    """(..., C, H, W) -> (..., C)."""
    return maps.mean((-2, -1))
