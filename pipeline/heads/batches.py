"""Plans the batches of stage II: the cache rows of any step, for every seed and donor, without reading data.

Receivers are drawn class-balanced, donors instance-wise (as in the paper), balanced or reverse. Each draw picks a
training sample, then one of its views uniformly. Receivers and donors may be read under different statistics.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from inspect import signature
from typing import Any

import numpy as np
import pyarrow as pa

from h2t.cache.format.row_index import RowIndex, index_of
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.many_streams import ManyGenerators, at_once
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.data.classes import ClassIndex, class_index

RECEIVER = "balanced"
#: Samplers are asked for at most as many draws as there are training samples, or this many if that is more. Any usual
#: batch size is drawn in full, and a batch size of a billion costs nothing.
MOST_DRAWN = 8192
DRAWN_TOGETHER = 2**16  # numbers; more would not fit the processor's cache


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
    """The cache rows of n samples, sorted by label: `views[i]` of them, from row `first[i]` on.

    `first`, `views` and `samples` (the sample numbers) are (n,), of small integer types: with one view a sample, 8
    bytes a sample in all. The first `ends[0]` samples have label `classes[0]`, those up to `ends[1]` label
    `classes[1]`, and so on; both int64 (classes that occur,).
    """

    first: np.ndarray
    views: np.ndarray
    samples: np.ndarray
    classes: np.ndarray
    ends: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Samples of each of `classes`, int64."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def several_views(self) -> bool:
        """Whether any sample has more than one."""
        return int(self.views.max()) > 1

    @property
    def labels(self) -> np.ndarray:
        """The label of each sample, int64 (n,); made anew at each call."""
        return np.repeat(self.classes, self.counts)

    def labels_of(self, places: np.ndarray) -> np.ndarray:
        """The labels of the samples at `places`, int64, of the same shape."""
        return self.classes[np.searchsorted(self.ends, places, side="right")]


def sample_rows(rows: RowIndex | pa.Table, split: str, statistics: str) -> SampleRows:
    """The rows of `split` under `statistics`, one entry per sample, in cache order. Raises UserError without any.

    `rows` is the index of a cache, or a row table.
    """
    index = rows if isinstance(rows, RowIndex) else index_of(rows)
    part = index.part(split, statistics)
    if part is None:
        raise UserError(
            f"cache: has no {split} rows under {statistics!r} statistics (it has: "
            f"{', '.join(index.statistics(split)) or 'none'}); add the recipe to extract.batchnorm and extract again"
        )
    size = part.stop - part.start
    samples = index.samples[part.start : part.stop]
    classes, borders = index.runs(part)
    again = np.append(False, samples[1:] == samples[:-1])
    again[borders[:-1]] = False
    small = np.int32 if len(index.samples) <= np.iinfo(np.int32).max else np.int64
    if not again.any():  # the usual case, for which nothing is copied
        first, views = np.arange(part.start, part.stop, dtype=small), np.broadcast_to(np.int64(1), size)
        ends = borders[1:]
    else:
        starts = _places(~again, small)
        views, samples, first = np.diff(starts, append=np.array([size], small)), samples[starts], starts + part.start
        ends = np.searchsorted(starts, borders[1:])
    if index.rows is not None:
        first = index.rows[first]
    return SampleRows(first, views, samples, classes, ends)


def _places(mask: np.ndarray, kind: type[np.signedinteger[Any]]) -> np.ndarray:
    """Where `mask` is True, as `np.flatnonzero`, in a smaller type and without a large array in between."""
    block = 2**22
    pieces = ((np.flatnonzero(mask[at : at + block]) + at).astype(kind) for at in range(0, len(mask), block))
    return np.concatenate(list(pieces))


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
    def size(self) -> int:
        """How many rows the step needs, each as often as it was drawn."""
        return self.receivers.size + self.donors.size + self.partners.size

    @property
    def rows(self) -> np.ndarray:
        """All rows that the step needs, int64, flat."""
        return np.concatenate([part.ravel() for part in (self.receivers, self.donors, self.partners)])


def _every_row(table: SampleRows) -> np.ndarray:
    """All views of all samples, int64, in order."""
    starts = np.cumsum(table.views) - table.views
    return np.repeat(table.first - starts, table.views) + np.arange(int(table.views.sum()))


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
        rows: RowIndex | pa.Table,
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
        index = rows if isinstance(rows, RowIndex) else index_of(rows)
        under = dict.fromkeys([receiver_statistics, *donor_statistics.values()])
        used = {statistics: sample_rows(index, "train", statistics) for statistics in under}
        self.receivers = used[receiver_statistics]
        self._donors = {donor: used[statistics] for donor, statistics in donor_statistics.items()}
        samplers = (receiver, *donor_statistics, *((partner,) if partner else ()))
        self._draws = {sampler: law(sampler, epochs) for sampler in samplers}
        self._at_once = {s for s in samplers if getattr(plugins.load("samplers", s), "AT_ONCE", False)}
        self.index: ClassIndex = class_index(self.receivers.classes, class_names, self.receivers.counts)
        self.samples = self.index.samples
        self.batch_size = min(batch_size, self.samples)
        # Samplers count in whole batches, so a whole one is drawn, and cut at the end of the epoch.
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
    def order_bytes(self) -> int:
        """Bytes that samplers keep of a seed: the order of an epoch's samples, of each that draws by one."""
        samplers = (self._receiver, *self.donors, *((self.partner,) if self.partner else ()))
        return np.dtype(np.int32).itemsize * self.samples * sum(s not in self._at_once for s in samplers)

    @property
    def _tables(self) -> list[SampleRows]:
        """The receivers' rows and the donors', each once; those of different statistics have no row in common."""
        return list({id(table): table for table in (self.receivers, *self._donors.values())}.values())

    @property
    def count(self) -> int:
        """Number of the rows that batches can contain."""
        return sum(int(table.views.sum()) for table in self._tables)

    @property
    def rows(self) -> np.ndarray:
        """Every row that a batch can contain, int64, ascending."""
        return np.sort(np.concatenate([_every_row(table) for table in self._tables]))

    def batch(self, epoch: int, step: int) -> Batch:
        """The rows of `step` of `epoch`, both from 0; an epoch has `steps` steps."""
        return self.batches(epoch, [step])[0]

    def batches(self, epoch: int, steps: Sequence[int]) -> list[Batch]:
        """`batch` of each of `steps`, which ascend, in less time than one by one."""
        assert list(steps) == sorted(steps)
        whole = self.samples // self.batch_size  # steps of full size
        full, cut = [s for s in steps if s < whole], [s for s in steps if s >= whole]
        length = max(1, DRAWN_TOGETHER // (len(self.seeds) * self.batch_size))
        blocks = [(full[at : at + length], self.batch_size) for at in range(0, len(full), length)]
        blocks += [(cut, self.samples - whole * self.batch_size)] if cut else []
        return [batch for some, size in blocks for batch in self._block(epoch, some, size)]

    def _block(self, epoch: int, steps: Sequence[int], size: int) -> Iterator[Batch]:
        """The batches of `steps`, which all have `size` receivers."""
        receivers, samples = self._picked("receiver", self._receiver, self.receivers, epoch, steps, size)
        none = np.empty((len(steps), 0, size), np.int64)
        partners, mates = none, none
        if self.partner:
            partners, mates = self._picked("partner", self.partner, self.receivers, epoch, steps, size)
        donors = np.empty((len(steps), len(self.seeds), len(self._donors), size), np.int64)
        for number, (name, table) in enumerate(self._donors.items()):
            donors[:, :, number] = self._picked("donor", name, table, epoch, steps, size)[0]
        label_of = self.receivers.labels_of
        parts = (receivers, label_of(samples), donors, samples, partners, label_of(mates))
        return (Batch(*of_step) for of_step in zip(*parts, strict=True))

    def _picked(
        self, branch: str, sampler: str, table: SampleRows, epoch: int, steps: Sequence[int], size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, positions of their samples in `table`) of each step and seed, int64 (steps, seeds, size) each."""
        draw = self._draws[sampler]
        if sampler in self._at_once:

            def drawn(draws: np.random.Generator | ManyGenerators) -> np.ndarray:
                return draw(self.index, lambda *key: draws, epoch, 0, self._drawn)[..., :size]

            positions = at_once(self.seeds, (branch, sampler, epoch), steps, drawn)
        else:
            streams = [_named_streams(seed, branch, sampler) for seed in self.seeds]
            positions = np.array(
                [[draw(self.index, own, epoch, s, self._drawn)[:size] for own in streams] for s in steps]
            )
        rows = table.first[positions].astype(np.int64)
        if table.several_views:
            views = table.views[positions].astype(np.int64)
            rows += at_once(
                self.seeds, (branch, sampler, "view", epoch), steps, lambda draws, of: draws.integers(of), views
            )
        return rows, positions
