"""Where features live while heads train: on the device, in host memory, or streamed with a hot set.

Every tier gives the same batches with the same values; only time and memory differ. In the streaming tier a window of
steps is planned, the rows it needs are read once, in the background, while the window before it trains. Class-balanced
draws come back to the small classes again and again, so their rows stay in memory, as many as the budget allows. On a
GPU windows and hot set lie there: each row goes over once a window, and batches are gathered where heads train.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch

from h2t.cache.memory import available_memory, return_freed_arrays
from h2t.cache.read.prefetch import in_background
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Bytes, Section
from h2t.pipeline.heads.batches import Batch, Streams
from h2t.pipeline.heads.features import CPU, FeatureReader, FeatureTable

Tier = Literal["device", "memory", "stream"]

#: Shares of a streaming budget: each of the two windows (the one in use and the one being read), the hot set, and at
#: most so much of it for a step's own tensors.
WINDOW_SHARE = 0.25
HOT_SHARE = 0.5
OWN_SHARE = 0.25
MAX_WINDOW_STEPS = 64
#: Shares of the memory that is available when training starts: features in host memory, features on a GPU. A training
#: step gets half of what features leave, up to `MOST_STEP_BYTES`; the rest is for all else.
HOST_SHARE = 0.5
DEVICE_SHARE = 0.8
MOST_HOST_SHARE = 0.75  # for features, whatever `memory_bytes` says
MOST_STEP_BYTES = 2 * 1024**3
RESERVE = 128 * 1024**2  # of host memory, for what torch loads at its first step (80 MB) and the like


class Residency(Section):
    """Section `train_classifier`: where features live while classifiers train. It changes no result."""

    residency: Literal["auto", "device", "memory", "stream"] = "auto"
    """Keep features on the device, in host memory, or stream them from the cache; `auto` takes the first that fits."""
    memory_bytes: Bytes | None = None
    """Budget for features in host memory, in bytes; null is half of what is available."""
    stack_bytes: Bytes | None = None
    """Budget of a training step, in bytes; a larger stack is trained in parts. Null is a quarter, at most 2 GiB."""
    pooled: bool = True
    """Pool maps as they are read, where the pool allows it; false keeps whole maps."""


@dataclass(frozen=True)
class Room:
    """The memory that stage II plans with, in bytes.

    `host` and `gpu` are what is available now (0 without a GPU). `features` is the budget for features in host memory,
    `on_gpu` for features on a GPU, `step` for a training step.
    """

    host: int
    gpu: int
    features: int
    on_gpu: int
    step: int

    @property
    def where_trained(self) -> int:
        """What is available where heads train."""
        return self.gpu or self.host

    @property
    def windows(self) -> int:
        """The budget for features that are streamed; on a GPU windows and hot set lie there."""
        return min(self.features, self.on_gpu or self.features)


def find_room(settings: Residency, device: torch.device) -> Room:
    """What `settings` ask for, within what is available now; where that is little, memory is freed at once."""
    host = max(0, available_memory() - RESERVE)
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    features = min(settings.memory_bytes or int(HOST_SHARE * host), int(MOST_HOST_SHARE * host))
    on_gpu = int(DEVICE_SHARE * gpu)
    left = gpu - on_gpu if gpu else host - features
    step = min(settings.stack_bytes or min(MOST_STEP_BYTES, left // 2), gpu or host)
    if host < 2 * MOST_STEP_BYTES:
        return_freed_arrays()
    return Room(host, gpu, features, on_gpu, step)


@dataclass(frozen=True)
class Choice:
    """A tier and the reason for it, in one line."""

    tier: Tier
    reason: str


def choose_tier(wanted: Literal["auto", "device", "memory", "stream"], need: int, budget: int, free: int) -> Choice:
    """The tier for `need` bytes of features, `budget` bytes of host memory and `free` bytes on the device (0: none)."""
    size, room = f"{need / 1e9:.2f} GB of features", f"a budget of {budget / 1e9:.2f} GB"
    if wanted != "auto":
        return Choice(wanted, f"{size}, tier as asked")
    if need <= free:
        return Choice("device", f"{size} fit the device")
    if need <= budget:
        return Choice("memory", f"{size} fit {room}")
    return Choice("stream", f"{size} exceed {room}")


def hot_samples(streams: Streams, row_bytes: int, budget: int) -> tuple[np.ndarray, float]:
    """(rows of the smallest classes that fit `budget` bytes, expected share of receivers' draws they serve).

    A class that fits in part is kept in part. The share is exact: classes are drawn uniformly, then their samples.
    """
    first, views = streams.receivers.first, streams.receivers.views
    room = budget // row_bytes
    rows: list[np.ndarray] = []
    share = 0.0
    for label in np.argsort(streams.index.counts, kind="stable").tolist():
        start, count = int(streams.index.starts[label]), int(streams.index.counts[label])
        ends = np.cumsum(views[start : start + count])
        kept = int(np.searchsorted(ends, room, side="right"))
        if kept:
            base = int(first[start])
            rows.append(np.arange(base, base + int(ends[kept - 1])))
            room -= int(ends[kept - 1])
            share += kept / count / streams.index.classes
        if kept < count:
            break
    return (np.sort(np.concatenate(rows)) if rows else np.empty(0, np.int64)), share


class Step(NamedTuple):
    """One step of training: its batch, and the table that holds the batch's rows."""

    epoch: int
    step: int
    batch: Batch
    table: FeatureTable


Window = tuple[int, int, list[Batch], FeatureTable]  # epoch, first step, batches, their rows


class Feed:
    """The batches of stage II with their features, in the tier that `choice` names.

    `say` gets one line about the choice. `meter` counts what it costs. Windows are planned for steps of `step_rows`
    rows, by default those of a step of all seeds and donors.
    """

    def __init__(
        self,
        streams: Streams,
        reader: FeatureReader,
        choice: Choice,
        budget: int,
        device: torch.device,
        say: Callable[[str], None],
        *,
        dtype: torch.dtype = torch.float32,
        step_rows: int | None = None,
    ) -> None:
        self.streams, self.reader, self.choice, self.meter = streams, reader, choice, reader.meter
        self.device, self.dtype = device, dtype
        self.experts, self.shape = reader.cache.experts, reader.shape
        self.expected_hit_rate: float | None = None
        self._window = 1
        self._hot_rows = np.empty(0, np.int64)
        if choice.tier == "stream":
            self._start_streaming(budget, step_rows or streams.step_rows)
            share = 100 * (self.expected_hit_rate or 0)
            hot = f"hot set of {len(self._hot_rows)} rows, expected hit rate {share:.1f} %"
            say(f"residency: stream ({choice.reason}); windows of {self._window} steps, {hot}")
        else:
            values = reader.read(streams.rows, device if choice.tier == "device" else CPU)
            self._table = FeatureTable(streams.rows, values, dtype, device)
            say(f"residency: {choice.tier} ({choice.reason})")

    def of(self, seeds: Sequence[int], donors: Sequence[str]) -> "Feed":
        """The same feed for some of the seeds and donors: their batches alone are read and gathered."""
        some = copy(self)
        some.streams = self.streams.of(seeds, donors)
        return some

    @property
    def maps(self) -> bool:
        """Whether features are whole maps (C, H, W), not pooled vectors (C,)."""
        return len(self.shape) == 3

    @property
    def cost(self) -> str:
        """The stall meter in words."""
        meter = self.meter
        text = f"read {meter.bytes_read / 1e6:.1f} MB for {meter.bytes_used / 1e6:.1f} MB used"
        if meter.hit_rate is None:
            return text
        rate = f"hit rate {100 * meter.hit_rate:.1f} % (expected {100 * (self.expected_hit_rate or 0):.1f} %)"
        return f"{text}, waited {100 * meter.stall:.0f} % of the time, {rate}"

    def steps(self, epochs: int, first_epoch: int = 0, first_step: int = 0) -> Generator[Step]:
        """Every step up to `epochs`, from the given one on. Reading ahead does not stop at the end of an epoch.

        Whoever keeps a step after its use keeps a window, the third, in memory.
        """
        spec = self.reader.cache.spec
        row_bytes = sum(spec.row_bytes(expert) for expert in range(spec.experts))
        windows = self._planned(epochs, first_epoch, first_step)
        for window in in_background(windows, meter=self.meter) if self.choice.tier == "stream" else windows:
            epoch, begin, batches, table = window if isinstance(window, tuple) else window()
            for step, batch in enumerate(batches, begin):
                self.meter.bytes_used += (batch.receivers.size + batch.donors.size) * row_bytes
                yield Step(epoch, step, batch, table)
            del window, batches, table  # before the next but one is read: two windows at a time

    def _planned(self, epochs: int, first_epoch: int, first_step: int) -> Iterator[Callable[[], Window]]:
        """One job per window; a window never crosses epochs."""
        load = self._stream if self.choice.tier == "stream" else self._resident
        for epoch in range(first_epoch, epochs):
            begin = first_step if epoch == first_epoch else 0
            for start in range(begin, self.streams.steps, self._window):
                yield partial(load, epoch, range(start, min(start + self._window, self.streams.steps)))

    def _resident(self, epoch: int, steps: range) -> Window:
        return epoch, steps.start, [self.streams.batch(epoch, step) for step in steps], self._table

    def _start_streaming(self, budget: int, step_rows: int) -> None:
        row_bytes = self.reader.row_bytes
        per_step = step_rows * row_bytes
        self._window = int(max(1, min(MAX_WINDOW_STEPS, WINDOW_SHARE * budget // per_step)))
        # A step's rows as the numbers that heads compute with, and once more fused.
        own = 2 * per_step * self.dtype.itemsize // self.reader.dtype.itemsize
        own = min(own, int(OWN_SHARE * budget))
        left = max(0, min(int(HOT_SHARE * budget), budget - 2 * self._window * per_step - own))
        self._hot_rows, self.expected_hit_rate = hot_samples(self.streams, row_bytes, left)
        values = self.reader.read(self._hot_rows, self.device)
        self._hot = FeatureTable(self._hot_rows, values, self.dtype, self.device)

    def _stream(self, epoch: int, steps: range) -> Window:
        """The batches of a window and the features of their rows, each row once; hot rows are in memory already."""
        batches = [self.streams.batch(epoch, step) for step in steps]
        rows = np.unique(np.concatenate([part.ravel() for b in batches for part in (b.receivers, b.donors)]))
        rows = np.setdiff1d(rows, self._hot_rows, assume_unique=True)
        values = self.reader.read(rows, self.device)
        for batch in batches:
            self.meter.draws += batch.receivers.size
            self.meter.hits += int(np.isin(batch.receivers, self._hot_rows).sum())
        return epoch, steps.start, batches, FeatureTable(rows, values, self.dtype, self.device, self._hot)


def plan_tier(streams: Streams, reader: FeatureReader, settings: Residency, room: Room) -> Choice:
    """The tier that there is room for. Raises UserError for one that was asked for and cannot fit."""
    need = len(streams.rows) * reader.row_bytes
    choice = choose_tier(settings.residency, need, room.features, room.on_gpu)
    on_gpu = room.gpu > 0 and choice.tier == "device"
    most = room.gpu if on_gpu else int(MOST_HOST_SHARE * room.host)
    if choice.tier != "stream" and need > most:
        raise UserError(
            f"train_classifier.residency: {choice.tier} needs {need / 1e9:.2f} GB for the features, "
            f"{most / 1e9:.2f} GB can be used; set it to auto or stream"
        )
    return choice
