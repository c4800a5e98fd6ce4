"""Any vision network of Hugging Face transformers: by hub id and commit, local folder or configuration.

Needs the extra `huggingface`. Layouts and the proof of the tap: `networks.layouts`, `networks.tap`. Source of the
networks: Wolf et al., "Transformers: State-of-the-Art Natural Language Processing", EMNLP 2020 (system demonstrations).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from h2t.pipeline.base.errors import UserError, in_brief
from h2t.pipeline.base.params import Section
from h2t.pipeline.data.network_input import Input
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.image_processor import of_processor
from h2t.pipeline.networks.layouts import Features
from h2t.pipeline.networks.pretrained import Revision, described, is_folder, offline, package, pinned
from h2t.pipeline.networks.tap import Tapped, size_taken

NUMBER = 2026112701  # other results, another number: docs/numbers.md

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, where no image processor states others
MOST_PREFIX = 64  # more tokens than this before the patches are taken for a coarser grid


class Options(Section):
    model: str | None = None
    """Hub id such as facebook/dinov2-small, or a local folder with config.json and model.safetensors."""
    revision: Revision = None
    """Commit of a hub id, 40 hexadecimal digits."""
    features: Features = "map"
    """What is cached: maps (C, H, W); all tokens as (C, T, 1), prefix first; or the class token (C, 1, 1)."""
    config: dict[str, Any] | None = None
    """The network's configuration, as in config.json; null reads it from the folder or the hub."""


class _HuggingFace(Tapped):
    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        return _base(self._model)(pixel_values=x).last_hidden_state  # type: ignore[no-any-return]

    def whole(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        given = self._model(pixel_values=x)
        found: torch.Tensor | None = getattr(given, "logits", None)
        return getattr(given, "pooler_output", None) if found is None else found


def _base(model: Any) -> Any:
    """The network without its classifier, or None if it cannot be had alone."""
    classifies = type(model).__name__.endswith("ForImageClassification")
    return getattr(model, model.base_model_prefix, None) if classifies else model


def resolved(options: Options) -> Options:
    """The options with the configuration of the folder or the hub. Raises UserError."""
    if options.config is not None:
        return options
    if options.model is None:
        raise UserError(
            "options.model: name a hub id or a local folder, or give the network's configuration in options.config"
        )
    config = described(options.model, options.revision)
    if "model_type" not in config:
        raise UserError(
            f"options.model: config.json of {options.model} must name a model_type; got none; is it a network of timm? "
            "Then use arch: timm"
        )
    return options.model_copy(update={"config": config})


def _config(options: Options, size: int | None = None) -> Any:
    """The configuration of the network for images, of `size` pixels if given. Raises UserError."""
    values = dict(resolved(options).config or {})
    kind = values.pop("model_type", None)
    known = package("transformers").AutoConfig
    try:
        config = known.for_model(str(kind), **values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"options.config: transformers has no such network ({in_brief(error)}); use a model_type that it has"
        ) from None
    config = getattr(config, "vision_config", config)
    if size is not None and hasattr(config, "image_size"):
        config.image_size = size if isinstance(config.image_size, int) else [size, size]
    return config


def _create(options: Options, size: int | None) -> Any:
    transformers = package("transformers")
    config = _config(options, size)
    config.architectures = getattr(config, "architectures", None) or []  # what from_config goes through
    try:
        model = _kind(transformers, config).from_config(config)
    except (ImportError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"options.model: transformers cannot build a network of {config.model_type} ({in_brief(error)}); correct "
            "the options or choose another network"
        ) from None
    if model.main_input_name != "pixel_values" or _base(model) is None:
        lacks = "takes no images" if model.main_input_name != "pixel_values" else "gives no maps before its classifier"
        raise UserError(f"options.model: {config.model_type} of transformers {lacks}; choose another network")
    return model


def _kind(transformers: Any, config: Any) -> Any:
    """The class with a classifier for images, if there is one and the configuration names no other."""
    named = getattr(config, "architectures", None) or ["ForImageClassification"]
    known = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    classifies = type(config) in known and any(name.endswith("ForImageClassification") for name in named)
    return transformers.AutoModelForImageClassification if classifies else transformers.AutoModel


def input(options: Options) -> Input:
    """The input that the image processor states; without one, a square of the configuration's size.

    Raises UserError.
    """
    config = _config(options)
    side = getattr(config, "image_size", 224)
    side = side if isinstance(side, int) else max(side)
    plain = Input(size=side, mean=MEAN, std=STD, interpolation="bicubic", crop=1.0, fit="squash")
    if options.model is None:
        return plain
    if is_folder(options.model) and not (Path(options.model).expanduser() / "preprocessor_config.json").is_file():
        return plain
    with offline(options.model):
        processor = package("transformers").AutoImageProcessor.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=False
        )
    return of_processor(processor, side)


def build(options: Options, size: int | None = None) -> Backbone:
    """The network for images of `size` pixels, with initial weights from torch's generator. Raises UserError."""
    model = _create(options, size)
    side = size or input(options).size or 224
    with torch.no_grad(), size_taken(side):
        given = _base(model.eval())(pixel_values=torch.zeros(1, 3, side, side))
    values = getattr(given, "last_hidden_state", None)
    if values is None:
        raise UserError(
            f"options.model: {model.config.model_type} of transformers gives no last maps; choose another network"
        )
    channels = values.shape[1] if values.dim() == 4 else values.shape[-1]
    return _HuggingFace(model, channels, options.features, side, _prefix(model, values, side))


def _prefix(model: nn.Module, values: torch.Tensor, side: int) -> int | None:
    """The tokens before the patches, from the size of a patch; None if the network merges patches, or has maps."""
    patch = getattr(model.config, "patch_size", None)
    patch = max(patch) if isinstance(patch, list | tuple) else patch
    if values.dim() != 3 or not isinstance(patch, int):
        return None
    prefix = values.shape[1] - (side // patch) ** 2
    return prefix if 0 <= prefix <= MOST_PREFIX else None


def weights(options: Options, size: int | None = None) -> Mapping[str, torch.Tensor]:
    """The state dict of the folder or hub id, from safetensors. Raises UserError."""
    if options.model is None:
        raise UserError("options.model: pretrained weights need a hub id or a local folder; got neither")
    if not is_folder(options.model):
        pinned(options.model, options.revision)
    config = _config(options, size)
    kind = _kind(package("transformers"), config)
    with offline(options.model):
        model = kind.from_pretrained(
            options.model, revision=options.revision, config=config, trust_remote_code=False, use_safetensors=True
        )
    state: Mapping[str, torch.Tensor] = model.state_dict()
    return state
