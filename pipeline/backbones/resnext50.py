"""ResNeXt-50 (32x4d): maps of 2,048 channels at a 32nd of the input's side, 1 to E expert branches.

Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, as in torchvision.
"""

from collections.abc import Mapping

import torch
from torch import nn

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Experts, Section
from h2t.pipeline.networks.resnets import ResNetMaps, pretrained

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Keys of `backbones.NAME.options`."""

    experts: Experts = 1
    """Parallel branches, each with maps of its own; 1 is the plain network."""


def build(options: Options) -> nn.Module:
    """The network with fresh weights from torch's generator."""
    return ResNetMaps([3, 4, 6, 3], options.experts, groups=32, width_per_group=4)


def weights(options: Options) -> Mapping[str, torch.Tensor]:
    """torchvision's, trained on ImageNet-1k. Raises UserError."""
    if options.experts > 1:
        raise UserError(f"torchvision's weights: are those of 1 expert; got {options.experts}; start from a file")
    return pretrained("resnext50_32x4d")
