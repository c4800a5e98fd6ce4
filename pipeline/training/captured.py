"""The backbone's forward and backward pass as CUDA graphs, for networks that are small enough to wait for Python.

ResNet-32 on images of 32 pixels launches a thousand short kernels a step, and launching takes longer than computing. A
graph launches them all at once. The kernels are the same, so the results are the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Maps = tuple[torch.Tensor, ...]


class _Network(nn.Module):
    """The backbone under a `forward` of its own, which is what torch replaces."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> Maps:
        return tuple(self.backbone(x))


def captured(backbone: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], Maps]:
    """A function that computes the maps of `backbone`, in train mode, from images of the shape of `x`, (B, 3, H, W).

    Other batches, and networks that draw random numbers, take the backbone itself. The maps and gradients of a call are
    overwritten by the next, so a step may make one call only. Changes neither weights nor buffers.
    """
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    drawn = torch.cuda.get_rng_state(x.device)
    with torch.no_grad():
        backbone(x)
    draws = not torch.equal(drawn, torch.cuda.get_rng_state(x.device))
    _expect_other_streams()
    graph: Any = None if draws else torch.cuda.make_graphed_callables(_Network(backbone), (x.clone(),))
    with torch.no_grad():
        for name, buffer in backbone.named_buffers():
            buffer.copy_(before[name])
    if graph is None:
        return backbone
    shape = x.shape

    def maps(batch: torch.Tensor) -> Maps:
        found: Maps = (graph if batch.shape == shape else backbone)(batch)
        return found

    return maps


def _expect_other_streams() -> None:
    """No warning from torch that gradients come from another stream: capturing has its own, for which it waits."""
    warns = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)  # of newer versions
    if warns is not None:
        warns(False)
