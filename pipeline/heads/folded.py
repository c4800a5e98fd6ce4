"""Matrix products of many classifiers with their features, and the gradients of these products.

Fused features need not be built, as the fusion can be folded into the weights.
For a classifier W, a mask m of replaced channels, a receiver r and a donor d, W ((1 - m) r + m d) is the product of
[(1 - m) W | m W] with [r | d]. Heads of one seed and one donor share receivers and donors, so one matrix product serves
all of them, and another one gives all their gradients.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

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
            return heads.view(*self.members.shape, *heads.shape[1:])
        return heads[self.members]

    def join(self, grouped: torch.Tensor) -> torch.Tensor:
        """(G, H, ...) -> (K, ...). What stands in padded places is dropped."""
        flat = grouped.flatten(0, 1)
        return flat if self._ordered else flat[self.places]


class Products(Protocol):
    """Products of each head's weights with its features."""

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights (K, E, N, C) -> their products with the features, (K, E, N, B)."""

    def gradient(self, outer: torch.Tensor) -> torch.Tensor:
        """The gradient of a function of these products, (K, E, N, B) -> that of the weights, (K, E, N, C)."""

    @property
    def lengths(self) -> torch.Tensor:
        """The length of each head's features, (K, E, 1, B)."""


class Plain(Products):
    """Products with `features` (K, E, B, C), which exist."""

    def __init__(self, features: torch.Tensor) -> None:
        self._features = features

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self._features.mT

    def gradient(self, outer: torch.Tensor) -> torch.Tensor:
        return outer @ self._features

    @cached_property
    def lengths(self) -> torch.Tensor:
        return self._features.norm(dim=-1).unsqueeze(-2)


class Folded(Products):
    """Products with fused features that are never built.

    `share`: the donor's share of each channel, (K, E, C), 1 where it replaces the receiver's. `pairs`: receivers beside
    donors of each group, (G, E, B, 2C).
    """

    def __init__(self, share: torch.Tensor, pairs: torch.Tensor, groups: Groups) -> None:
        self._share, self._pairs, self._groups = share, pairs, groups
        self._donated = groups.split(share).transpose(1, 2).unsqueeze(3)  # (G, E, H, 1, C)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        own = self._groups.split(weight).transpose(1, 2)  # (G, E, H, N, C)
        groups, experts, heads, classes, channels = own.shape
        folded = own.new_empty((groups, experts, heads, classes, 2, channels))
        torch.mul(own, self._donated, out=folded[..., 1, :])
        torch.sub(own, folded[..., 1, :], out=folded[..., 0, :])
        products = folded.view(groups, experts, heads * classes, 2 * channels) @ self._pairs.mT
        return self._groups.join(products.view(groups, experts, heads, classes, -1).transpose(1, 2))

    def gradient(self, outer: torch.Tensor) -> torch.Tensor:
        own = self._groups.split(outer).transpose(1, 2)  # (G, E, H, N, B)
        both = own.flatten(2, 3) @ self._pairs  # (G, E, H N, 2C)
        both = both.view(*own.shape[:4], 2, -1)
        return self._groups.join(torch.lerp(both[..., 0, :], both[..., 1, :], self._donated).transpose(1, 2))

    @cached_property
    def lengths(self) -> torch.Tensor:
        ones = torch.ones_like(self._share).unsqueeze(2)
        return Folded(self._share, self._pairs.square(), self._groups).of(ones).sqrt()
