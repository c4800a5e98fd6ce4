"""ResNet-50: maps of 2,048 channels at a 32nd of the input's side (7x7 from 224), 1 to E expert branches.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, as in torchvision.
"""

from collections.abc import Mapping

import torch

from h2t.pipeline.networks.backbone import Backbone, ExpertOptions

NUMBER = 2026112601  # other results, another number: docs/numbers.md

Options = ExpertOptions


def build(options: Options) -> Backbone:
    """The network with initial weights from torch's generator."""
    from h2t.pipeline.networks.resnets import ResNetMaps  # torchvision takes a second to import

    return ResNetMaps([3, 4, 6, 3], options.experts)


def weights(options: Options) -> Mapping[str, torch.Tensor]:
    """Torchvision's default weights, trained on ImageNet-1k. Raises UserError."""
    from h2t.pipeline.networks.resnets import pretrained

    return pretrained("resnet50", experts=options.experts)
