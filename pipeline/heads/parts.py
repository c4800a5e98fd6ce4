"""Splits the heads of a host into parts whose training steps fit the memory, and into shares for several processes.

Heads do not depend on each other, so training part by part gives the same heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, pairwise

from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.fusion import Selection
from h2t.pipeline.heads.head import MAP_AXES, Head
from h2t.pipeline.heads.residency import WINDOW_SHARE, Choice, Room
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.heads.stack import FLOAT
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.resume import Checkpoint

COPIES: dict[Selection, int] = {"mixup": 5, "shuffled": 6}  # copies of a head's input in a step; 3 for other selections
RESULT_COPIES = 3  # copies of all weights in memory: one collected, two while writing
TRAINED_POOL_COPIES = 8  # copies of a head's input for the gradients of a pool with parameters (measured on `gem`)
FROZEN_COPIES = 3  # copies of a head's input for the gradients of a layer between pool and classifier
RESUME_SLACK = 1.5  # a step may exceed its budget by this factor, so that training can resume in the same parts


@dataclass(frozen=True)
class StepSize:
    """Computes the memory, in bytes, of a training step.

    `batch`: samples in a batch. `numbers`: numbers per row, all experts; `kept`: bytes of each as stored. `logits` and
    `parameters`: numbers per head. `pool_copies`: how many more copies of its input a head's pool needs. `partners`: 1
    for a host with a second sampler.
    """

    batch: int
    numbers: int
    kept: int
    logits: int
    parameters: int
    pool_copies: int = 0
    partners: int = 0

    def window(self, heads: Sequence[HeadSetting]) -> int:
        """Bytes of the stored features of one step of `heads`: receivers and donors of every seed."""
        seeds, donors = seeds_and_donors(heads)
        return len(seeds) * (1 + len(donors) + self.partners) * self.batch * self.numbers * self.kept

    def of(self, heads: Sequence[HeadSetting]) -> int:
        """Bytes of a step of `heads`: features of every seed, copies per head, logits, parameters, gradients, momenta.

        The copies per head are receivers, donors and the fused input; mixup and shuffled donors need more. Measured
        peaks on maps of 64 x 8 x 8 exceed this by at most 6 %.
        """
        seeds, donors = seeds_and_donors(heads)
        copies = max([1 + self.pool_copies, *(COPIES.get(h.selection, 3) for h in heads)]) + self.partners
        gathered = len(seeds) * (len(donors) + self.partners) * self.batch * self.numbers * (3 * self.kept + FLOAT)
        per_head = copies * self.batch * self.numbers * FLOAT
        return gathered + len(heads) * (per_head + FLOAT * (6 * self.logits + 8 * self.parameters))


def seeds_and_donors(heads: Sequence[HeadSetting]) -> tuple[list[int], list[str]]:
    """The distinct seeds and the distinct donors of `heads`, in order of appearance."""
    return list(dict.fromkeys(h.seed for h in heads)), list(dict.fromkeys(h.donor for h in heads))


def grouped(heads: Sequence[HeadSetting]) -> list[int]:
    """The places of `heads`, sorted by seed and donor: a stack trains such an order without moving its weights."""
    return sorted(range(len(heads)), key=lambda place: (heads[place].seed, heads[place].donor))


def parts_of(heads: Sequence[HeadSetting], size: int) -> list[list[HeadSetting]]:
    """Splits `heads` in order into parts of `size`; the last may be smaller.

    Heads do not depend on each other, so training part by part gives the same heads.
    """
    return [list(heads[i : i + size]) for i in range(0, len(heads), size)]


def shares_of(heads: Sequence[HeadSetting], count: int) -> list[list[int]]:
    """The numbers of the heads in each of at most `count` nearly equal shares, ascending.

    Heads of one seed share their batches, so a share has as few seeds as possible.
    """
    seeds = list(dict.fromkeys(h.seed for h in heads))
    by_seed = sorted(range(len(heads)), key=lambda number: seeds.index(heads[number].seed))
    count = min(count, len(heads))
    borders = [len(heads) * share // count for share in range(count + 1)]
    return [sorted(by_seed[first:last]) for first, last in pairwise(borders)]


def part_sizes(heads: int) -> list[int]:
    """The part sizes that split `heads` into 1, 2, 3 ... nearly equal parts, largest first."""
    return sorted({-(-heads // count) for count in range(1, heads + 1)}, reverse=True)


def step_size(streams: Streams, reader: FeatureReader, stage1: StageOneHead, head: Head) -> StepSize:
    """The sizes that the memory of a training step depends on."""
    experts, classes = reader.cache.experts, streams.index.classes
    numbers = reader.row_bytes // reader.dtype.itemsize
    channels, frozen = reader.cache.spec.maps[0][0], stage1.frozen
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
    )


def planned_parts(
    run: Run, heads: list[HeadSetting], size: StepSize, choice: Choice, room: Room, features: int, token: str
) -> list[list[HeadSetting]]:
    """Splits the heads into the fewest parts whose steps fit, or as an interrupted run did, if that still fits.

    A part has heads of one kind, and those of a kind are neighbours in `heads`.

    `features`: bytes of the features that stay in memory. Raises UserError if not even one head fits.
    """
    results = RESULT_COPIES * len(heads) * FLOAT * size.parameters
    if results > room.host:
        raise UserError(
            f"hosts.{run.name}.grid: the weights of {counted(len(heads), 'classifier')} need {sized(results)} of "
            f"memory; {sized(room.host)} are available; make the grid smaller, or raise the memory limit"
        )
    streamed = choice.tier == "stream"

    def fits(parts: list[list[HeadSetting]], slack: float = 1.0) -> bool:
        step, window = slack * room.step, slack * WINDOW_SHARE * room.windows
        return all(size.of(part) <= step and (not streamed or size.window(part) <= window) for part in parts)

    kinds = [list(same) for _, same in groupby(heads, lambda h: h.kind)]
    ways = [[part for kind in kinds for part in parts_of(kind, n)] for n in part_sizes(max(map(len, kinds)))]
    saved = Checkpoint.saved(run.out)
    for parts in ways:
        if any(part_token(token, n, parts) == key for n, key in saved.items()) and fits(parts, RESUME_SLACK):
            return parts
    for parts in ways:
        if fits(parts):
            return parts
    here = choice.tier == "device" or not room.gpu  # whether features are kept where training runs
    need = max(size.of(p) + (2 * size.window(p) if streamed else features * here) for p in ways[-1])
    if need > room.where_trained:
        raise UserError(
            f"hosts.{run.name}: training a single classifier needs {sized(need)} of memory; "
            f"{sized(room.where_trained)} are available; lower hosts.{run.name}.optimiser.batch_size ({size.batch}), "
            "or raise the memory limit"
        )
    return ways[-1]


def part_token(token: str, number: int, parts: list[list[HeadSetting]]) -> str:
    """The token of a part's saved step. Training resumes only if it is unchanged."""
    return sha256(f"{token} part {number} of {len(parts)}, by seed and donor".encode()).hexdigest()
