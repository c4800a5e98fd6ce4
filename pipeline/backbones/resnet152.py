"""ResNet-152: maps of 2,048 channels at a 32nd of the input's side; for Places-LT, only its last block trains.

Source: He et al., CVPR 2016. With `trained: last_block` the trunk is frozen in eval mode, and one new last block per
expert trains, as in the published codes for Places-LT. These start from torchvision's weights.
"""

from collections.abc import Mapping
from typing import Literal

import torch

from h2t.pipeline.networks.backbone import Backbone, ExpertOptions

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(ExpertOptions):
    trained: Literal["all", "last_block"] = "last_block"
    """Train all layers, or only a new last block on a frozen trunk."""


def build(options: Options) -> Backbone:
    """The network with initial weights from torch's generator."""
    from h2t.pipeline.networks.resnets import LastBlockResNet, ResNetMaps  # torchvision takes a second to import

    if options.trained == "last_block":
        return LastBlockResNet([3, 8, 36, 3], options.experts)
    return ResNetMaps([3, 8, 36, 3], options.experts)


def weights(options: Options) -> Mapping[str, torch.Tensor]:
    """Torchvision's first version, trained on ImageNet-1k, from which the Places-LT results start. Raises UserError.

    With `last_block` the trunk is a network of one expert, whatever the number of new blocks.
    """
    from h2t.pipeline.networks.resnets import pretrained

    return pretrained("resnet152", "IMAGENET1K_V1", 1 if options.trained == "last_block" else options.experts)
