"""The base class of backbones, and how the network of a plug-in is built."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Experts, Section
from h2t.pipeline.networks.frozen import FrozenPart, Layer


class Backbone(nn.Module):
    """A network up to its last feature maps.

    Parts that stay in eval mode after `train()` are frozen, batch norm included. `train_backbone` and `extract` need
    `channels`, `experts` and `forward` alone, so a plug-in may also return a plain `nn.Module` that has them.
    """

    #: C, the channels of each map.
    channels: int
    #: E, the number of parallel branches; each has a map of its own.
    experts: int = 1
    #: Prefixes of state-dict keys that keep their initial weights when training starts from given weights.
    fresh: tuple[str, ...] = ()
    #: Name of the network's own classifier, which is not part of the backbone; an exported linear head gets this name.
    last_layer: str = "fc"
    #: Further axes of its weight: (1, 1) where it is a convolution of one pixel.
    last_kernel: tuple[int, ...] = ()
    #: State-dict keys of the whole network that the backbone does not use.
    unused: frozenset[str] = frozenset()
    #: Modules after pooling; batch norms in them keep their statistics.
    modules_after: tuple[nn.Module, ...] = ()

    def after_pool(self) -> tuple[Layer, ...]:
        """The layers between pooling and classifier, in order, with the network's own tensors; by default none."""
        return ()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (B, 3, H, W) -> E maps, each (B, C, H', W')."""
        raise NotImplementedError

    def alone(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Images (B, 3, H, W) -> the map (B, C, H', W') of one expert; the other experts' batch norms do not see `x`.

        Only objectives that train two branches on a batch each need it: see their `first_branch_share`.
        """
        raise NotImplementedError


class ExpertOptions(Section):
    """Keys of `backbones.NAME.options` of a network with expert branches."""

    experts: Experts = 1
    """Parallel branches, each with maps of its own; 1 is the plain network."""


def frozen_part(backbone: nn.Module) -> FrozenPart | None:
    """What lies between pooling and classifier of `backbone`, with its own tensors, or None if there is nothing."""
    after: Callable[[], tuple[Layer, ...]] = getattr(backbone, "after_pool", tuple)
    layers = after()
    return FrozenPart(layers) if layers else None


def features_of(backbone: Backbone) -> int:
    """D, the features that the classifier on `backbone` gets: C, unless a layer after pooling changes it."""
    part = frozen_part(backbone)
    return part.outputs(backbone.channels) if part else backbone.channels


def build_backbone(plugin: ModuleType, options: Section, size: int | None = None) -> Backbone:
    """The network of a backbone plug-in, with initial weights from torch's global generator.

    A plug-in that states its input is given `size`, the side of the images in pixels. Raises UserError if the network
    lacks `channels` or `experts`, and whatever the plug-in's `build` raises.
    """
    backbone: Backbone = plugin.build(options, size) if hasattr(plugin, "input") else plugin.build(options)
    for name in ("channels", "experts"):
        if not hasattr(backbone, name):
            raise UserError(
                f"backbone plug-in {plugin.__name__.rpartition('.')[2]}: the network must have the attribute {name!r}; "
                "got none; set it in __init__ (docs/adding-a-backbone.md)"
            )
    if not hasattr(backbone, "fresh"):  # a plain nn.Module
        backbone.fresh = ()
    return backbone
