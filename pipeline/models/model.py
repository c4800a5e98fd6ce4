"""A complete classifier in one file: a backbone with its evaluation statistics, and one head.

`model.safetensors` holds the backbone under its own names. A head that is one linear layer on averaged maps is stored
as `fc.weight`, `fc.bias` (or under the name of the architecture's last layer), so the file is a state dict of that
architecture. Any other head is stored under names that start with `h2t.`. The metadata key `h2t` describes the file,
with the class names.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.data.images import Transform
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.stored import HeadParts, Heads, build_head
from h2t.pipeline.networks.backbone import build_backbone, frozen_part
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.frozen import FrozenPart, from_file
from h2t.pipeline.networks.pretrained import other_version
from h2t.pipeline.networks.weights import fill, load_weights, save_weights, weights_digest

KIND = "h2t model 1"
HEAD_KIND = "h2t head 1"
PREFIX = "h2t."
PROBES = 16
SEAL = "sha256"  # key of the description: the digest of all tensors and of the rest of the description


class LinearHead(nn.Module):
    """A linear layer on averaged maps of one expert, after the frozen part, if any: (B, C, H, W) -> logits (B, K)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, maps: tuple[torch.Tensor, ...], frozen: FrozenPart | None) -> torch.Tensor:
        features = global_average(maps[0])
        features = features if frozen is None else frozen(features)
        return nn.functional.linear(features, self.weight, self.bias)


class HostHead(nn.Module):
    """A host's classifier behind its pool: maps (B, C, H, W) of each of E experts -> logits (B, K)."""

    def __init__(
        self, parts: HeadParts, context: Context, channels: int | None, state: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.head = build_head(parts, context, channels)
        self.names = list(state)
        for i, name in enumerate(self.names):
            self.register_buffer(f"state_{i}", state[name])

    def forward(self, maps: tuple[torch.Tensor, ...], frozen: FrozenPart | None) -> torch.Tensor:
        state = {name: getattr(self, f"state_{i}") for i, name in enumerate(self.names)}
        return replace(self.head, frozen=frozen).logits(state, torch.stack(tuple(maps)))


class Classifier(nn.Module):
    """A backbone and a head: normalised images (B, 3, S, S) -> logits (B, K).

    The layers between pooling and classifier are the backbone's.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.on_maps(self.backbone(images))

    def on_maps(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Maps (B, C, H, W) of each expert -> logits (B, K)."""
        result: torch.Tensor = self.head(maps, frozen_part(self.backbone))
        return result


@dataclass(frozen=True)
class Model:
    """A classifier in eval mode, and its description `about`: classes, transform, head settings, origin."""

    network: Classifier
    about: Mapping[str, Any]

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the logits."""
        return list(self.about["classes"])

    @property
    def temperature(self) -> float:
        """What logits are divided by before the softmax; 1 unless held-out samples gave another."""
        return float(self.about.get("temperature", 1.0))

    @property
    def transform(self) -> Transform:
        """How an image becomes input. Raises UserError if the file describes it wrongly."""
        return build(Transform, "model: transform", self.about["transform"])


def as_linear(
    parts: HeadParts, context: Context, state: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The classifier as one linear layer: float32 weight (K, D) and bias (K,). None if it is not linear.

    Its input are averaged maps after the frozen part, if there is one.

    Weight and bias are computed from the head's logits at unit vectors, which folds in class scales, logit scales and
    priors. The head counts as linear if the layer gives its logits at random points.
    """
    head = build_head(parts, context)
    if parts.pool != "gap" or context.experts != 1:
        return None
    exact = {name: t.double() for name, t in state.items()}
    points = torch.cat([torch.zeros(1, context.channels), torch.eye(context.channels)]).double()
    draws = torch.Generator().manual_seed(0)
    probes = torch.rand(PROBES, context.channels, generator=draws, dtype=torch.float64)
    with torch.no_grad():
        at_units, expected = head.logits(exact, points[None]), head.logits(exact, probes[None])
    bias = at_units[0]
    weight = (at_units[1:] - bias).T
    if (probes @ weight.T + bias - expected).abs().max() > 1e-9 * expected.abs().max().clamp_min(1):
        return None
    return weight.float().contiguous(), bias.float().contiguous()


def save_model(path: Path, backbone: nn.Module, one: Heads, about: Any) -> bool:
    """Writes the model file of a stack with one head. True if it is a plain state dict of the architecture.

    `about` must hold arch, options, classes and transform.
    """
    parts, context, state = one.parts_of(0), one.context, {name: t[0] for name, t in one.state.items()}
    linear = as_linear(parts, context, state)
    last = getattr(backbone, "last_layer", "fc")
    if linear is not None:
        weight = linear[0].reshape(*linear[0].shape, *getattr(backbone, "last_kernel", ()))
        weights = {f"{last}.weight": weight, f"{last}.bias": linear[1]}
        head: Any = {"linear": last}
    else:
        weights = {PREFIX + name: t for name, t in state.items()}
        counts = context.counts.tolist()
        head = {"parts": vars(parts), "context": [counts, context.channels, context.experts, context.pixels]}
        if one.frozen is not None:
            head["map_channels"] = one.about["map_channels"]
    _save_sealed(path, {**backbone.state_dict(), **weights}, {**about, "kind": KIND, "head": head})
    return linear is not None


def save_head(path: Path, one: Heads, about: Mapping[str, Any]) -> None:
    """Writes a stack with one head alone, without a backbone; `about` must hold classes."""
    tensors, described = one.frozen.to_file() if one.frozen else ({}, None)
    context = {f.name: one.about[f.name] for f in fields(Context)}
    part = {"frozen": described, "map_channels": one.about["map_channels"]} if one.frozen else {}
    about = {**about, "kind": HEAD_KIND, "parts": vars(one.parts_of(0)), "context": context, **part}
    _save_sealed(path, {**{name: t[0] for name, t in one.state.items()}, **tensors}, about)


def load_single_head(path: Path) -> Heads:
    """The stack with one head in a file that `save_head` wrote. Raises UserError for another or a damaged file."""
    tensors, about = _load_sealed(path)
    if about.get("kind") != HEAD_KIND or "context" not in about:
        raise UserError(f"{path}: holds no head that h2t export wrote; export it again")
    state, frozen = from_file(tensors, about, str(path))
    table = pa.table({"number": pa.array([0], pa.int64()), **{k: [v] for k, v in about["setting"].items()}})
    described = {**about, **about["parts"], **about["context"]}
    return Heads({name: t[None] for name, t in state.items()}, table, described, frozen)


def load_model(path: Path) -> Model:
    """The model in a file that `h2t export` wrote, or in the directory that holds it.

    Raises UserError if there is no such file, if it is damaged, or if it holds no complete classifier.
    """
    folder = path if path.is_dir() else None
    path = path / "model.safetensors" if folder else path
    if not path.exists():
        if folder and (folder / "head.safetensors").exists() and not (folder / "backbone.safetensors").exists():
            raise UserError(
                f"{folder}: holds a classifier of features and no backbone, so it cannot take images; in Python: "
                f"h2t.api.predict({str(folder)!r}, features)"
            )
        raise UserError(f"{path}: no exported model; make one with h2t export")
    state, about = _load_sealed(path)
    if about.get("kind") != KIND:
        raise UserError(f"{path}: holds no complete classifier; make one with h2t export")
    arch = plugins.load("backbones", about["arch"])
    with torch.random.fork_rng():
        options = build(arch.Options, f"{path}: options", about["options"])
        backbone = build_backbone(arch, options, about.get("input", {}).get("size"))
    head: nn.Module
    if "linear" in about["head"]:
        last = about["head"]["linear"]
        head = LinearHead(state.pop(f"{last}.weight").flatten(1), state.pop(f"{last}.bias"))
    else:
        counts, *rest = about["head"]["context"]
        own = {name.removeprefix(PREFIX): state.pop(name) for name in list(state) if name.startswith(PREFIX)}
        parts, context = HeadParts(**about["head"]["parts"]), Context(torch.tensor(counts), *rest)
        head = HostHead(parts, context, about["head"].get("map_channels"), own)
    fill(backbone, state, str(path), other_version(about["arch"], about.get("made_with")))
    network = Classifier(backbone, head).requires_grad_(False).eval()
    return Model(network, about)


def _save_sealed(path: Path, state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """`save_weights` with a seal: people copy exported files about, and a flipped bit would predict other classes."""
    as_read = json.loads(json.dumps(about))  # keys are text, tuples are lists
    save_weights(path, state, {**as_read, SEAL: _seal(state, as_read)})


def _load_sealed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`load_weights`; raises UserError if the seal is broken too. Files from before there were seals have none."""
    state, about = load_weights(path)
    if SEAL in about and about.pop(SEAL) != _seal(state, about):
        raise UserError(f"{path}: damaged, its sha256 is not the recorded one; copy or export it again")
    return state, about


def _seal(state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    said = json.dumps(about, sort_keys=True)
    return hashlib.sha256(f"{weights_digest(state)}{said}".encode()).hexdigest()
