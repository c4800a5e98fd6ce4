"""The memory that a training step of stage II needs, reckoned before anything is allocated.

What torch itself takes at its first step, 9 MiB, is not in it: `residency.RESERVE` is left for that.
benchmarks/bench_growth.py measures how far above the real peak it lies.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.draws import DRAWN_BYTES
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.fusion import Selection
from h2t.pipeline.heads.head import MAP_AXES, Head
from h2t.pipeline.heads.host import GradientHost
from h2t.pipeline.heads.linear_heads import heads_at_once, is_at_once, is_folded
from h2t.pipeline.heads.residency import MAX_WINDOW_STEPS
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.heads.stack import FLOAT
from h2t.pipeline.networks.trained import StageOneHead

COPIES: dict[Selection, int] = {"mixup": 5, "shuffled": 6}  # copies of a head's input in a step; 3 for other selections
TRAINED_POOL_COPIES = 8  # copies of a head's input for the gradients of a pool with parameters (measured on `gem`)
FROZEN_COPIES = 3  # copies of a head's input for the gradients of a layer between pool and classifier
INT64 = 8  # bytes
#: What a process holds, in multiples of the tensors that a step makes. Malloc keeps freed blocks: measured up to 1.8,
#: and 1.0 where freed arrays are returned at once.
HELD = 2


@dataclass(frozen=True)
class StepSize:
    """Computes the memory, in bytes, of a training step.

    `batch`: samples in a batch. `numbers`: numbers per row, all experts; `kept`: bytes of each as stored. `logits` and
    `parameters`: numbers per head. `pool_copies`: how many more copies of its input a head's pool needs. `partners`: 1
    for a host with a second sampler. `at_once`: the host, if products of the whole stack give its logits; None if vmap
    does. `in_blocks`: whether these are computed in blocks of heads, as on the CPU. `order`: bytes that samplers keep
    of a seed's epoch. `noise`: numbers that the loss draws for a batch; `loss`: those that it makes per head, beside
    copies of the logits.
    """

    batch: int
    numbers: int
    kept: int
    logits: int
    parameters: int
    pool_copies: int = 0
    partners: int = 0
    at_once: GradientHost | None = None
    in_blocks: bool = False
    order: int = 0
    noise: int = 0
    loss: int = 0

    def window(self, heads: Sequence[HeadSetting]) -> int:
        """Bytes of the stored features of one step of `heads`: receivers and donors of every seed."""
        seeds, donors = seeds_and_donors(heads)
        return len(seeds) * (1 + len(donors) + self.partners) * self.batch * self.numbers * self.kept

    def of(self, heads: Sequence[HeadSetting]) -> int:
        """Bytes of a step of `heads`: features of every seed, copies per head, logits, parameters, gradients, momenta.

        With vmap the copies per head are receivers, donors and the fused input; mixup and shuffled donors need more.
        Measured peaks on maps of 64 x 8 x 8 exceed this by at most 6 %.
        """
        if self.at_once is not None:
            return self._products(heads, self.at_once) + self._drawn(heads)
        seeds, donors = seeds_and_donors(heads)
        gathered = len(seeds) * (len(donors) + self.partners) * self.batch * self.numbers * (3 * self.kept + FLOAT)
        per_head = self._copies(heads) * self.batch * self.numbers * FLOAT
        return gathered + len(heads) * (per_head + FLOAT * (6 * self.logits + 8 * self.parameters + self.loss))

    def _copies(self, heads: Sequence[HeadSetting]) -> int:
        """How often a head's input exists where it is built."""
        return max([1 + self.pool_copies, *(COPIES.get(h.selection, 3) for h in heads)]) + self.partners

    def _products(self, heads: Sequence[HeadSetting], host: GradientHost) -> int:
        """Bytes of a step whose logits are products of the whole stack.

        Where fusion is folded into the weights, a head has a mask in place of an input of its own.
        """
        seeds, donors = seeds_and_donors(heads)
        folded = is_folded(host, heads)
        groups = Counter((h.seed, h.donor) for h in heads)
        rows = 2 * len(groups) if folded else len(seeds) * (1 + len(donors) + self.partners)
        gathered = rows * self.batch * self.numbers * (self.kept + FLOAT)
        own = self.numbers * (3 * FLOAT + 1)  # ranks, mask, and the share twice with mixup
        own += 0 if folded else self._copies(heads) * self.batch * self.numbers * FLOAT
        # Groups are padded to the largest.
        count = len(groups) * max(groups.values()) if folded else len(heads)
        block = heads_at_once(len(groups) if folded else 1, FLOAT * self.logits) if self.in_blocks else count
        # Logits, and what is made of them; the block's weights, as they are and folded, and gradients.
        of_block = min(block, count) * FLOAT * (7 * self.logits + 5 * self.parameters + self.loss)
        held = HELD if self.in_blocks else 1
        kept = 4 * FLOAT * len(heads) * self.parameters  # weights (twice while they are started), momenta, gradients
        return kept + held * (gathered + len(heads) * own + of_block)

    def _drawn(self, heads: Sequence[HeadSetting]) -> int:
        """Bytes of what two windows of steps draw, and of the orders that draws are taken from."""
        seeds, donors = seeds_and_donors(heads)
        shuffled = len({h.seed for h in heads if h.selection == "shuffled"})
        sent = len(seeds) * (2 * INT64 * self.batch + FLOAT * (self.numbers + self.noise))
        sent += shuffled * INT64 * self.batch * self.numbers
        rows = len(seeds) * (3 + 4 * len(donors) + 2 * self.partners) * self.batch
        steps = max(1, min(MAX_WINDOW_STEPS, DRAWN_BYTES // sent))
        return 2 * steps * (sent + INT64 * rows) + len(seeds) * self.order


def seeds_and_donors(heads: Sequence[HeadSetting]) -> tuple[list[int], list[str]]:
    """The distinct seeds and the distinct donors of `heads`, in order of appearance."""
    return list(dict.fromkeys(h.seed for h in heads)), list(dict.fromkeys(h.donor for h in heads))


def step_size(
    streams: Streams, reader: FeatureReader, stage1: StageOneHead, head: Head, *, on_gpu: bool = False
) -> StepSize:
    """The sizes that the memory of a training step depends on."""
    experts, classes = reader.cache.experts, streams.index.classes
    numbers = reader.row_bytes // reader.dtype.itemsize
    channels, frozen = reader.cache.spec.maps[0][0], stage1.frozen
    drawn = head.gradient_host.noise(np.random.default_rng(0), streams.batch_size)
    linear = experts * classes * ((frozen.outputs(channels) if frozen else channels) + 1)
    return StepSize(
        batch=streams.batch_size,
        numbers=numbers,
        kept=reader.dtype.itemsize,
        logits=experts * streams.batch_size * classes,
        parameters=int(max(linear, sum(t.numel() for t in stage1.state.values())) * head.gradient_host.size),
        pool_copies=(TRAINED_POOL_COPIES if len(reader.shape) == MAP_AXES - 2 and head.pool.initial() else 0)
        + FROZEN_COPIES * len(frozen.layers if frozen else ()),
        partners=int(streams.partner is not None),
        at_once=head.gradient_host if is_at_once(head, reader.shape) else None,
        in_blocks=not on_gpu,
        order=0 if on_gpu else streams.order_bytes,
        noise=0 if drawn is None else drawn.numel(),
        loss=head.gradient_host.loss_numbers(),
    )
