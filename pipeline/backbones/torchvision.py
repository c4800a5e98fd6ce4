"""Any classification model of torchvision that ends in global average pooling and one linear layer.

The last maps are found in the model's graph and checked: pooling and classifier on them must give the model's own
logits (`networks.tap`). Works for ResNet, ResNeXt, Wide ResNet, RegNet, DenseNet, EfficientNet, MobileNetV2, MNASNet,
ShuffleNet, Swin and others.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.resnets import pretrained
from h2t.pipeline.networks.tap import Tapped, model_names

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Keys of `backbones.NAME.options`."""

    model: str
    """Name of the model in torchvision, such as efficientnet_b0."""


def build(options: Options) -> Backbone:
    """The network with initial weights from torch's generator. Raises UserError for an unknown or unsuited model."""
    known = model_names()
    if options.model not in known:
        raise UserError(
            "options.model: must be a classification model of torchvision, such as efficientnet_b0; "
            f"got {options.model!r}{nearest(options.model, known)}"
        )
    return Tapped(options.model)


def weights(options: Options) -> Mapping[str, torch.Tensor]:
    """Torchvision's default weights of the model. Raises UserError."""
    return pretrained(options.model)
