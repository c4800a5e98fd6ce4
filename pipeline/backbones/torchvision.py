"""Any classification model of torchvision whose logits are global average pooling and one linear layer on maps.

The tap is searched for and checked: pool + head on the maps must equal the model's own output. Holds for ResNet,
ResNeXt, Wide ResNet, RegNet, DenseNet, EfficientNet, MobileNetV2, MNASNet, ShuffleNet, Swin and others.
"""

from collections.abc import Mapping

import torch
from torch import nn

from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.resnets import pretrained
from h2t.pipeline.networks.tap import Tapped, model_names

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Keys of `backbones.NAME.options`."""

    model: str
    """Name of the model in torchvision, such as efficientnet_b0."""


def build(options: Options) -> nn.Module:
    """The network with fresh weights from torch's generator. Raises UserError for a model that has no such tap."""
    known = model_names()
    if options.model not in known:
        raise UserError(f"options.model: torchvision has no {options.model!r}{nearest(options.model, known)}")
    return Tapped(options.model)


def weights(options: Options) -> Mapping[str, torch.Tensor]:
    """Torchvision's default weights of that model. Raises UserError."""
    return pretrained(options.model)
