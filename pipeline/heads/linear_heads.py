"""Losses and gradients of many linear heads from a few matrix products, in place of vmap over single heads.

Heads are computed in blocks whose logits fit into the processor's cache.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
from torch.func import vmap
from torch.nn import functional as F

from h2t.pipeline.heads.folded import Groups, Products
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.host import CrossEntropyHost, GradientHost, TrainingBatch, is_cross_entropy, is_stackable
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.networks.classifier import expert_mean
from h2t.pipeline.training.longtail import cross_entropy_gradient

LEAST_LENGTH = 1e-12  # of a feature vector, as in torch's `normalize`
#: Bytes of logits that are computed at once on the CPU. More would leave the processor's cache, and malloc would take
#: fresh pages for each array above 32 MiB.
LOGITS_AT_ONCE = 4 * 2**20

#: Multiply-adds of a product of the whole stack up to which one thread of the CPU computes a step. To wake others takes
#: longer than they save: with two, a step of 55 heads, 64 channels and 10 classes took 1.6 times as long (docs/log.md).
ONE_THREAD = 20_000_000

FOLDED_CLASSES = 64  # with more classes, fused features cost less than folded weights (docs/decisions/0019)

Block = tuple[torch.Tensor | slice, Groups]  # the heads whose logits are computed at once, and their groups


def is_at_once(head: Head, shape: Sequence[int]) -> bool:
    """Whether products of the whole stack can give the logits of heads on features of `shape`."""
    changes = type(head.gradient_host).update is not GradientHost.update
    return head.linear and len(shape) == 1 and not changes


def is_folded(host: GradientHost, heads: Sequence[HeadSetting]) -> bool:
    """Whether fusion is folded into the weights of `heads`, which are computed at once."""
    # Shuffled donors are different for each head, and feature mixup changes lengths by more than its shares.
    replaced = [h for h in heads if h.replaced(host.context.channels)]
    mixing = host.classifier == "cosine" and any(h.selection == "mixup" for h in replaced)
    usual = not mixing and not any(h.selection == "shuffled" for h in heads)
    return usual and bool(replaced) and host.context.classes <= FOLDED_CLASSES and not host.augments


def heads_at_once(groups: int, logit_bytes: int) -> int:
    """How many heads of so many `groups`, whose logits take `logit_bytes` each, make a block."""
    return groups * max(1, LOGITS_AT_ONCE // (groups * logit_bytes))


def in_blocks(
    groups: Groups, seeds: np.ndarray, donors: Sequence[int], logit_bytes: int, *, folds: bool
) -> list[Block]:
    """Blocks of the heads in `groups`, whose logits take `logit_bytes` each; a folded block has heads of all groups.

    `seeds`, `donors`: as in `Groups`.
    """
    members = groups.members if folds else torch.arange(len(seeds))[None]
    length = heads_at_once(len(members), logit_bytes) // len(members)
    if length >= members.shape[1]:
        return [(slice(None), groups)]
    blocks = [block.flatten() for block in members.split(length, 1)]
    donor = np.asarray(donors)
    return [(heads, Groups(seeds[heads.numpy()], donor[heads.numpy()], members.device)) for heads in blocks]


@contextmanager
def threads_for(multiply_adds: int) -> Iterator[None]:
    """Limits torch, in the calling thread, to one thread of the CPU if a product has only so many `multiply_adds`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiply_adds <= ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LinearHeads:
    """Losses and gradients of K heads of the linear or cosine `host`, which `prepare` has been called on.

    `blocks` cover all heads; `seed` (K,): the index of each head's seed.
    """

    def __init__(self, host: GradientHost, blocks: Sequence[Block], seed: torch.Tensor) -> None:
        self.host, self.blocks, self._seed = host, blocks, seed
        self.on_logits = copy(host)
        self.on_logits.classifier = "given"
        self.stackable = is_stackable(self.on_logits)

    def gradients(
        self, state: Mapping[str, torch.Tensor], batch: TrainingBatch, every: Iterable[Products]
    ) -> torch.Tensor:
        """Sets the gradients of the parameters in `state`. Returns the losses, (K,).

        `batch`: what a step brings, with a leading axis of seeds. `every`: products with the features of each block.
        """
        if self.stackable:  # these losses use nothing else
            batch = TrainingBatch(batch.features, batch.labels, batch.noise)
        batch = batch._replace(partners=None)
        trained = {name: t for name, t in state.items() if name not in self.host.fixed}
        each = batch.labels.new_empty(len(self._seed), dtype=batch.features.dtype)
        for (heads, _), products in zip(self.blocks, every, strict=True):
            found, losses = self._of_block(heads, products, state, list(trained), batch)
            if len(self.blocks) == 1:
                for name, tensor in trained.items():
                    tensor.grad = found[name]
                return losses
            each[heads] = losses
            for name, tensor in trained.items():
                if tensor.grad is None:  # kept from step to step, so that malloc takes no fresh pages
                    tensor.grad = torch.empty_like(tensor)
                tensor.grad[heads] = found[name]
        return each

    def _of_block(
        self,
        heads: torch.Tensor | slice,
        products: Products,
        state: Mapping[str, torch.Tensor],
        trained: Sequence[str],
        batch: TrainingBatch,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The gradients of the parameters `trained` of a block's heads, (h, ...), and their losses, (h,)."""
        own = {name: t.detach()[heads] for name, t in state.items()}
        logits = self._logits(products, own)
        rest: Sequence[torch.Tensor | None] = [None] * len(trained)
        if self.stackable and is_cross_entropy(self.on_logits):
            losses, outer = _cross_entropy(self.on_logits, logits, batch.labels[self._seed[heads]])
        else:
            leaves = [own[name].requires_grad_() for name in trained]
            losses = self._losses(own, batch.of(self._seed[heads], logits.requires_grad_()))
            # Of the sum: for `grad_outputs` torch imports sympy.
            outer, *rest = torch.autograd.grad(losses.sum(), [logits, *leaves], allow_unused=True)
        found = self._of_logits(products, own, outer.mT)
        for name, gradient in zip(trained, rest, strict=True):  # of what a loss uses besides logits
            if gradient is not None:
                found[name] = found[name] + gradient if name in found else gradient
            elif name not in found:
                found[name] = torch.zeros_like(own[name])
        return found, losses.detach()

    @torch.no_grad()
    def _logits(self, products: Products, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The experts' logits of heads with this `state` on their fused features, (K, E, B, N)."""
        if self.host.classifier == "cosine":
            logits = products.of(F.normalize(state["weight"], dim=-1)).div_(products.lengths.clamp_min(LEAST_LENGTH))
        else:
            logits = products.of(state["weight"]).add_(state["bias"].unsqueeze(-1))
        return (logits if self.host.scale == 1 else logits.mul_(self.host.scale)).mT

    def _of_logits(
        self, products: Products, state: Mapping[str, torch.Tensor], outer: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The gradients of weights and biases, from those of the logits, `outer` (K, E, N, B)."""
        if self.host.scale != 1:
            outer = outer * self.host.scale
        if self.host.classifier != "cosine":
            return {"weight": products.gradient(outer), "bias": outer.sum(-1)}
        gradient = products.gradient(outer / products.lengths.clamp_min(LEAST_LENGTH))
        length = state["weight"].detach().norm(dim=-1, keepdim=True).clamp_min(LEAST_LENGTH)
        unit = state["weight"].detach() / length
        return {"weight": (gradient - unit * (unit * gradient).sum(-1, keepdim=True)) / length}

    def _losses(self, state: Mapping[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        """The losses of heads with this `state`, whose experts' logits are the features of the batch, (K,)."""
        loss = self.on_logits.batch_loss
        if not self.stackable:
            loss = vmap(loss, in_dims=(0, batch.axes))
        return loss(state, batch)


@torch.no_grad()
def _cross_entropy(
    host: CrossEntropyHost, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of K heads (K,), and their gradients for the experts' `logits` (K, E, B, N).

    `labels`: int64 (K, B).
    """
    losses, outer = cross_entropy_gradient(host.with_prior(expert_mean(logits)), labels)
    experts = logits.shape[1]
    return losses, outer.unsqueeze(1) if experts == 1 else (outer / experts).unsqueeze(1).expand(logits.shape)
