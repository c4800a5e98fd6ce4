"""Plans the batches of stage II: the cache rows of any step, for every seed and donor, without reading data.

Receivers are drawn class-balanced, donors instance-wise (as in the paper), balanced or reverse. Each draw picks a
training sample, then one of its views uniformly. Receivers and donors may be read under different statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.many_streams import start
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.data.classes import ClassIndex, class_index

RECEIVER = "balanced"
#: Samplers are asked for at most as many draws as there are training samples, or this many if that is more. Any usual
#: batch size is drawn in full, and a batch size of a billion costs nothing.
MOST_DRAWN = 8192


@lru_cache(maxsize=1024)
def _named_streams(seed: int, branch: str, sampler: str) -> Callable[..., np.random.Generator]:
    """Cached per name, so a sampler can reuse what it drew, such as an epoch's permutation."""
    return partial(stream, seed, branch, sampler)


def law(sampler: str, epochs: int) -> Callable[..., np.ndarray]:
    """The function `draw` of a sampler plug-in. One that takes `epochs`, the length of the training, gets it."""
    draw: Callable[..., np.ndarray] = plugins.load("samplers", sampler).draw
    return partial(draw, epochs=epochs) if "epochs" in signature(draw).parameters else draw


@dataclass(frozen=True)
class SampleRows:
    """The cache rows of each sample: `views[i]` of them, from row `first[i]` on. All int64 (n,), sorted by label."""

    first: np.ndarray
    views: np.ndarray
    labels: np.ndarray
    samples: np.ndarray


def sample_rows(rows: pa.Table, split: str, statistics: str) -> SampleRows:
    """The rows of `split` under `statistics`, one entry per sample, in cache order. Raises UserError without any."""
    # Masks rather than expressions, dlpack rather than `to_numpy`: those import Arrow's engine and pandas, 50 MB.
    ours = pc.equal(rows["split"], split)
    part = rows.select(["sample", "row", "label"]).filter(pc.and_(ours, pc.equal(rows["statistics"], statistics)))
    if not len(part):
        has = sorted(set(rows.filter(ours)["statistics"].to_pylist()))
        raise UserError(
            f"cache: has no {split} rows under {statistics!r} statistics (it has: {', '.join(has) or 'none'}); "
            "add the recipe to extract.batchnorm and extract again"
        )
    sample, row, label = (np.from_dlpack(part[name].combine_chunks()) for name in ("sample", "row", "label"))
    starts = np.flatnonzero(np.concatenate([[True], sample[1:] != sample[:-1]]))
    return SampleRows(
        first=row[starts],
        views=np.diff(np.concatenate([starts, [len(sample)]])),
        labels=label[starts].astype(np.int64),
        samples=sample[starts],
    )


@dataclass(frozen=True)
class Batch:
    """One step of every seed: rows of `receivers` and their `labels`, int64 (seeds, B); `donors` (seeds, donors, B).

    `samples` (seeds, B): the places of the receivers among the training samples. `partners`, `partner_labels`: rows and
    labels of the second sampler, (seeds, B), or (0, B) without one.
    """

    receivers: np.ndarray
    labels: np.ndarray
    donors: np.ndarray
    samples: np.ndarray
    partners: np.ndarray
    partner_labels: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """All rows that the step needs, int64, flat."""
        return np.concatenate([part.ravel() for part in (self.receivers, self.donors, self.partners)])


class Streams:
    """The batches of stage II. An epoch draws as many receivers as there are training samples.

    `receiver_statistics`, `donor_statistics` (donor -> statistics): the batch-norm statistics that rows are read under.
    `receiver` and the donors name samplers, as does `partner`, a second sampler of rows under the receivers'
    statistics. `epochs`, the length of the training, is for samplers whose law changes over it. The attribute
    `batch_size` is that of the largest batch: the one asked for, but at most the number of samples. Raises UserError if
    the cache lacks rows under these statistics.
    """

    def __init__(
        self,
        rows: pa.Table,
        class_names: Sequence[str],
        receiver_statistics: str,
        donor_statistics: Mapping[str, str],
        seeds: Sequence[int],
        batch_size: int,
        *,
        receiver: str = RECEIVER,
        partner: str | None = None,
        epochs: int = 1,
    ) -> None:
        self.seeds = list(seeds)
        self._receiver, self.partner = receiver, partner
        self.donors = list(donor_statistics)
        self.receivers = sample_rows(rows, "train", receiver_statistics)
        self._donors = {d: sample_rows(rows, "train", s) for d, s in donor_statistics.items()}
        samplers = (receiver, *donor_statistics, *((partner,) if partner else ()))
        self._draws = {sampler: law(sampler, epochs) for sampler in samplers}
        self.index: ClassIndex = class_index(self.receivers.labels, class_names)
        self.samples = self.index.samples
        self.batch_size = min(batch_size, self.samples)
        self._drawn = min(batch_size, max(self.samples, MOST_DRAWN))
        self.steps = -(-self.samples // self.batch_size)

    def of(self, seeds: Sequence[int], donors: Sequence[str]) -> "Streams":
        """The same batches, restricted to some of the seeds and donors."""
        some = copy(self)
        some.seeds, some.donors = list(seeds), list(donors)
        some._donors = {donor: self._donors[donor] for donor in donors}
        return some

    @property
    def step_rows(self) -> int:
        """Rows that the largest step draws."""
        return len(self.seeds) * (1 + len(self.donors) + bool(self.partner)) * self.batch_size

    @property
    def rows(self) -> np.ndarray:
        """Every row that a batch can contain, int64, ascending."""
        tables = [self.receivers, *self._donors.values()]
        spans = [np.concatenate([f + np.arange(v) for f, v in zip(t.first, t.views, strict=True)]) for t in tables]
        return np.unique(np.concatenate(spans))

    def batches(self, epoch: int, steps: range) -> list[Batch]:
        """The rows of each of `steps`, drawn sooner than one by one."""
        drawn = [("receiver", self._receiver, self.receivers)]
        drawn += [("partner", self.partner, self.receivers)] if self.partner else []
        drawn += [("donor", name, table) for name, table in self._donors.items()]
        keys: list[tuple[Any, ...]] = [(branch, sampler, epoch, steps) for branch, sampler, _ in drawn]
        keys += [(branch, sampler, "view", epoch, steps) for branch, sampler, table in drawn if table.views.max() > 1]
        start(self.seeds, *keys)
        return [self.batch(epoch, step) for step in steps]

    def batch(self, epoch: int, step: int) -> Batch:
        """The rows of `step` of `epoch`, both from 0; an epoch has `steps` steps."""
        size = min(self.batch_size, self.samples - step * self.batch_size)
        picked = [
            self._draw(seed, "receiver", self._receiver, self.receivers, epoch, step, size) for seed in self.seeds
        ]
        receivers, samples = (np.stack(parts) for parts in zip(*picked, strict=True))
        mates = (
            [self._draw(seed, "partner", self.partner, self.receivers, epoch, step, size) for seed in self.seeds]
            if self.partner
            else []
        )
        partners, places = np.array(mates, np.int64).reshape(-1, 2, size).swapaxes(0, 1)
        labels = self.receivers.labels
        donors = [
            [self._draw(seed, "donor", name, table, epoch, step, size)[0] for name, table in self._donors.items()]
            for seed in self.seeds
        ]
        donated = np.array(donors, np.int64).reshape(len(self.seeds), len(self.donors), size)
        return Batch(receivers, labels[samples], donated, samples, partners, labels[places])

    def _draw(
        self, seed: int, branch: str, sampler: str, table: SampleRows, epoch: int, step: int, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, positions of their samples in `table`), int64 (size,) each."""
        # Samplers count in whole batches, so a whole one is drawn, and cut at the end of the epoch.
        streams = _named_streams(seed, branch, sampler)
        positions = self._draws[sampler](self.index, streams, epoch, step, self._drawn)[:size]
        rows = table.first[positions]
        views = table.views[positions]
        if (views > 1).any():
            rows = rows + stream(seed, branch, sampler, "view", epoch, step).integers(views)
        return rows, positions
