"""K heads trained together in one pass: same batches for the same seed, own channel set, own optimiser state.

A host is written for one head; `torch.func.vmap` over the gradient adds the stack's axis. Head k of a stack is the head
trained alone, up to the rounding of batched matrix products.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import grad_and_value, vmap

from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.heads.batches import Batch
from h2t.pipeline.heads.features import FeatureTable
from h2t.pipeline.heads.fusion import (
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
from h2t.pipeline.heads.host import GradientHost
from h2t.pipeline.heads.residency import Feed, Step
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.resume import Checkpoint

POOL = "pool."  # prefix of the pool's parameters in a head's state
FLOAT = 4  # bytes of a number that heads compute with
COPIES: dict[Selection, int] = {"mixup": 5, "shuffled": 6}  # of a head's input during a step; 3 for other selections


class NotFinite(Exception):
    """Training gave weights that are not finite: in which epoch, of which head of the stack, in which parameter."""

    def __init__(self, epoch: int, head: int, parameter: str) -> None:
        super().__init__(f"epoch {epoch}: {parameter} of head {head} is not finite")
        self.epoch, self.head, self.parameter = epoch, head, parameter


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


@dataclass(frozen=True)
class StepSize:
    """What a training step needs, in bytes: `of` heads that train together, and the features of a `window` of one step.

    `batch` samples of `numbers` numbers (all experts), kept as `kept` bytes each; `logits` and `parameters` of a head.
    `pool_copies`: how many copies of its input a head's pool needs beside it.
    """

    batch: int
    numbers: int
    kept: int
    logits: int
    parameters: int
    pool_copies: int = 0

    def window(self, heads: Sequence[HeadSetting]) -> int:
        """Features of one step of `heads` as they are kept: receivers and donors of every seed."""
        seeds, donors = seeds_and_donors(heads)
        return len(seeds) * (1 + len(donors)) * self.batch * self.numbers * self.kept

    def of(self, heads: Sequence[HeadSetting]) -> int:
        """Gathered features of every seed, copies for each head, logits, and parameters with gradient and momentum.

        The copies for each head are receivers, donors and what is fused of them; mixup and shuffled donors need more.
        Peaks that were measured on maps of 64x8x8 exceed this by 6 % at most.
        """
        seeds, donors = seeds_and_donors(heads)
        copies = max([1 + self.pool_copies, *(COPIES.get(h.selection, 3) for h in heads)])
        gathered = len(seeds) * len(donors) * self.batch * self.numbers * (3 * self.kept + FLOAT)
        spread = copies * self.batch * self.numbers * FLOAT
        return gathered + len(heads) * (spread + FLOAT * (6 * self.logits + 8 * self.parameters))


def seeds_and_donors(heads: Sequence[HeadSetting]) -> tuple[list[int], list[str]]:
    """The seeds and the donors of `heads`, each once, in order."""
    return list(dict.fromkeys(h.seed for h in heads)), list(dict.fromkeys(h.donor for h in heads))


def parts_of(heads: Sequence[HeadSetting], size: int) -> list[list[HeadSetting]]:
    """`heads` in order, in parts of `size`, the last of which may be smaller.

    Heads do not see each other, so training part by part gives the same heads.
    """
    return [list(heads[i : i + size]) for i in range(0, len(heads), size)]


def part_sizes(heads: int) -> list[int]:
    """The sizes of part to choose from, largest first: those that cut `heads` into 1, 2, 3 ... about equal parts."""
    return sorted({-(-heads // count) for count in range(1, heads + 1)}, reverse=True)


def not_finite(state: Mapping[str, torch.Tensor]) -> tuple[int, str] | None:
    """(head, parameter) of the first that is not finite in `state`, name -> (K, ...); None if all are."""
    for name, tensor in state.items():
        finite = torch.isfinite(tensor).flatten(1).all(1)
        if not finite.all():
            return int((~finite).nonzero()[0]), name
    return None


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

        With `save`, training goes on from the step that was saved last, to the same weights. Raises NotFinite after the
        first epoch that leaves weights which are not finite.
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
                if at.step == steps - 1 and (bad := not_finite(self.state)):
                    raise NotFinite(at.epoch, *bad)
                if save:
                    save.offer(at.epoch * steps + at.step + 1, self.state, optimiser, losses)
                del at  # it holds a window of features
        for epoch, total in enumerate(losses):
            report(epoch, total / self.streams.samples)
