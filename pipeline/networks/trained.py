"""Loads the stage-I network, backbone and classifier, that `train_backbone` wrote."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.data.network_input import Input
from h2t.pipeline.networks.backbone import Backbone, build_backbone
from h2t.pipeline.networks.frozen import FrozenPart, load_classifier, save_classifier
from h2t.pipeline.networks.pretrained import other_version
from h2t.pipeline.networks.weights import fill, load_weights, weights_digest

#: Stands for a backbone's directory and digest where features were imported and their backbone is unknown.
NONE = "none"
HEAD = "head.safetensors"  # the file of a backbone's head in its directory
BLOCK = 65_537  # random numbers per tensor that a file replaces; prime, so that no two rows of a weight are equal


@dataclass(frozen=True)
class StageOneHead:
    """The classifier that comes with a backbone: trained in stage I, or a probe.

    Its `state` and the arguments of `classifier.logits`. The state is empty where there is none: for imported features,
    and for a pretrained network whose classifier has other classes. `frozen` is what lies between pooling and
    classifier, if anything. `about`: what its file says.
    """

    state: Mapping[str, torch.Tensor]
    classifier: str
    scale: float
    frozen: FrozenPart | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BackboneFacts:
    """`input`: what the network takes, as far as it is stated. `batch_norm`: whether it has running statistics.

    `pretrained`: its weights are those of a package or hub.
    """

    input: Input
    batch_norm: bool
    pretrained: bool


def load_backbone(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    """The backbone, frozen and in eval mode, and its identity: `arch`, `options` and the sha256 `weights`.

    Raises UserError if the file is missing, malformed, or does not fit its architecture.
    """
    path = folder / "backbone.safetensors"
    state, about = load_weights(path)
    if _is_record(state, about):
        raise UserError(
            f"{path}: holds no weights, as the parameters name a cache elsewhere without them; set weights of this "
            "backbone to the file that the cache was extracted with"
        )
    with ThreadPoolExecutor(1) as beside:
        identity = beside.submit(_identity, state, about)  # its sha256 costs nothing beside building the network
        arch = plugins.load("backbones", about["arch"])
        with torch.random.fork_rng(), _RepeatedDraws():
            options = build(arch.Options, f"{path}: options", about["options"])
            backbone = build_backbone(arch, options, about.get("input", {}).get("size"))
        fill(backbone, state, str(path), other_version(about["arch"]))
    backbone.requires_grad_(False).eval()
    return backbone, identity.result()


class _RepeatedDraws(TorchDispatchMode):
    """Large tensors get random values that repeat after BLOCK numbers.

    For initial values that the weights of a file replace. Drawing them all takes longer than loading the file: 2 s of a
    processor for 86 million.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's compiler takes seconds to import

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: Any = args[0] if args else None
        draws = func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)
        if not draws or result.numel() <= BLOCK or not result.is_contiguous():
            return func(*args, **(kwargs or {}))
        block = func(result.new_empty(BLOCK), *args[1:], **(kwargs or {}))
        flat, whole = result.view(-1), result.numel() // BLOCK * BLOCK
        flat[:whole].view(-1, BLOCK).copy_(block)
        flat[whole:].copy_(block[: len(flat) - whole])
        return result


def has_stored_weights(backbone: Backbone, folder: Path) -> bool:
    """Whether the parameters of `backbone` are equal to those in `folder`. Raises UserError."""
    state, _ = load_weights(folder / "backbone.safetensors")
    return all(name in state and torch.equal(p, state[name].to(p)) for name, p in backbone.named_parameters())


def backbone_digest(folder: Path) -> str:
    """sha256 of the backbone's weights, as caches record it; `none` for imported features. Raises UserError."""
    if str(folder) == NONE:
        return NONE
    path = folder / "backbone.safetensors"
    if not path.is_file() and (folder / HEAD).is_file():  # a probe, which records the digest
        return str(load_weights(folder / HEAD)[1]["backbone"])
    state, about = load_weights(path)
    return str(about["weights"]) if _is_record(state, about) else weights_digest(state)


def _is_record(state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> bool:
    """Whether a backbone's file only records what a cache elsewhere was extracted with."""
    return "elsewhere" in about and not state


def backbone_identity(folder: Path) -> dict[str, Any]:
    """`arch`, `options`, the sha256 `weights` and `input`, if stated, as caches record them. Raises UserError."""
    return _identity(*load_weights(folder / "backbone.safetensors"))


def _identity(state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
    stated = {"input": about["input"]} if "input" in about else {}
    return {"arch": about["arch"], "options": about["options"], "weights": weights_digest(state), **stated}


def backbone_facts(folder: Path) -> BackboneFacts:
    """What `train_backbone` recorded of the backbone beside its weights. Raises UserError."""
    path = folder / "backbone.safetensors"
    state, about = load_weights(path)
    return BackboneFacts(
        input=build(Input, f"{path}: input", about.get("input", {})),
        batch_norm=any(name.endswith("running_mean") for name in state),
        pretrained=about.get("pretrained") is True,
    )


def save_head(path: Path, head: StageOneHead, about: Mapping[str, Any]) -> None:
    """Writes a backbone's head, with the JSON object `about`, as `load_head` reads it."""
    about = {**about, "classifier": head.classifier, "scale": head.scale}
    save_classifier(path, head.state, head.frozen, about)


def load_head(folder: Path) -> StageOneHead:
    """The classifier in head.safetensors; an empty one for imported features. Raises UserError."""
    if str(folder) == NONE:
        return StageOneHead({}, NONE, 1.0)
    state, frozen, about = load_classifier(folder / HEAD)
    return StageOneHead(state, about["classifier"], about["scale"], frozen, about)
