"""Which images each batch of stage I holds: those of the epoch's order, mixup's partners, and a second sampler's."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from h2t.pipeline.base.seeds import stream, torch_seed
from h2t.pipeline.data.classes import ClassIndex
from h2t.pipeline.training.settings import Training

#: CMO's first epoch, counted from 0, and the number of last epochs without it, as in the authors' code.
CMO_FIRST, CMO_REST = 4, 3

#: Exponent of the reverse sampler of a second branch (BBN), as `cmo_power`: classes in proportion to 1 / n.
REVERSE = 2.0


@dataclass(frozen=True)
class Second:
    """The images of a second sampler for a batch, or for a part of it: sample numbers, (B,).

    `view` names the views of these images. CMO pastes a `rectangle` of them, given by its share and its centre; without
    one they are the batch of a second branch.
    """

    samples: np.ndarray
    view: tuple[str, int]
    rectangle: tuple[float, tuple[float, float]] | None = None


@dataclass(frozen=True)
class Part:
    """One part of a batch. With mixup, `share` of each image is mixed with 1 - `share` of its partner.

    With two branches that train on a batch each, `share` is that of the first.
    """

    samples: np.ndarray  # sample numbers, (B,)
    share: float
    partner: np.ndarray  # position in this part of the image that is mixed in, (B,)
    weight: float  # size of the part / size of the batch
    seed: int  # of the objective's random draws
    second: Second | None = None


def rectangle(share: float, centre: tuple[float, float], height: int, width: int) -> tuple[slice, slice]:
    """(rows, columns) of CutMix's rectangle (Yun et al., ICCV 2019, eq. (2)), for images of `height` x `width` pixels.

    Its sides are sqrt(1 - `share`) of the image's, its `centre` (x, y) is in [0, 1); it is clipped at the edges.
    """

    def side(middle: float, length: int) -> slice:
        half = int(length * math.sqrt(1 - share)) // 2
        at = int(middle * length)
        return slice(max(at - half, 0), min(at + half, length))

    return side(centre[1], height), side(centre[0], width)


@dataclass
class Batches:
    """The batches of all epochs. Every process of a training draws the same.

    `train`: the training samples, sorted by class, (n,). `classes`: where each class lies in them.
    `first_branch_share`: see `Objective`.
    """

    params: Training
    train: np.ndarray
    classes: ClassIndex
    first_branch_share: Callable[[float], float | None]
    seed: int

    def of(self, epoch: int) -> Iterator[list[Part]]:
        """Every batch of an epoch, split into parts."""
        params = self.params
        draws = stream(self.seed, "stage1", "epoch", epoch)
        order = self.train[draws.permutation(len(self.train))]
        for step, first in enumerate(range(0, len(order), params.batch_size)):
            batch = order[first : first + params.batch_size]
            if len(batch) == 1 or (params.drop_last and len(batch) < params.batch_size):
                continue  # batch norm cannot train on one image
            first_branch = self.first_branch_share(epoch / params.epochs)
            if first_branch is None:
                share = float(draws.beta(params.mixup, params.mixup)) if params.mixup else 1.0
                second = self._pasted(epoch, step, len(batch))
            else:
                share, second = first_branch, self._second_batch(epoch, step, len(batch))
            pieces = np.array_split(np.arange(len(batch)), min(params.accumulate, len(batch) // 2))
            yield [
                Part(
                    batch[piece],
                    share,
                    draws.permutation(len(piece)) if params.mixup else np.arange(len(piece)),
                    len(piece) / len(batch),
                    torch_seed(self.seed, "stage1", "noise", epoch, step, number),
                    second and replace(second, samples=second.samples[piece]),
                )
                for number, piece in enumerate(pieces)
            ]

    def _second_batch(self, epoch: int, step: int, size: int) -> Second:
        """The batch of a second branch, of `size` images. Drawn from a stream of its own."""
        draws = stream(self.seed, "stage1", "second", epoch, step)
        return Second(self._drawn(draws, size, REVERSE), ("second", step))

    def _pasted(self, epoch: int, step: int, size: int) -> Second | None:
        """What CMO pastes into a batch of `size`, if anything. Drawn from a stream of its own."""
        params = self.params
        if not params.cmo or not CMO_FIRST <= epoch < params.epochs - CMO_REST:
            return None
        draws = stream(self.seed, "stage1", "cmo", epoch, step)
        if draws.random() >= params.cmo:
            return None
        share, *centre = draws.random(3).tolist()
        second = self._drawn(draws, size, params.cmo_power)
        return Second(second, ("cmo", step), (share, (centre[0], centre[1])))

    def _drawn(self, draws: np.random.Generator, size: int, power: float) -> np.ndarray:
        """`size` training samples, each drawn in proportion to n^-`power`, n the images of its class."""
        classes = self.classes
        share = (classes.counts / classes.counts.min()) ** (1 - power)
        drawn: np.ndarray = self.train[classes.drawn(draws, share, size)]
        return drawn
