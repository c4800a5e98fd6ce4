"""ResNets for large images up to their last maps, with torchvision's state-dict keys and 1 to E expert branches.

Source: He et al., CVPR 2016; Xie et al., "ResNeXt", CVPR 2017, both as in torchvision. Experts share conv1, layer1 and
layer2; each has its own layer3 and layer4, at full width (Wang et al., "RIDE", ICLR 2021, as the H2T authors use it).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.resnet import Bottleneck, ResNet

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.networks.backbone import Backbone

CHANNELS = 2048


class ResNetMaps(ResNet, Backbone):
    """ResNet of bottleneck blocks: (B, 3, H, W) -> E maps (B, 2048, H/32, W/32), non-negative (after a ReLU).

    `blocks`: how many blocks each of the four layers has. `shape`: torchvision's `groups` and `width_per_group`.
    """

    channels = CHANNELS
    # torchvision's own layers; it has no types.
    conv1: Any
    bn1: Any
    relu: Any
    maxpool: Any
    layer1: Any
    layer2: Any
    layer3: Any
    layer4: Any
    _make_layer: Any

    def __init__(self, blocks: list[int], experts: int = 1, **shape: int) -> None:
        super().__init__(Bottleneck, blocks, **shape)
        del self.fc, self.avgpool
        self.experts = experts
        if experts > 1:
            # Each expert gets layers with initial weights of its own. `inplanes`: input channels of the next layer.
            del self.layer3, self.layer4
            self.layer3s, self.layer4s = nn.ModuleList(), nn.ModuleList()
            for _ in range(experts):
                self.inplanes = CHANNELS // 4
                self.layer3s.append(self._make_layer(Bottleneck, 256, blocks[2], stride=2))
                self.layer4s.append(self._make_layer(Bottleneck, 512, blocks[3], stride=2))
            for name, module in self.named_modules():
                if isinstance(module, nn.Conv2d) and name.startswith(("layer3s", "layer4s")):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """The layers that all experts share: images (B, 3, H, W) -> (B, 512, H/8, W/8)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer2(self.layer1(x))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (B, 3, H, W) -> E maps (B, 2048, H/32, W/32)."""
        x = self.stem(x)
        if self.experts == 1:
            return (self.layer4(self.layer3(x)),)
        return tuple(fourth(third(x)) for third, fourth in zip(self.layer3s, self.layer4s, strict=True))


class LastBlockResNet(ResNetMaps):
    """A frozen trunk and one new last block per expert. Only these blocks train.

    Source: the Places-LT backbone of Kang et al., "Decoupling Representation and Classifier", ICLR 2020, and MiSLAS.
    The trunk always stays in eval mode. State-dict keys of the block: `layer4.<last>` with one expert, as in
    torchvision; `blocks.<expert>` with more.
    """

    def __init__(self, blocks: list[int], experts: int = 1) -> None:
        super().__init__(blocks)
        self.experts = experts
        last = blocks[-1] - 1
        new = [Bottleneck(CHANNELS, CHANNELS // 4) for _ in range(experts)]  # with torch's default initial weights
        if experts == 1:
            self.layer4[last] = new[0]
        else:
            self.layer4 = self.layer4[:last]
            self.blocks = nn.ModuleList(new)
        self.fresh = (f"layer4.{last}.", "blocks.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(self.fresh))

    def _new_blocks(self) -> list[nn.Module]:
        return list(self.blocks) if self.experts > 1 else [self.layer4[-1]]

    def train(self, mode: bool = True) -> "LastBlockResNet":
        """Sets the mode of the new blocks alone; the trunk stays in eval mode."""
        super().train(False)
        self.training = mode
        for block in self._new_blocks():
            block.train(mode)
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (B, 3, H, W) -> E maps (B, 2048, H/32, W/32)."""
        with torch.no_grad():
            x = self.layer3(self.stem(x))
            for block in self.layer4 if self.experts > 1 else self.layer4[:-1]:
                x = block(x)
        return tuple(block(x) for block in self._new_blocks())


def pretrained(model: str, version: str = "DEFAULT", experts: int = 1) -> Mapping[str, torch.Tensor]:
    """Torchvision's state dict for `model`, with its classifier of 1,000 classes, from torch's cache or a download.

    Raises UserError for more than one of `experts`, and if the file is not cached and cannot be downloaded.
    """
    if experts > 1:
        raise UserError(
            f"torchvision's weights: must go to a network of 1 expert; got {experts} experts; start from a file"
        )
    weights: Any = get_model_weights(model)[version]
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        file = weights.url.rpartition("/")[2]
        raise UserError(
            f"weights {weights}: not in torch's cache, and the download failed ({' '.join(str(error).split())}); "
            f"put {file} into {torch.hub.get_dir()}/checkpoints, or name the file in backbones.<name>.start"
        ) from None
