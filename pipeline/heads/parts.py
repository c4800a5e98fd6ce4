"""Splits the heads of a host into parts whose training steps fit the memory, and into shares for several processes.

Heads do not depend on each other, so training part by part gives the same heads.
"""

from collections.abc import Sequence
from hashlib import sha256
from itertools import groupby, pairwise

from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.residency import WINDOW_SHARE, Choice, Room
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.heads.stack import FLOAT
from h2t.pipeline.heads.step_size import StepSize
from h2t.pipeline.training.resume import Checkpoint

RESULT_COPIES = 3  # copies of all weights in memory: one collected, two while writing
RESUME_SLACK = 1.5  # a step may exceed its budget by this factor, so that training can resume in the same parts


def grouped(heads: Sequence[HeadSetting]) -> list[int]:
    """The places of `heads`, sorted by seed and donor: a stack trains such an order without moving its weights."""
    return sorted(range(len(heads)), key=lambda place: (heads[place].seed, heads[place].donor))


def parts_of(heads: Sequence[HeadSetting], size: int) -> list[list[HeadSetting]]:
    """Splits `heads` in order into parts of `size`; the last may be smaller."""
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
