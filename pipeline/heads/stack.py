"""Trains K heads together. Heads of one seed share their batches; each has its own channels and optimiser state.

A `Head` describes one of them; `torch.func.vmap` over its gradient adds the stack's axis. Heads that are linear in
pooled features get their logits from matrix products of the whole stack instead (`heads.folded`), to the same result.
Head k of a stack equals that head trained alone, up to the rounding of batched matrix products.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from h2t.pipeline.base.params import Count, Epochs, NonNegative, Rate, Ratio, Section
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.heads.batches import Batch
from h2t.pipeline.heads.descent import Descent, Run
from h2t.pipeline.heads.features import FeatureTable
from h2t.pipeline.heads.folded import Folded, Groups
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
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.host import GradientHost, TrainingBatch
from h2t.pipeline.heads.residency import Feed, Step
from h2t.pipeline.networks.classifier import expert_logits
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.resume import Checkpoint

LEAST_LENGTH = 1e-12  # of a feature vector, as in torch's `normalize`
FOLDED_CLASSES = 2  # of more classes than this times the batch, fused features cost less than folded weights
FLOAT = 4  # bytes of a float32, which heads compute with
PER_HEAD = ("lr", "weight_decay")  # constants in which heads of one stack may differ


class NotFinite(Exception):
    """Training produced a NaN or infinite weight: in `epoch`, in `parameter` of the stack's `head`."""

    def __init__(self, epoch: int, head: int, parameter: str) -> None:
        super().__init__(f"epoch {epoch}: {parameter} of head {head} is not finite")
        self.epoch, self.head, self.parameter = epoch, head, parameter


@dataclass(frozen=True)
class HeadSetting:
    """What distinguishes one head of a stack from the others; `rounding` is the same for all.

    `constants`: (name, value) of the constants in which it differs from the host's own settings: `lr`, `weight_decay`,
    `scale`, and `loss.KEY` for a constant of the loss. Heads of one stack have equal `kind`s.
    """

    ratio: float
    donor: str
    selection: Selection
    seed: int
    rounding: Rounding = "floor"
    constants: tuple[tuple[str, Any], ...] = ()

    @property
    def kind(self) -> tuple[tuple[str, Any], ...]:
        """The constants that heads of one stack share: all but those of the optimiser."""
        return tuple((name, value) for name, value in self.constants if name not in PER_HEAD)

    def replaced(self, channels: int) -> int:
        """How many of `channels` are replaced."""
        return replaced_channels(self.ratio, channels, self.rounding)


class Optimiser(Section):
    """Section `hosts.NAME.optimiser`: SGD whose learning rate follows half a cosine over the epochs."""

    epochs: Epochs = 10
    """Passes over the training samples."""
    batch_size: Count = 128
    """Receivers in a batch."""
    lr: Rate = 0.02
    """Learning rate at the start; it follows half a cosine down to 0."""
    momentum: Ratio = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of SGD."""

    def rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, counted from 0; it is constant within an epoch and never reaches 0."""
        return 0.5 * self.lr * (1 + math.cos(math.pi * epoch / self.epochs))

    def of(self, head: HeadSetting) -> "Optimiser":
        """The settings that `head` is trained with."""
        return self.model_copy(update={name: value for name, value in head.constants if name in PER_HEAD})

    def runs(self, heads: Sequence[HeadSetting]) -> list[Run] | None:
        """Runs of neighbours among `heads` with equal constants; None if all of them have these settings."""
        own = [self.of(head) for head in heads]
        if all(settings == self for settings in own):
            return None
        runs: list[Run] = []
        for settings, same in groupby(own):
            first = runs[-1].end if runs else 0
            runs.append(Run(first, first + len(list(same)), settings.lr / self.lr, settings.weight_decay))
        return runs


def not_finite(state: Mapping[str, torch.Tensor]) -> tuple[int, str] | None:
    """(head, parameter) of the first NaN or infinite value in `state` (name -> (K, ...)), or None."""
    for name, tensor in state.items():
        finite = torch.isfinite(tensor).flatten(1).all(1)
        if not finite.all():
            return int((~finite).nonzero()[0]), name
    return None


def _axes(batch: TrainingBatch) -> Any:
    """The axis of the heads in each part of a batch, for vmap."""
    return TrainingBatch(*(0 if isinstance(part, torch.Tensor) else None for part in batch))  # type: ignore[arg-type]


def _taken(batch: TrainingBatch, seeds: torch.Tensor | int, features: torch.Tensor) -> TrainingBatch:
    """The parts of one seed or, with an index for each head, those of the heads; `features` as given."""
    rest = (part[seeds] if isinstance(part, torch.Tensor) else part for part in batch[1:])
    return TrainingBatch(features, *rest)  # type: ignore[arg-type]


class Stack:
    """K heads of one kind. `state` holds their parameters, name -> (K, ...).

    `heads` are the settings of the heads. `feed` gives the batches of their seeds and donors. `at_once`: whether heads
    that are linear in pooled features get their logits from products of the whole stack; if not, and for all other
    heads, vmap computes them.
    """

    def __init__(self, head: Head, heads: Sequence[HeadSetting], feed: Feed, *, at_once: bool = True) -> None:
        self.head, self.host, self.heads, self.feed = head, head.gradient_host, list(heads), feed
        self.streams, self.device, self.dtype = feed.streams, feed.device, feed.dtype
        streams = feed.streams
        self._seed_index = np.array([streams.seeds.index(h.seed) for h in heads])
        self._seed = torch.from_numpy(self._seed_index).to(self.device)
        donor_index = [streams.donors.index(h.donor) for h in heads]
        self._donor = torch.tensor(donor_index, device=self.device)
        channels = feed.shape[0]
        self.replaced = np.array([h.replaced(channels) for h in heads])
        self._random = np.array([h.selection in ("random", "shuffled") for h in heads])
        shuffled = np.flatnonzero([h.selection == "shuffled" for h in heads])
        self._shuffled = torch.from_numpy(shuffled).to(self.device)  # indices: a mask would make it wait for a GPU
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
        changes = type(self.host).update is not GradientHost.update
        self.at_once = at_once and head.linear and len(feed.shape) == 1 and not changes
        # Feature mixup changes lengths by more than its shares, and shuffled donors are different for each head.
        usual = not len(shuffled) and not (self._mixing and self.host.classifier == "cosine")
        few = self.host.context.classes <= FOLDED_CLASSES * self.streams.batch_size
        self._folds = usual and few and bool(self.replaced.any()) and not self.host.augments
        self._groups = Groups(self._seed_index, donor_index, self.device)

    def start(self, stage1: StageOneHead) -> None:
        """Sets the initial parameters of every head; they are equal for heads of one seed.

        Raises UserError if the stage-I classifier does not fit the host.
        """
        if self.host.prepares:
            rows = self.streams.receivers
            x = self.feed.reader.read(rows.first).to(self.device, self.dtype)
            self.head.prepare(x, torch.from_numpy(rows.labels).to(self.device), stage1)
        self._on_logits = copy(self.host)
        self._on_logits.classifier = "given"
        each = [self.head.initial(stage1, stream(h.seed, "initial")) for h in self.heads]
        self.state = {
            name: torch.stack([e[name] for e in each]).to(self.device, self.dtype, copy=True) for name in each[0]
        }
        for name in self.state.keys() - self.host.fixed:
            self.state[name].requires_grad_()

    def masks(self, epoch: int, step: int) -> torch.Tensor:
        """Masks of the channels that are replaced in this batch, bool (K, E, C)."""
        experts, channels = self.feed.experts, self.feed.shape[0]
        ranks = np.stack(
            [
                [channel_ranks(seed, epoch, step, expert, channels) for expert in range(experts)]
                for seed in self.streams.seeds
            ]
        )
        drawn = ranks[self._seed_index] < self.replaced[:, None, None]
        return torch.from_numpy(np.where(self._random[:, None, None], drawn, self._fixed[:, None, :])).to(self.device)

    def orders(self, epoch: int, step: int, size: int) -> torch.Tensor | None:
        """The donor of each channel for heads with shuffled donors, int64 (heads of that kind, E, B, C); else None."""
        if not len(self._shuffled):
            return None
        experts, channels = range(self.feed.experts), self.feed.shape[0]
        by_seed = {
            seed: np.stack([donor_orders(seed, epoch, step, expert, size, channels) for expert in experts])
            for seed in {h.seed for h in self.heads if h.selection == "shuffled"}
        }
        each = [by_seed[h.seed] for h in self.heads if h.selection == "shuffled"]
        return torch.from_numpy(np.stack(each)).to(self.device)

    def given(self, at: Step, progress: float = 0.0) -> TrainingBatch:
        """What a step brings, with a leading axis of seeds: `features` are the receivers before fusion, augmented."""
        batch, table = at.batch, at.table
        by_seed = [
            self.host.noise(stream(seed, "noise", at.epoch, at.step), batch.labels.shape[1])
            for seed in self.streams.seeds
        ]
        drawn = [n for n in by_seed if n is not None]
        labels, samples, partner_labels = (
            torch.from_numpy(part).to(self.device) for part in (batch.labels, batch.samples, batch.partner_labels)
        )
        paired = self.streams.partner is not None
        given = TrainingBatch(
            table.take(batch.receivers),
            labels,
            torch.stack(drawn).to(self.device, self.dtype) if drawn else None,
            samples,
            table.take(batch.partners) if paired else None,
            partner_labels if paired else None,
            progress,
        )
        if not self.host.augments:
            return given
        each = [_taken(given, seed, receivers) for seed, receivers in enumerate(given.features)]
        return given._replace(features=torch.stack([self.host.augment(one) for one in each]))

    def fused(
        self,
        batch: Batch,
        table: FeatureTable,
        masks: torch.Tensor,
        orders: torch.Tensor | None = None,
        receivers: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The fused input of every head, (K, E, B, C[, H, W]), in the feed's dtype.

        `receivers` (seeds, E, B, C[, H, W]): by default those in `table`, as they are.
        """
        receivers = (table.take(batch.receivers) if receivers is None else receivers)[self._seed]
        if not self.replaced.any():
            return receivers
        donors = table.take(batch.donors)[self._seed, self._donor]
        if orders is not None:
            donors[self._shuffled] = shuffle(donors[self._shuffled], orders)
        inner = (1,) * (receivers.dim() - 4)  # the axes after the channels
        x = fuse(receivers, donors, masks.reshape(*masks.shape[:2], 1, -1, *inner))
        if self._mixing:
            share = self._share.reshape(-1, 1, 1, 1, *inner)
            x = torch.where(share > 0, mix(receivers, donors, share), x)
        return x

    def step(self, at: Step, descent: Descent, rate: float, progress: float = 0.0) -> torch.Tensor:
        """Makes one step of every head at learning rate `rate`. Returns their losses before the step, (K,).

        `progress`: finished epochs / epochs.
        """
        epoch, step, batch, table = at
        masks, orders = self.masks(epoch, step), self.orders(epoch, step, batch.labels.shape[1])
        given = self.given(at, progress)
        if self.at_once:
            logits = self._logits(given.features, batch, table, masks, orders)
            losses = self._gradients_at_once(_taken(given._replace(partners=None), self._seed, logits))
            descent.step(rate)
            return losses
        x = self.fused(batch, table, masks, orders, given.features)
        of_heads = _taken(given, self._seed, x)
        losses = self._gradients(of_heads)
        descent.step(rate)
        if self.host.fixed:
            state = {name: t.detach() for name, t in self.state.items()}
            self.state.update(vmap(self.head.update)(state, x, of_heads.labels))
        return losses

    def _gradients(self, batch: TrainingBatch) -> torch.Tensor:
        """Sets the gradients of any heads; `features` are their fused inputs. Returns the losses, (K,)."""
        trained = {name: t.detach() for name, t in self.state.items() if name not in self.host.fixed}
        fixed = {name: t for name, t in self.state.items() if name in self.host.fixed}

        def loss(own: dict[str, torch.Tensor], fixed: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
            return self.head.batch_loss({**own, **fixed}, batch)

        grads, losses = vmap(grad_and_value(loss), in_dims=(0, 0, _axes(batch)))(trained, fixed, batch)
        for name, gradients in grads.items():
            self.state[name].grad = gradients
        return losses.detach()

    def _gradients_at_once(self, batch: TrainingBatch) -> torch.Tensor:
        """Sets the gradients of linear heads; `features` are their experts' logits (K, E, B, N). Returns the losses."""
        losses = vmap(self._on_logits.batch_loss, in_dims=(0, _axes(batch)))(self.state, batch)
        trained = {name: t for name, t in self.state.items() if name not in self.host.fixed}
        gradients = torch.autograd.grad(losses.sum(), list(trained.values()))
        for tensor, gradient in zip(trained.values(), gradients, strict=True):
            tensor.grad = gradient
        return losses.detach()

    def _logits(
        self,
        receivers: torch.Tensor,
        batch: Batch,
        table: FeatureTable,
        masks: torch.Tensor,
        orders: torch.Tensor | None,
    ) -> torch.Tensor:
        """The experts' logits of every head on its fused features, (K, E, B, N); `receivers` (seeds, E, B, C)."""
        host, state = self.host, self.state
        if not self._folds:
            x = self.fused(batch, table, masks, orders, receivers)
            return expert_logits(host.classifier, state, x, host.scale)
        donors = table.take(batch.donors)
        groups = self._groups
        pairs = torch.cat([receivers[groups.seed], donors[groups.seed, groups.donor]], dim=-1)
        share = torch.where(self._share[:, None, None] > 0, self._share[:, None, None], masks.to(self.dtype))
        if host.classifier == "linear":
            products = Folded.apply(state["weight"], share, pairs, groups)
            return host.scale * (products + state["bias"].unsqueeze(-2))
        ones = torch.ones_like(share).unsqueeze(2)
        lengths = Folded.apply(ones, share, pairs.square(), groups).sqrt().clamp_min(LEAST_LENGTH)  # (K, E, B, 1)
        products = Folded.apply(F.normalize(state["weight"], dim=-1), share, pairs, groups)
        return host.scale * products / lengths

    def train(
        self,
        settings: Optimiser,
        name: str,
        report: Callable[[int, torch.Tensor], None],
        save: Checkpoint | None = None,
    ) -> None:
        """Trains for all epochs, then calls `report(epoch, mean loss of each head (K,))` for each of them.

        `name` labels the progress bar. With `save`, training resumes from the last saved step and ends with the same
        weights. Raises NotFinite after the first epoch that ends with a weight that is NaN or infinite.
        """
        trained = {name: t for name, t in self.state.items() if name not in self.host.fixed}
        runs = settings.runs(self.heads)
        descent = Descent(trained, self.host.rates, settings.momentum, settings.weight_decay, runs)
        losses = torch.zeros(settings.epochs, len(self.heads), dtype=self.dtype, device=self.device)
        first = save.restore(self.state, descent, losses) if save else 0
        steps = self.streams.steps
        bar = progress(None, f"train_classifier {name}", unit="step", total=settings.epochs * steps, initial=first)
        with bar:
            for at in self.feed.steps(settings.epochs, *divmod(first, steps)):
                progress_made = at.epoch / settings.epochs
                lost = self.step(at, descent, settings.rate(at.epoch), progress_made)
                losses[at.epoch] += lost * at.batch.labels.shape[1]
                bar.update()
                if at.step == steps - 1 and (bad := not_finite(self.state)):
                    raise NotFinite(at.epoch, *bad)
                if save:
                    save.offer(at.epoch * steps + at.step + 1, self.state, descent, losses)
                del at  # it keeps a window of features in memory
        for epoch, total in enumerate(losses):
            report(epoch, total / self.streams.samples)
