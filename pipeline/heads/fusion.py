"""H2T: replaces a fraction of the receiver's channels with the same channels of the donor.

Source: Li et al., "Feature Fusion from Head to Tail for Long-Tailed Visual Recognition", AAAI 2024, section 3.3 and
Listing 1. The ratio is the replaced fraction, as in the listing and in the authors' code; in the paper's Equation 1 the
mask stands for the kept fraction. The released configurations of CIFAR-100-LT use 0.25; the text calls 0.3 the best.
Each batch draws one set of channels per expert, for all its samples. Labels are those of the receivers.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from h2t.pipeline.base.many_streams import generators

Selection = Literal["random", "first", "middle", "last", "mixup", "shuffled"]
Rounding = Literal["floor", "round"]


def replaced_channels(ratio: float, channels: int, rounding: Rounding = "floor") -> int:
    """How many of `channels` are replaced: ratio x channels in float64, rounded down or to the nearest integer."""
    product = ratio * channels
    return math.floor(product) if rounding == "floor" else math.floor(product + 0.5)


def channel_ranks(
    seeds: Sequence[int], epoch: int, steps: Sequence[int], experts: Sequence[int], channels: int
) -> np.ndarray:
    """The rank of each channel in a random order drawn for each batch, int32 (steps, seeds, experts, channels).

    A set of k channels holds those of rank below k, so the sets of different ratios are nested.
    """
    every = generators(seeds, ("channels", epoch), steps, experts)
    orders = np.array([draws.permutation(channels) for draws in every])
    ranks = np.empty(orders.shape, np.int32)
    np.put_along_axis(ranks, orders, np.arange(channels, dtype=np.int32), 1)
    return ranks.reshape(len(steps), len(seeds), len(experts), channels)


def fixed_channels(selection: Selection, count: int, channels: int) -> np.ndarray:
    """Mask of the first, middle or last `count` channels, bool (channels,). Source: H2T paper, appendix C."""
    start = {"first": 0, "middle": (channels - count) // 2, "last": channels - count}[selection]
    mask = np.zeros(channels, bool)
    mask[start : start + count] = True
    return mask


def fuse(receiver: torch.Tensor, donor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`donor` where `mask` is true, else `receiver`, as a new tensor. The inputs belong to the cache and do not change.

    `receiver` and `donor`: (..., E, B, C[, H, W]). `mask`: bool, broadcast; its batch and image axes have size 1.
    """
    return torch.where(mask, donor, receiver)


def mix(receiver: torch.Tensor, donor: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Feature mixup, a control for `fuse`: (1 - share) receiver + share donor, on all channels.

    With share = k / C it equals the expectation of `fuse` over random sets of k of C channels. Labels are those of the
    receivers.
    """
    return torch.lerp(receiver, donor, share)


def donor_orders(
    seeds: Sequence[int], epoch: int, steps: Sequence[int], experts: Sequence[int], batch: int, channels: int
) -> np.ndarray:
    """A random permutation of each batch for each channel, int64 (steps, seeds, experts, batch, channels)."""
    places = np.repeat(np.arange(batch)[:, None], channels, axis=1)
    every = generators(seeds, ("shuffle", epoch), steps, experts)
    orders = np.array([draws.permuted(places, axis=0) for draws in every])
    return orders.reshape(len(steps), len(seeds), len(experts), batch, channels)


def shuffle(donor: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """Permutes each channel of `donor` (..., B, C[, H, W]) over the batch by `orders`, int64 (..., B, C).

    A control: each channel keeps its values over the batch, but the channels of one sample come from different donors.
    Labels are those of the receivers.
    """
    inner = (1,) * (donor.dim() - orders.dim())  # the axes after the channels
    return torch.take_along_dim(donor, orders.reshape(*orders.shape, *inner), dim=orders.dim() - 2)
