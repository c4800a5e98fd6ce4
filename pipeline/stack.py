"""K heads trained together in one pass: same batches for the same seed, own channel set, own optimiser state.

A host is written for one head; `torch.func.vmap` over the gradient adds the stack's axis. Head k of a stack is the head
trained alone, up to the rounding of batched matrix products.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import grad_and_value, vmap

from pipeline.features import FeatureTable
from pipeline.fusion import Rounding, Selection, channel_ranks, fixed_channels, fuse, replaced_channels
from pipeline.host import GradientHost
from pipeline.network import StageOneHead
from pipeline.progress import progress
from pipeline.seeds import stream
from pipeline.streams import Batch, Streams

POOL = "pool."  # prefix of the pool's parameters in a head's state


@dataclass(frozen=True)
class HeadSetting:
    """What tells one head of a stack from the others."""

    ratio: float
    donor: str
    selection: Selection
    seed: int


@dataclass(frozen=True)
class Optimiser:
    """SGD with momentum; the learning rate follows half a cosine, set once per epoch, and never reaches 0."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float

    def rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, from 0."""
        return 0.5 * self.lr * (1 + math.cos(math.pi * epoch / self.epochs))


class Stack:
    """K heads of one host. `state` holds their parameters, name -> (K, ...)."""

    def __init__(
        self,
        host: GradientHost,
        pool: Any,
        heads: Sequence[HeadSetting],
        streams: Streams,
        features: FeatureTable,
        *,
        rounding: Rounding = "floor",
    ) -> None:
        self.host, self.pool, self.heads, self.streams, self.features = host, pool, list(heads), streams, features
        self.device, self.dtype = features.values.device, features.values.dtype
        self.maps = features.values.dim() > 3  # (E, rows, C, H, W): fused as maps, pooled afterwards
        self._seed = torch.tensor([streams.seeds.index(h.seed) for h in heads], device=self.device)
        self._donor = torch.tensor([streams.donors.index(h.donor) for h in heads], device=self.device)
        channels = features.channels
        self.replaced = np.array([replaced_channels(h.ratio, channels, rounding) for h in heads])
        self._random = np.array([h.selection == "random" for h in heads])
        self._fixed = np.stack(
            [
                np.zeros(channels, bool) if h.selection == "random" else fixed_channels(h.selection, int(n), channels)
                for h, n in zip(heads, self.replaced, strict=True)
            ]
        )
        self.state: dict[str, torch.Tensor] = {}

    def start(self, stage1: StageOneHead) -> None:
        """Gives every head its starting parameters; heads of one seed start alike."""
        each = []
        for head in self.heads:
            own = self.host.initial(stage1, stream(head.seed, "initial"))
            each.append({**own, **{POOL + name: t for name, t in self.pool.initial().items()}})
        self.state = {
            name: torch.stack([e[name] for e in each]).to(self.device, self.dtype, copy=True).requires_grad_()
            for name in each[0]
        }

    def masks(self, epoch: int, step: int) -> torch.Tensor:
        """Which channels of each head are replaced in this batch, bool (K, E, C)."""
        experts, channels = len(self.features.values), self.features.channels
        ranks = np.stack(
            [
                [channel_ranks(seed, epoch, step, expert, channels) for expert in range(experts)]
                for seed in self.streams.seeds
            ]
        )
        drawn = ranks[self._seed.cpu().numpy()] < self.replaced[:, None, None]
        return torch.from_numpy(np.where(self._random[:, None, None], drawn, self._fixed[:, None, :])).to(self.device)

    def fused(self, batch: Batch, masks: torch.Tensor) -> torch.Tensor:
        """The input of every head, (K, E, B, C[, H, W])."""
        receivers = self.features.take(batch.receivers)[self._seed]
        if not masks.any():
            return receivers
        donors = self.features.take(batch.donors)[self._seed, self._donor]
        return fuse(receivers, donors, masks[:, :, None, :, None, None] if self.maps else masks[:, :, None, :])

    def head_loss(
        self, state: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of one head on its input (E, B, C[, H, W])."""
        own = {name: t for name, t in state.items() if not name.startswith(POOL)}
        if self.maps:
            x = self.pool({name.removeprefix(POOL): t for name, t in state.items() if name.startswith(POOL)}, x)
        return self.host.loss(own, x, labels, noise)

    def step(self, batch: Batch, epoch: int, step: int, optimiser: torch.optim.Optimizer) -> torch.Tensor:
        """One gradient step of every head; returns their losses (K,)."""
        x = self.fused(batch, self.masks(epoch, step))
        labels = torch.from_numpy(batch.labels).to(self.device)[self._seed]
        drawn = [
            self.host.noise(stream(seed, "noise", epoch, step), batch.labels.shape[1]) for seed in self.streams.seeds
        ]
        found = [n for n in drawn if n is not None]
        noise = torch.stack(found).to(self.device, self.dtype)[self._seed] if found else None
        detached = {name: t.detach() for name, t in self.state.items()}
        gradient = vmap(grad_and_value(self.head_loss), in_dims=(0, 0, 0, None if noise is None else 0))
        grads, losses = gradient(detached, x, labels, noise)
        for name, tensor in self.state.items():
            tensor.grad = grads[name]
        optimiser.step()
        return losses.detach()

    def train(self, settings: Optimiser, name: str, report: Callable[[int, torch.Tensor], None]) -> None:
        """Trains for all epochs; `report(epoch, losses)` gets the mean loss of each head, (K,), after each."""
        groups = [{"params": [t], "factor": self.host.rates.get(n, 1.0)} for n, t in self.state.items()]
        optimiser = torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        for epoch in progress(range(settings.epochs), f"train_classifier {name}", unit="epoch"):
            for group in optimiser.param_groups:
                group["lr"] = settings.rate(epoch) * group["factor"]
            total = torch.zeros(len(self.heads), dtype=self.dtype, device=self.device)
            for step in range(self.streams.steps):
                batch = self.streams.batch(epoch, step)
                total += self.step(batch, epoch, step, optimiser) * batch.labels.shape[1]
            report(epoch, total / self.streams.samples)
