"""Trains K heads together. Heads of one seed share their batches; each has its own channels and optimiser state.

A `Head` describes one of them; `torch.func.vmap` over its gradient adds the stack's axis. Heads that are linear in
pooled features get their logits from matrix products of the whole stack instead (`heads.linear_heads`), to the same
result.
Head k of a stack equals that head trained alone, up to the rounding of batched matrix products.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.func import grad_and_value, vmap

from h2t.pipeline.base.many_streams import generators
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.heads.batches import Batch
from h2t.pipeline.heads.descent import Descent
from h2t.pipeline.heads.draws import DRAWN_BYTES, Draws, sent
from h2t.pipeline.heads.folded import Folded, Groups, Plain, Products
from h2t.pipeline.heads.fusion import Selection, channel_ranks, donor_orders, fixed_channels, fuse, mix, shuffle
from h2t.pipeline.heads.head import MAP_AXES, Head
from h2t.pipeline.heads.host import TrainingBatch
from h2t.pipeline.heads.linear_heads import LinearHeads, in_blocks, is_at_once, is_folded, threads_for
from h2t.pipeline.heads.residency import MAX_WINDOW_STEPS, Feed, Step
from h2t.pipeline.heads.setting import HeadSetting, Optimiser
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.resume import Checkpoint

DRAWN: tuple[Selection, ...] = ("random", "shuffled")  # selections that draw their channels
FLOAT = 4  # bytes of a float32, which heads compute with


class NotFinite(Exception):
    """Training produced a NaN or infinite weight: in `epoch`, in `parameter` of the stack's `head`."""

    def __init__(self, epoch: int, head: int, parameter: str) -> None:
        super().__init__(f"epoch {epoch}: {parameter} of head {head} is not finite")
        self.epoch, self.head, self.parameter = epoch, head, parameter


def _fixed_masks(heads: Sequence[HeadSetting], replaced: np.ndarray, channels: int) -> torch.Tensor | None:
    """Masks of the heads whose channels are not drawn, bool (K, C), all False for the others; None if all are drawn."""
    if all(h.selection in DRAWN for h in heads):
        return None
    masks = np.zeros((len(heads), channels), bool)
    for mask, head, count in zip(masks, heads, replaced, strict=True):
        if head.selection in ("first", "middle", "last"):
            mask[:] = fixed_channels(head.selection, int(count), channels)
    return torch.from_numpy(masks)


def not_finite(state: Mapping[str, torch.Tensor]) -> tuple[int, str] | None:
    """(head, parameter) of the first NaN or infinite value in `state` (name -> (K, ...)), or None."""
    for name, tensor in state.items():
        finite = torch.isfinite(tensor).flatten(1).all(1)
        if not finite.all():
            return int((~finite).nonzero()[0]), name
    return None


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
        self._replaced = torch.from_numpy(self.replaced).to(self.device, torch.int32)[:, None, None]
        fixed = _fixed_masks(heads, self.replaced, channels)
        self._fixed = None if fixed is None else fixed.to(self.device)
        self._drawn = torch.tensor([h.selection in DRAWN for h in heads], device=self.device)[:, None, None]
        shuffled = np.flatnonzero([h.selection == "shuffled" for h in heads])
        self._shuffled = torch.from_numpy(shuffled).to(self.device)  # indices: a mask would make it wait for a GPU
        # Which seeds have heads with shuffled donors, and which of these each of those heads has.
        self._shuffled_seeds, order = np.unique(self._seed_index[shuffled], return_inverse=True)
        self._order = torch.from_numpy(order.reshape(-1)).to(self.device)
        mixed = np.array([h.selection == "mixup" for h in heads])
        self._mixing = bool((mixed & (self.replaced > 0)).any())
        share = torch.tensor(mixed * self.replaced / channels, device=self.device, dtype=self.dtype)
        self._share = share[:, None, None]
        # Maps that only the augmentation needs are pooled after it, before each head gets a copy.
        self._pools = head.pool.commutes and not self._mixing and len(feed.shape) == MAP_AXES - 2
        self.state: dict[str, torch.Tensor] = {}
        self.at_once = at_once and is_at_once(head, feed.shape)
        self._folds = self.at_once and is_folded(self.host, heads)
        self._groups = Groups(self._seed_index, donor_index, self.device)
        self._in_blocks = self.at_once and self.device.type == "cpu"
        self._logits = self.feed.experts * self.streams.batch_size * self.host.context.classes  # of a head
        if self._in_blocks:
            size = self._logits * self.dtype.itemsize
            self._blocks = in_blocks(self._groups, self._seed_index, donor_index, size, folds=self._folds)
        else:
            self._blocks = [(slice(None), self._groups)]

    def start(self, stage1: StageOneHead) -> None:
        """Sets the initial parameters of every head; they are equal for heads of one seed.

        Raises UserError if the stage-I classifier does not fit the host.
        """
        if self.host.prepares:
            rows = self.streams.receivers
            x = self.feed.reader.read(rows.first).to(self.device, self.dtype)
            self.head.prepare(x, torch.from_numpy(rows.labels).to(self.device), stage1)
        self.linear_heads = LinearHeads(self.host, self._blocks, self._seed)
        each = [self.head.initial(stage1, stream(h.seed, "initial")) for h in self.heads]
        self.state = {
            name: torch.stack([e[name] for e in each]).to(self.device, self.dtype, copy=True) for name in each[0]
        }
        for name in self.state.keys() - self.host.fixed:
            self.state[name].requires_grad_()

    def draw(self, window: Sequence[Step]) -> list[Draws]:
        """What the steps of a window draw. A window has one table and lies within one epoch."""
        table = window[0].table
        drawn = self.drawn(window[0].epoch, [at.step for at in window], [at.batch for at in window])
        found = [[(table.find(rows), rows.shape) for rows in self._gathered(at.batch)] for at in window]
        tensors = iter(sent([tensor for step in drawn for tensor in step.values()], self.device))
        numbers = [torch.from_numpy(part) for step in found for parts, _ in step for part in parts]
        places = iter(sent(numbers, table.device))
        return [
            Draws([([next(places) for _ in parts], shape) for parts, shape in rows], **{n: next(tensors) for n in step})
            for step, rows in zip(drawn, found, strict=True)
        ]

    def drawn(self, epoch: int, steps: Sequence[int], batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
        """The tensors of `Draws` of each step but `rows`, by name, on the CPU.

        Without noise and orders where there are none.
        """
        streams, experts, channels = self.streams, range(self.feed.experts), self.feed.shape[0]
        parts: dict[str, Iterable[np.ndarray]] = {
            "labels": (batch.labels for batch in batches),
            "samples": (batch.samples for batch in batches),
            "ranks": channel_ranks(streams.seeds, epoch, steps, experts, channels),
        }
        if streams.partner:
            parts["partner_labels"] = (batch.partner_labels for batch in batches)
        if len(self._shuffled):
            seeds = [streams.seeds[index] for index in self._shuffled_seeds]
            sizes = [batch.labels.shape[1] for batch in batches]
            parts["orders"] = (
                donor_orders(seeds, epoch, [step], experts, size, channels)[0]
                for step, size in zip(steps, sizes, strict=True)
            )
        named = [
            dict(zip(parts, map(torch.from_numpy, each), strict=True)) for each in zip(*parts.values(), strict=True)
        ]
        if self.host.noisy:
            every = generators(streams.seeds, ("noise", epoch), steps)
            for tensors, batch in zip(named, batches, strict=True):
                noise = [self.host.noise(next(every), batch.labels.shape[1]) for _ in streams.seeds]
                if given := [n.to(self.dtype) for n in noise if n is not None]:
                    tensors["noise"] = torch.stack(given)
        return named

    def _gathered(self, batch: Batch) -> list[np.ndarray]:
        """The rows that a step gathers: pairs for groups of heads (G, 2 B), or receivers, donors and partners."""
        if self._folds:
            seed, donor = self._groups.seed, self._groups.donor
            pairs = np.stack([batch.receivers[seed], batch.donors[seed, donor]], axis=-1)
            return [pairs.reshape(len(pairs), -1)]
        donors = [batch.donors] if self.replaced.any() else []
        return [batch.receivers, *donors, *([batch.partners] if self.streams.partner else [])]

    def masks(self, ranks: torch.Tensor) -> torch.Tensor:
        """Masks of the channels that are replaced in a batch with these `ranks`, bool (K, E, C)."""
        drawn = ranks.index_select(0, self._seed) < self._replaced
        return drawn if self._fixed is None else torch.where(self._drawn, drawn, self._fixed.unsqueeze(1))

    def given(self, at: Step, progress: float = 0.0) -> tuple[TrainingBatch, torch.Tensor | None]:
        """(What a step brings, with a leading axis of seeds; donors (seeds, donors, E, B, C[, H, W]) if any are used).

        `features` are the receivers before fusion, augmented, then pooled if pooling commutes with fusion. Where fusion
        is folded they are pairs, (G, E, 2 B, C).
        """
        draws = at.draws
        assert draws is not None
        features, *others = (at.table.gather(*rows) for rows in draws.rows)
        donors = others[0] if self.replaced.any() and not self._folds else None
        partners = others[-1] if self.streams.partner and not self._folds else None
        labels = draws.partner_labels
        given = TrainingBatch(features, draws.labels, draws.noise, draws.samples, partners, labels, progress)
        if not self.host.augments:
            return given, donors
        each = (self.host.augment(given.of(seed, receivers)) for seed, receivers in enumerate(given.features))
        features = torch.stack([self._after(maps) for maps in each])
        return given._replace(features=features, partners=self._after(partners)), self._after(donors)

    def _after(self, maps: Any) -> Any:
        """Maps or features after augmentation, if there are any: pooled if that commutes with fusion."""
        return maps if maps is None or not self._pools else self.head.pool({}, maps)

    def fused(self, draws: Draws, receivers: torch.Tensor, donors: torch.Tensor | None) -> torch.Tensor:
        """The fused input of every head, (K, E, B, C[, H, W]), in the feed's dtype."""
        receivers = receivers[self._seed]
        if donors is None:
            return receivers
        donors = donors[self._seed, self._donor]
        if draws.orders is not None:
            donors[self._shuffled] = shuffle(donors[self._shuffled], draws.orders[self._order])
        masks = self.masks(draws.ranks)
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
        assert at.draws is not None
        given, donors = self.given(at, progress)
        if self.at_once:
            losses = self.linear_heads.gradients(self.state, given, self._products(at.draws, given.features, donors))
            descent.step(rate)
            return losses
        x = self.fused(at.draws, given.features, donors)
        of_heads = given.of(self._seed, x)
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

        grads, losses = vmap(grad_and_value(loss), in_dims=(0, 0, batch.axes))(trained, fixed, batch)
        for name, gradients in grads.items():
            self.state[name].grad = gradients
        return losses.detach()

    def _products(self, draws: Draws, features: torch.Tensor, donors: torch.Tensor | None) -> Iterator[Products]:
        """Products with the fused features of each block of heads. `features`, `donors`: as `given` returns them."""
        if not self._folds:
            x = self.fused(draws, features, donors)
            yield from (Plain(x[heads]) for heads, _ in self._blocks)
            return
        pairs = features.reshape(*features.shape[:2], -1, 2 * features.shape[3])
        share = self.masks(draws.ranks).to(self.dtype)
        if self._mixing:
            share = torch.where(self._share > 0, self._share, share)
        yield from (Folded(share[heads], pairs, groups) for heads, groups in self._blocks)

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
        per_head = settings.per_head(self.heads)
        descent = Descent(trained, self.host.rates, settings.momentum, settings.weight_decay, per_head)
        losses = torch.zeros(settings.epochs, len(self.heads), dtype=self.dtype, device=self.device)
        first = save.restore(self.state, descent, losses) if save else 0
        steps = self.streams.steps
        (drawn,) = self.drawn(0, [0], [self.streams.batch(0, 0)])
        window = max(1, min(MAX_WINDOW_STEPS, DRAWN_BYTES // sum(tensor.nbytes for tensor in drawn.values())))
        bar = progress(None, f"train_classifier {name}", unit="step", total=settings.epochs * steps, initial=first)
        multiply_adds = len(self.heads) * self._logits * self.feed.shape[0]
        with bar, threads_for(multiply_adds) if self._in_blocks else nullcontext():
            for at in self.feed.steps(settings.epochs, *divmod(first, steps), self.draw, window):
                lost = self.step(at, descent, settings.rate(at.epoch), at.epoch / settings.epochs)
                losses[at.epoch].add_(lost, alpha=at.batch.labels.shape[1])
                bar.update()
                if at.step == steps - 1 and (bad := not_finite(self.state)):
                    raise NotFinite(at.epoch, *bad)
                if save:
                    save.offer(at.epoch * steps + at.step + 1, self.state, descent, losses)
                del at  # it keeps a window of features in memory
        for epoch, total in enumerate(losses):
            report(epoch, total / self.streams.samples)
