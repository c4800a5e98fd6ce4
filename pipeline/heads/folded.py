"""Matrix products of many classifiers with fused features that are never built: the fusion is folded into the weights.

For a classifier W, a mask m of replaced channels, a receiver r and a donor d, W ((1 - m) r + m d) is the product of
[(1 - m) W | m W] with [r | d]. Heads of one seed and one donor share receivers and donors, so one matrix product serves
all of them, and another one gives all their gradients.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Groups:
    """K heads in groups of equal (seed, donor). Groups smaller than the largest are padded with their first head.

    `seeds`, `donors`: the index of each head's seed and donor. Attributes, int64: `seed`, `donor` of each group (G,),
    arrays; `members`, the heads of each group (G, H); `places`, the place of each head in `members`, flattened (K,).
    """

    def __init__(self, seeds: np.ndarray, donors: Sequence[int], device: torch.device) -> None:
        keys, group = np.unique(np.stack([seeds, donors]), axis=1, return_inverse=True)
        group = group.reshape(-1)
        size = int(np.bincount(group).max())
        members = np.empty((keys.shape[1], size), np.int64)
        places = np.empty(len(group), np.int64)
        for number in range(keys.shape[1]):
            heads = np.flatnonzero(group == number)
            members[number] = heads[0]
            members[number, : len(heads)] = heads
            places[heads] = number * size + np.arange(len(heads))
        self.seed, self.donor = keys
        self.members, self.places = torch.from_numpy(members).to(device), torch.from_numpy(places).to(device)
        self._ordered = np.array_equal(places, np.arange(members.size))

    def split(self, heads: torch.Tensor) -> torch.Tensor:
        """(K, ...) -> (G, H, ...)."""
        if self._ordered:
            return heads.unflatten(0, self.members.shape)
        return heads[self.members]

    def join(self, grouped: torch.Tensor) -> torch.Tensor:
        """(G, H, ...) -> (K, ...). What stands in padded places is dropped."""
        flat = grouped.flatten(0, 1)
        return flat if self._ordered else flat[self.places]


class Folded(torch.autograd.Function):
    """The product of each head's weights with its fused features, (K, E, N, B); differentiable in the weights only.

    `weight`: (K, E, N, C). `share`: the donor's share of each channel, (K, E, C), 1 where it replaces the receiver's.
    `pairs`: receivers beside donors of each group, (G, E, B, 2C).
    """

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, share: torch.Tensor, pairs: torch.Tensor, groups: Groups
    ) -> torch.Tensor:
        own = groups.split(weight).transpose(1, 2)  # (G, E, H, N, C)
        donated = groups.split(share).transpose(1, 2).unsqueeze(3)
        shape = own.shape
        folded = own.new_empty((*shape[:4], 2, shape[4]))
        torch.mul(own, donated, out=folded[..., 1, :])
        torch.sub(own, folded[..., 1, :], out=folded[..., 0, :])
        products = folded.reshape(shape[0], shape[1], shape[2] * shape[3], -1) @ pairs.mT  # (G, E, H N, B)
        ctx.save_for_backward(donated, pairs)
        ctx.groups, ctx.shape = groups, shape
        return groups.join(products.unflatten(2, shape[2:4]).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        donated, pairs = ctx.saved_tensors
        shape = ctx.shape
        outer = ctx.groups.split(gradient).transpose(1, 2).flatten(2, 3)  # (G, E, H N, B)
        both = (outer @ pairs).reshape(*shape[:4], 2, shape[4])
        own = torch.lerp(both[..., 0, :], both[..., 1, :], donated)
        return ctx.groups.join(own.transpose(1, 2)), None, None, None
