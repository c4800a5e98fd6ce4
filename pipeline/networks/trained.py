"""A trained stage-I network from the directory that train_backbone wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from h2t.pipeline.base import plugins
from h2t.pipeline.base.params import build
from h2t.pipeline.networks.weights import fill, load_weights, weights_digest

#: In place of a backbone's directory and of its digest: the features were imported, nothing is known of their backbone.
NONE = "none"


@dataclass(frozen=True)
class StageOneHead:
    """The stage-I classifier: `state` (empty where there is none) and how it gives logits (`classifier.logits`)."""

    state: Mapping[str, torch.Tensor]
    classifier: str
    scale: float


def load_backbone(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in eval mode, frozen, and what identifies it: arch, options, sha256 of its weights."""
    path = folder / "backbone.safetensors"
    state, about = load_weights(path)
    arch = plugins.load("backbones", about["arch"])
    with torch.random.fork_rng():
        backbone: nn.Module = arch.build(build(arch.Options, f"{path}: options", about["options"]))
    fill(backbone, state, str(path))
    backbone.requires_grad_(False).eval()
    return backbone, {"arch": about["arch"], "options": about["options"], "weights": weights_digest(state)}


def backbone_digest(folder: Path) -> str:
    """sha256 of the backbone's weights, as caches record it; `none` for imported features."""
    if str(folder) == NONE:
        return NONE
    return weights_digest(load_weights(folder / "backbone.safetensors")[0])


def backbone_identity(folder: Path) -> dict[str, Any]:
    """Arch, options and sha256 of the weights, as caches record them."""
    state, about = load_weights(folder / "backbone.safetensors")
    return {"arch": about["arch"], "options": about["options"], "weights": weights_digest(state)}


def load_head(folder: Path) -> StageOneHead:
    """The stage-I classifier; an empty one for imported features."""
    if str(folder) == NONE:
        return StageOneHead({}, NONE, 1.0)
    state, about = load_weights(folder / "head.safetensors")
    return StageOneHead(state, about["classifier"], about["scale"])
