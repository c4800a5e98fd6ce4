"""Any network of timm: convolutional or transformer, by name, from the hub, or from a local folder.

Needs the extra `timm`. Layouts and the proof of the tap: `networks.layouts`, `networks.tap`. Source of the networks:
Wightman, "PyTorch Image Models", 2019, doi 10.5281/zenodo.4414861.
"""

from collections.abc import Mapping
from typing import Any

import torch

from h2t.pipeline.base.errors import UserError, in_brief, nearest
from h2t.pipeline.base.params import Section
from h2t.pipeline.data.network_input import Input, unlike_ours
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.layouts import Features
from h2t.pipeline.networks.pretrained import Revision, described, is_folder, is_hub_id, offline, package, pinned
from h2t.pipeline.networks.tap import Tapped

NUMBER = 2026112701  # other results, another number: docs/numbers.md


class Options(Section):
    model: str
    """Name of a network in timm, a local folder, or a hub id such as timm/vit_base_patch16_224.augreg_in21k."""
    revision: Revision = None
    """Commit of a hub id, 40 hexadecimal digits."""
    features: Features = "map"
    """What is cached: maps (C, H, W); all tokens as (C, T, 1), prefix first; or the class token (C, 1, 1)."""
    config: dict[str, Any] | None = None
    """The network's configuration, as in config.json; null reads it from the folder or the hub."""


class _Timm(Tapped):
    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self._model.forward_features(x)
        return values

    def whole(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        try:
            logits: torch.Tensor = self._model.forward_head(values)
        except NotImplementedError:  # of an encoder without a classifier
            return None
        return logits


def resolved(options: Options) -> Options:
    """The options with the configuration that the folder or the hub has. Raises UserError."""
    if options.config is not None or not (is_hub_id(options.model) or is_folder(options.model)):
        return options
    config = described(options.model, options.revision)
    if "architecture" not in config:
        raise UserError(
            f"options.model: config.json of {options.model} must name a timm architecture; got none; is it a network "
            "of Hugging Face? Then use arch: huggingface"
        )
    kept = {
        key: config[key] for key in ("architecture", "num_classes", "model_args", "pretrained_cfg") if key in config
    }
    return options.model_copy(update={"config": kept})


def _create(options: Options, **more: Any) -> Any:
    timm = package("timm")
    config = resolved(options).config or {}
    name = str(config.get("architecture", options.model))
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise UserError(
            f"options.model: must be a network of timm, a folder or a hub id; got {name!r}{nearest(name, known)}"
        )
    if "pretrained_cfg" in config:
        more["pretrained_cfg"] = {k: v for k, v in config["pretrained_cfg"].items() if k not in ("file", "url")}
    if "num_classes" in config:
        more["num_classes"] = config["num_classes"]
    try:
        return timm.create_model(name, **{**config.get("model_args", {}), **more})
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(
            f"options.model: timm cannot build {name!r} ({in_brief(error)}); correct the options "
            "or choose another network"
        ) from None


def input(options: Options) -> Input:
    """The input that the network's configuration states. Raises UserError."""
    try:
        with torch.device("meta"):
            model = _create(options)
    except UserError as error:  # timm 1.0.15 needs values for some
        if "meta tensors" not in str(error):
            raise
        with torch.random.fork_rng():
            model = _create(options)
    config = package("timm").data.resolve_model_data_config(model)
    height, width = config["input_size"][1:]
    name, crop, mode = options.model, config["crop_pct"], config["crop_mode"]
    if height != width:
        raise unlike_ours(name, f"{height} x {width} pixels, which is no square")
    if mode not in ("center", "squash"):
        raise unlike_ours(name, f"crop_mode {mode}")
    if crop > 1:
        raise unlike_ours(name, f"crop_pct {crop:g}, with a border of black")
    return Input(
        size=height,
        mean=list(config["mean"]),
        std=list(config["std"]),
        interpolation=config["interpolation"],
        crop=float(crop),
        fit="squash" if mode == "squash" else "centre",
    )


def build(options: Options, size: int | None = None) -> Backbone:
    """The network for images of `size` pixels, with initial weights from torch's generator. Raises UserError."""
    side = size or input(options).size or 224
    try:
        model = _create(options, img_size=side)
    except UserError as error:  # convolutional networks take no size
        if "img_size" not in str(error):
            raise
        model = _create(options)
    prefix = getattr(model, "num_prefix_tokens", None)
    backbone = _Timm(model, model.num_features, options.features, side, prefix)
    name = model.pretrained_cfg.get("classifier")
    if isinstance(name, str) and not model.num_classes and not (backbone.ending.classifier or backbone.ending.why):
        # Built without a classifier; weights may have one, which then reads what this network gives.
        vars(backbone).update(last_layer=name, unused=backbone.unused | {f"{name}.weight", f"{name}.bias"})
    return backbone


def weights(options: Options, size: int | None = None) -> Mapping[str, torch.Tensor]:
    """The state dict of timm's pretrained network, or of the folder or hub id. Raises UserError."""
    if is_hub_id(options.model):
        pinned(options.model, options.revision)
    source = options.model
    if is_folder(source):
        source = f"local-dir:{source}"
    elif is_hub_id(source):
        source = f"hf-hub:{source}@{options.revision}"
    timm = package("timm")
    with offline(options.model):
        try:
            model = timm.create_model(source, pretrained=True, img_size=size)
        except TypeError:  # convolutional networks take no size
            model = timm.create_model(source, pretrained=True)
    state: Mapping[str, torch.Tensor] = model.state_dict()
    return state
