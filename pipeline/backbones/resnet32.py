"""ResNet-32 for small images: 5 blocks in each of 3 stages, maps of 64 channels at a quarter of the input's side.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (n = 5).
"""

from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.cifar_resnet import CifarResNet, Options

NUMBER = 2026112601  # other results, another number: docs/numbers.md


def build(options: Options) -> Backbone:
    """The network with initial weights from torch's generator."""
    return CifarResNet(5, options.experts, options.fork)
