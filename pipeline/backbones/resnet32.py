"""ResNet-32 for small images: 5 blocks in each of 3 stages, maps of 64 channels at a quarter of the input's side.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (n = 5).
"""

from torch import nn

from h2t.pipeline.base.params import Experts, Section
from h2t.pipeline.networks.cifar_resnet import CifarResNet

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Keys of `backbones.NAME.options`."""

    experts: Experts = 1
    """Parallel branches, each with maps of its own; 1 is the plain network."""


def build(options: Options) -> nn.Module:
    """The network with fresh weights from torch's generator."""
    return CifarResNet(5, options.experts)
