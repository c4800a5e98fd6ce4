"""ResNets for small images: three stages of basic blocks with 16, 32 and 64 channels, and 1 to E expert branches.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (option-A shortcuts). Experts
share conv1 and layer1; each has its own later layers, at full width (Wang et al., "RIDE", ICLR 2021, as the H2T authors
use it). Or they share everything but the last block (Zhou et al., "BBN", CVPR 2020, section 4.3).
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from h2t.pipeline.networks.backbone import Backbone, ExpertOptions

WIDTHS = (16, 32, 64)

Fork = Literal["layer2", "last_block"]


class Options(ExpertOptions):
    """Keys of `backbones.NAME.options` of a ResNet for small images."""

    fork: Fork = "layer2"
    """The first part that each branch has for itself; `last_block` is the network of BBN."""


class Block(nn.Module):
    """Basic block: (B, inputs, H, W) -> (B, outputs, H/stride, W/stride), by two 3x3 convolutions and a shortcut.

    The shortcut has no parameters: it takes every `stride`-th pixel and pads the channels with zeros.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if self.stride != 1 or self.padding:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


def _layer(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(inputs, outputs, stride), *rest)


class CifarResNet(Backbone):
    """ResNet of 6 x `blocks` + 2 layers: (B, 3, H, W) -> E maps (B, 64, H/4, W/4), non-negative (after a ReLU)."""

    channels = WIDTHS[-1]

    def __init__(self, blocks: int, experts: int = 1, fork: Fork = "layer2") -> None:
        super().__init__()
        self.experts = experts
        self.own_blocks = experts > 1 and fork == "last_block"
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _layer(blocks, WIDTHS[0], WIDTHS[0], 1)
        if experts == 1:
            self.layer2 = _layer(blocks, WIDTHS[0], WIDTHS[1], 2)
            self.layer3 = _layer(blocks, WIDTHS[1], WIDTHS[2], 2)
        elif self.own_blocks:
            self.layer2 = _layer(blocks, WIDTHS[0], WIDTHS[1], 2)
            self.layer3 = _layer(blocks - 1, WIDTHS[1], WIDTHS[2], 2)
            self.blocks = nn.ModuleList(Block(WIDTHS[2], WIDTHS[2], 1) for _ in range(experts))
        else:
            self.layer2s = nn.ModuleList(_layer(blocks, WIDTHS[0], WIDTHS[1], 2) for _ in range(experts))
            self.layer3s = nn.ModuleList(_layer(blocks, WIDTHS[1], WIDTHS[2], 2) for _ in range(experts))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (B, 3, H, W) -> E maps (B, 64, H/4, W/4)."""
        x = self._shared(x)
        return tuple(self._own(x, expert) for expert in range(self.experts))

    def alone(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Images (B, 3, H, W) -> the map (B, 64, H/4, W/4) of one expert; the other experts' layers are not run."""
        return self._own(self._shared(x), expert)

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.layer3(self.layer2(x)) if self.own_blocks else x

    def _own(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        if self.own_blocks:
            found: torch.Tensor = self.blocks[expert](x)
            return found
        if self.experts == 1:
            return self.layer3(self.layer2(x))
        return self.layer3s[expert](self.layer2s[expert](x))
