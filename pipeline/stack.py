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

from pipeline.checkpoint import Checkpoint
from pipeline.features import FeatureTable
from pipeline.fusion import (
    Rounding,
    Selection,
    channel_ranks,
    donor_orders,
    fixed_channels,
    fuse,
    mix,
    replaced_channels,
    shuffle,
)
from pipeline.host import GradientHost
from pipeline.network import StageOneHead
from pipeline.progress import progress
from pipeline.residency import Feed, Step
from pipeline.seeds import stream
from pipeline.streams import Batch

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


def parts_of(heads: Sequence[HeadSetting], head_bytes: int, budget: int) -> list[list[HeadSetting]]:
    """`heads` in order, in the fewest parts of about equal size whose working memory fits `budget`, at least one each.

    Heads do not see each other, so training part by part gives the same heads.
    """
    count = -(-len(heads) * head_bytes // max(budget, 1))
    size = max(1, -(-len(heads) // count))
    while size > 1 and size * head_bytes > budget:
        size -= 1
    return [list(heads[i : i + size]) for i in range(0, len(heads), size)]


def head_bytes(feed: Feed, classes: int, parameters: int) -> int:
    """About how many bytes one head needs during a step: its input four times, its logits six, its parameters four."""
    rows = feed.experts * feed.streams.batch_size
    return 4 * (4 * rows * math.prod(feed.shape) + 6 * rows * classes + 4 * parameters)


class Stack:
    """K heads of one host. `state` holds their parameters, name -> (K, ...)."""

    def __init__(
        self,
        host: GradientHost,
        pool: Any,
        heads: Sequence[HeadSetting],
        feed: Feed,
        *,
        rounding: Rounding = "floor",
    ) -> None:
        self.host, self.pool, self.heads, self.feed = host, pool, list(heads), feed
        self.streams, self.device, self.dtype = feed.streams, feed.device, feed.dtype
        self.maps = len(feed.shape) == 3  # (C, H, W): fused as maps, pooled afterwards
        streams = feed.streams
        self._seed_place = np.array([streams.seeds.index(h.seed) for h in heads])
        self._seed = torch.from_numpy(self._seed_place).to(self.device)
        self._donor = torch.tensor([streams.donors.index(h.donor) for h in heads], device=self.device)
        channels = feed.shape[0]
        self.replaced = np.array([replaced_channels(h.ratio, channels, rounding) for h in heads])
        self._random = np.array([h.selection in ("random", "shuffled") for h in heads])
        shuffled = np.flatnonzero([h.selection == "shuffled" for h in heads])
        self._shuffled = torch.from_numpy(shuffled).to(self.device)  # numbers: a mask would make a GPU wait
        self._fixed = np.stack(
            [
                fixed_channels(h.selection, int(n), channels)
                if h.selection in ("first", "middle", "last")
                else np.zeros(channels, bool)
                for h, n in zip(heads, self.replaced, strict=True)
            ]
        )
        mixed = np.array([h.selection == "mixup" for h in heads])
        self._mixing = bool((mixed & (self.replaced > 0)).any())
        self._share = torch.tensor(mixed * self.replaced / channels, device=self.device, dtype=self.dtype)
        self.state: dict[str, torch.Tensor] = {}

    def start(self, stage1: StageOneHead) -> None:
        """Gives every head its starting parameters; heads of one seed start alike."""
        each = []
        for head in self.heads:
            own = self.host.initial(stage1, stream(head.seed, "initial"))
            each.append({**own, **{POOL + name: t for name, t in self.pool.initial().items()}})
        self.state = {
            name: torch.stack([e[name] for e in each]).to(self.device, self.dtype, copy=True) for name in each[0]
        }
        for name in self.state.keys() - self.host.fixed:
            self.state[name].requires_grad_()

    def masks(self, epoch: int, step: int) -> torch.Tensor:
        """Which channels of each head are replaced in this batch, bool (K, E, C)."""
        experts, channels = self.feed.experts, self.feed.shape[0]
        ranks = np.stack(
            [
                [channel_ranks(seed, epoch, step, expert, channels) for expert in range(experts)]
                for seed in self.streams.seeds
            ]
        )
        drawn = ranks[self._seed_place] < self.replaced[:, None, None]
        return torch.from_numpy(np.where(self._random[:, None, None], drawn, self._fixed[:, None, :])).to(self.device)

    def orders(self, epoch: int, step: int, size: int) -> torch.Tensor | None:
        """Which donor of the batch each channel comes from, int64 (shuffled heads, E, B, C); None where none is."""
        if not len(self._shuffled):
            return None
        experts, channels = range(self.feed.experts), self.feed.shape[0]
        found = {
            seed: np.stack([donor_orders(seed, epoch, step, expert, size, channels) for expert in experts])
            for seed in {h.seed for h in self.heads if h.selection == "shuffled"}
        }
        each = [found[h.seed] for h in self.heads if h.selection == "shuffled"]
        return torch.from_numpy(np.stack(each)).to(self.device)

    def fused(
        self, batch: Batch, table: FeatureTable, masks: torch.Tensor, orders: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The input of every head, (K, E, B, C[, H, W])."""
        receivers = table.take(batch.receivers)[self._seed]
        if not self.replaced.any():
            return receivers
        donors = table.take(batch.donors)[self._seed, self._donor]
        if orders is not None:
            donors[self._shuffled] = shuffle(donors[self._shuffled], orders)
        inner = (1,) * (receivers.dim() - 4)  # whatever follows the channels
        x = fuse(receivers, donors, masks.reshape(*masks.shape[:2], 1, -1, *inner))
        if self._mixing:
            share = self._share.reshape(-1, 1, 1, 1, *inner)
            x = torch.where(share > 0, mix(receivers, donors, share), x)
        return x

    def pooled(self, state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The host's own state of one head, and its features: the input (E, B, C[, H, W]) pooled if it is maps."""
        own = {name: t for name, t in state.items() if not name.startswith(POOL)}
        if self.maps:
            x = self.pool({name.removeprefix(POOL): t for name, t in state.items() if name.startswith(POOL)}, x)
        return own, x

    def head_loss(
        self, state: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of one head on its input (E, B, C[, H, W])."""
        own, features = self.pooled(state, x)
        return self.host.loss(own, features, labels, noise)

    def step(self, at: Step, optimiser: torch.optim.Optimizer) -> torch.Tensor:
        """One gradient step of every head; returns their losses (K,)."""
        epoch, step, batch, table = at
        x = self.fused(batch, table, self.masks(epoch, step), self.orders(epoch, step, batch.labels.shape[1]))
        labels = torch.from_numpy(batch.labels).to(self.device)[self._seed]
        drawn = [
            self.host.noise(stream(seed, "noise", epoch, step), batch.labels.shape[1]) for seed in self.streams.seeds
        ]
        found = [n for n in drawn if n is not None]
        noise = torch.stack(found).to(self.device, self.dtype)[self._seed] if found else None
        trained = {name: t.detach() for name, t in self.state.items() if name not in self.host.fixed}
        fixed = {name: t for name, t in self.state.items() if name in self.host.fixed}

        def loss(own: dict[str, torch.Tensor], fixed: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
            return self.head_loss({**own, **fixed}, *rest)

        gradient = vmap(grad_and_value(loss), in_dims=(0, 0, 0, 0, None if noise is None else 0))
        grads, losses = gradient(trained, fixed, x, labels, noise)
        for name, gradients in grads.items():
            self.state[name].grad = gradients
        optimiser.step()
        if fixed:
            update = vmap(lambda state, x: self.host.update(*self.pooled(state, x)))
            self.state.update(update({**trained, **fixed}, x))
        return losses.detach()

    def train(
        self,
        settings: Optimiser,
        name: str,
        report: Callable[[int, torch.Tensor], None],
        save: Checkpoint | None = None,
    ) -> None:
        """Trains for all epochs; `report(epoch, losses)` gets the mean loss of each head, (K,), after each epoch.

        With `save`, training goes on from the step that was saved last, to the same weights.
        """
        trained = {name: t for name, t in self.state.items() if name not in self.host.fixed}
        groups = [{"params": [t], "factor": self.host.rates.get(name, 1.0)} for name, t in trained.items()]
        optimiser = torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        losses = torch.zeros(settings.epochs, len(self.heads), dtype=self.dtype, device=self.device)
        first = save.restore(self.state, optimiser, losses) if save else 0
        steps = self.streams.steps
        bar = progress(None, f"train_classifier {name}", unit="step", total=settings.epochs * steps, initial=first)
        with bar:
            for at in self.feed.steps(settings.epochs, *divmod(first, steps)):
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate(at.epoch) * group["factor"]
                losses[at.epoch] += self.step(at, optimiser) * at.batch.labels.shape[1]
                bar.update()
                if save:
                    save.offer(at.epoch * steps + at.step + 1, self.state, optimiser, losses)
        for epoch, total in enumerate(losses):
            report(epoch, total / self.streams.samples)
