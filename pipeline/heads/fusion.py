"""H2T: replace a fraction of the receiver's channels by the same channels of the donor.

Source: Li et al., "Feature Fusion from Head to Tail for Long-Tailed Visual Recognition", AAAI 2024, section 3.3 and
Listing 1. The ratio is the replaced fraction, as in the listing and the authors' code; the mask of the paper's Equation
1 counts the kept one. The released configurations of CIFAR-100-LT have 0.25, the text calls 0.3 the best. One channel
set serves the whole batch and is drawn anew every batch, for each expert; labels stay the receiver's.
"""

import math
from typing import Literal

import numpy as np
import torch

from h2t.pipeline.base.seeds import stream

Selection = Literal["random", "first", "middle", "last", "mixup", "shuffled"]
Rounding = Literal["floor", "round"]


def replaced_channels(ratio: float, channels: int, rounding: Rounding = "floor") -> int:
    """How many of `channels` are replaced: floor of the floating-point product, or the nearest whole number."""
    product = ratio * channels
    return math.floor(product) if rounding == "floor" else math.floor(product + 0.5)


def channel_ranks(seed: int, epoch: int, step: int, expert: int, channels: int) -> np.ndarray:
    """The place of each channel in this batch's random order, int64 (channels,).

    The channels of rank below k are the set of size k, so that the sets of different ratios are nested.
    """
    order = stream(seed, "channels", epoch, step, expert).permutation(channels)
    ranks = np.empty(channels, np.int64)
    ranks[order] = np.arange(channels)
    return ranks


def fixed_channels(selection: Selection, count: int, channels: int) -> np.ndarray:
    """The mask of the first, middle or last `count` channels, bool (channels,) (paper, appendix C)."""
    start = {"first": 0, "middle": (channels - count) // 2, "last": channels - count}[selection]
    mask = np.zeros(channels, bool)
    mask[start : start + count] = True
    return mask


def fuse(receiver: torch.Tensor, donor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A new tensor: `donor` where `mask`, else `receiver`. The arguments are left as they are: they are the cache's.

    `mask`, bool, is broadcast against the two; along the batch and the image it has size 1.
    """
    return torch.where(mask, donor, receiver)


def mix(receiver: torch.Tensor, donor: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Feature mixup, the control with the same expectation: (1 - share) receiver + share donor, all channels.

    With share = k / C it equals the mean of `fuse` over random sets of k channels; labels stay the receiver's.
    """
    return torch.lerp(receiver, donor, share)


def donor_orders(seed: int, epoch: int, step: int, expert: int, batch: int, channels: int) -> np.ndarray:
    """A random order of the batch for each channel by itself, int64 (batch, channels)."""
    places = np.repeat(np.arange(batch)[:, None], channels, axis=1)
    return stream(seed, "shuffle", epoch, step, expert).permuted(places, axis=0)


def shuffle(donor: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """Channels of `donor` (..., B, C[, H, W]) drawn from its batch one by one: the control without whole donors.

    `orders` int64 (..., B, C). Each channel keeps its values over the batch; what channels of one image have in common
    is lost. Labels stay the receiver's.
    """
    inner = (1,) * (donor.dim() - orders.dim())  # whatever follows the channels
    return torch.take_along_dim(donor, orders.reshape(*orders.shape, *inner), dim=orders.dim() - 2)
