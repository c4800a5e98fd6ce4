"""What training steps draw, made for all seeds ahead of the steps, and sent to the training device window by window."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

#: Bytes of the draws of a window. Two windows exist at a time.
DRAWN_BYTES = 32 * 1024**2
ALIGNED = 16  # bytes; an array that is sent together with others starts at a multiple of it


class Draws(NamedTuple):
    """The draws of one step, on the training device.

    `rows`: arrays of rows whose features are gathered, as (their places in the table, their shape). `labels`: of the
    receivers, int64 (seeds, B), as are `samples`, their places among the training samples, and `partner_labels`, those
    of the second sampler. `ranks`: of the channels, int32 (seeds, E, C). `noise`: the random part of the loss,
    (seeds, ...). `orders`: of shuffled donors, int64 (seeds that have any, E, B, C).
    """

    rows: list[tuple[list[torch.Tensor], tuple[int, ...]]]
    labels: torch.Tensor
    samples: torch.Tensor
    ranks: torch.Tensor
    partner_labels: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    orders: torch.Tensor | None = None


def sent(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the CPU on `device`. A GPU gets all of them in one copy, which nothing waits for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    starts = np.cumsum([0, *(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors)]).tolist()
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)

    def parts(of: torch.Tensor) -> list[torch.Tensor]:
        spans = zip(starts, tensors, strict=False)
        return [of[start : start + t.nbytes].view(t.dtype).view(t.shape) for start, t in spans]

    for part, tensor in zip(parts(packed), tensors, strict=True):
        part.copy_(tensor)
    return parts(packed.to(device, non_blocking=True))
