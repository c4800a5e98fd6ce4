"""The number format of forward passes: float32, or bfloat16 or float16 by torch's autocast."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

Precision = Literal["float32", "bf16", "fp16"]

#: Images (B, 3, H, W) -> maps, one tensor per expert.
Network = Callable[[torch.Tensor], Sequence[torch.Tensor]]

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def computing(device: torch.device, precision: Precision) -> torch.autocast:
    """A context in which layers compute in `precision` where autocast supports it. Weights stay float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32")


def converted_weights(network: nn.Module, precision: Precision) -> dict[str, torch.Tensor]:
    """Parameter name -> tensor in `precision`, of the layers whose parameters `computing` converts in each pass.

    Empty but for bf16: a pass in fp16 may go through the network again in float32. For frozen networks: autocast
    itself keeps what it converted of trained parameters alone.
    """
    if precision != "bf16":
        return {}
    layers = [(name, m) for name, m in network.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    every = {f"{name}.{key}" if name else key: p for name, m in layers for key, p in m.named_parameters(recurse=False)}
    once = {id(p): p.detach().to(DTYPES[precision]) for p in every.values()}  # layers may share a parameter
    return {name: once[id(p)] for name, p in every.items()}


def guarded_maps(backbone: Network, x: torch.Tensor, precision: Precision) -> list[torch.Tensor]:
    """Maps of the images `x` (B, 3, H, W), computed in `precision`: float32 (B, C, H, W), one tensor per expert.

    The largest float16 value is 65504. Images whose maps are not finite in fp16 get the maps of a float32 pass, and all
    others keep theirs. So a row does not depend on the rows batched with it. bf16 has the range of float32 and needs no
    second pass, so a GPU need not be waited for.
    """
    with computing(x.device, precision):
        maps = [m.float() for m in backbone(x)]
    if precision != "fp16":
        return maps
    finite = torch.stack([m.flatten(1).isfinite().all(1) for m in maps]).all(0)
    if finite.all():
        return maps
    keep = finite[:, None, None, None]
    return [torch.where(keep, m, whole) for m, whole in zip(maps, backbone(x), strict=True)]
