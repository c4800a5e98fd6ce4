"""Where features live while heads train: on the device, in host memory, or streamed from the cache with a hot set.

Every tier gives the same batches with the same values; only time and memory differ. The streaming tier plans a window
of several steps and reads each row it needs once, in the background, while the previous window trains. Class-balanced
draws return to the small classes again and again, so rows of these stay in memory, as many as the budget allows: the
hot set. On a GPU, windows and hot set are kept there: a row is copied once per window, and batches are gathered on it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from h2t.cache.memory import available_memory, return_freed_arrays
from h2t.cache.read.prefetch import in_background
from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Bytes, Count, Section
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.batches import Batch, Streams
from h2t.pipeline.heads.draws import Draws
from h2t.pipeline.heads.features import CPU, FeatureReader, FeatureTable

Tier = Literal["device", "memory", "stream"]

#: Shares of a streaming budget: each of the two windows (one in use, one being read), the hot set, and at most this
#: share for the tensors of a step.
WINDOW_SHARE = 0.25
HOT_SHARE = 0.5
OWN_SHARE = 0.25
MAX_WINDOW_STEPS = 64
#: Shares of the memory that is available when training starts: for features in host memory, and for features on a GPU.
#: A training step gets half of what is left, at most `MOST_STEP_BYTES`.
HOST_SHARE = 0.5
DEVICE_SHARE = 0.8
MOST_HOST_SHARE = 0.75  # for features, even if `memory_bytes` is more
MOST_STEP_BYTES = 2 * 1024**3
RESERVE = 128 * 1024**2  # bytes of host memory that are not planned with: torch loads 80 MB at its first step


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
    processes: Count = 1
    """How many processes train the classifiers of a host, each a share; one for each GPU. Each reads features."""


@dataclass(frozen=True)
class Room:
    """The memory that stage II plans with, in bytes.

    `host` and `gpu`: available now (0 without a GPU). `features`: budget for features in host memory; `on_gpu`: for
    features on a GPU; `step`: for a training step.
    """

    host: int
    gpu: int
    features: int
    on_gpu: int
    step: int

    @property
    def where_trained(self) -> int:
        """Bytes available on the device that trains."""
        return self.gpu or self.host

    @property
    def windows(self) -> int:
        """The budget for streamed features. With a GPU they must fit there too: windows and hot set are kept on it."""
        return min(self.features, self.on_gpu or self.features)


def host_room() -> int:
    """Bytes of host memory that can be planned with now."""
    return max(0, available_memory() - RESERVE)


def find_room(settings: Residency, device: torch.device, host: int | None = None) -> Room:
    """The budgets of `settings`, within `host` bytes of host memory, by default what is available now.

    If that is little, freed arrays are returned at once.
    """
    host = host_room() if host is None else host
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
    """A tier, and the reason for it in one line."""

    tier: Tier
    reason: str


def choose_tier(wanted: Tier | Literal["auto"], need: int, budget: int, free: int) -> Choice:
    """The tier for `need` bytes of features.

    `budget`: bytes of host memory for features; `free`: bytes for them on a GPU, 0 without one.
    """
    if wanted != "auto":
        return Choice(wanted, f"{sized(need)}, as set in train_classifier.residency")
    if need <= free:
        return Choice("device", f"{sized(need)} of {sized(free)} allowed")
    if need <= budget:
        return Choice("memory", f"{sized(need)} of {sized(budget)} allowed")
    return Choice("stream", f"{sized(need)} exceed the {sized(budget)} allowed")


def hot_samples(streams: Streams, row_bytes: int, budget: int) -> tuple[np.ndarray, float]:
    """(rows of the smallest classes that fit `budget` bytes, expected share of the receivers' draws among these rows).

    The last class may be kept in part. The expectation is exact for class-balanced draws: a class, then one of its
    samples, both uniformly. Rows: int64, ascending.
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


@dataclass(frozen=True)
class Step:
    """One training step: its batch, the table that holds the features of the batch's rows, and what else it draws."""

    epoch: int
    step: int
    batch: Batch
    table: FeatureTable
    draws: Draws | None = None


Draw = Callable[[list[Step]], list[Draws]]  # what the steps of a window draw


class Feed:
    """Provides the batches of stage II with their features, in the tier of `choice`.

    `budget`: bytes for streamed features. `say` gets one line about the choice. `step_rows`: rows of a step, by which
    windows are planned; by default those of a step of all seeds and donors. The attribute `meter` counts the cost.
    """

    def __init__(
        self,
        streams: Streams,
        reader: FeatureReader,
        choice: Choice,
        budget: int,
        device: torch.device,
        say: Say,
        *,
        dtype: torch.dtype = torch.float32,
        step_rows: int | None = None,
    ) -> None:
        self.streams, self.reader, self.choice, self.meter = streams, reader, choice, reader.meter
        self.device, self.dtype = device, dtype
        self.experts, self.shape = reader.cache.experts, reader.shape
        self.expected_hit_rate: float | None = None
        self._window = MAX_WINDOW_STEPS
        self._hot_rows = np.empty(0, np.int64)
        if choice.tier == "stream":
            self._start_streaming(budget, step_rows or streams.step_rows)
            share = 100 * (self.expected_hit_rate or 0)
            hot = f"hot set of {counted(len(self._hot_rows), 'row')}, expected hit rate {share:.1f} %"
            say(f"features streamed ({choice.reason}): windows of {counted(self._window, 'step')}, {hot}")
        else:
            values = reader.read(streams.rows, device if choice.tier == "device" else CPU)
            self._table = FeatureTable(streams.rows, values, dtype, device)
            say(f"features {'on the device' if choice.tier == 'device' else 'in memory'}: {choice.reason}")

    def of(self, seeds: Sequence[int], donors: Sequence[str]) -> "Feed":
        """The same feed restricted to some of the seeds and donors: only their batches are read and gathered."""
        some = copy(self)
        some.streams = self.streams.of(seeds, donors)
        return some

    @property
    def maps(self) -> bool:
        """Whether features are whole maps (C, H, W), not pooled vectors (C,)."""
        return len(self.shape) == 3

    @property
    def cost(self) -> str:
        """The cost of reading features, in words, for the terminal."""
        meter = self.meter
        text = f"read {sized(meter.bytes_read)} of the cache for batches of {sized(meter.bytes_used)} in all"
        if meter.hit_rate is None:
            return text
        rate = f"hit rate {100 * meter.hit_rate:.1f} % (expected {100 * (self.expected_hit_rate or 0):.1f} %)"
        return f"{text}, waited {100 * meter.stall:.0f} % of the time, {rate}"

    def steps(
        self,
        epochs: int,
        first_epoch: int = 0,
        first_step: int = 0,
        draw: Draw | None = None,
        most: int = MAX_WINDOW_STEPS,
    ) -> Generator[Step]:
        """Yields every step from the given one to the end of the last of `epochs`.

        A thread prepares windows of at most `most` steps ahead, also across epochs: rows, their features and, by
        `draw`, what else steps draw. A caller must drop a step before it asks for the next one, or a third window stays
        in memory.
        """
        row_bytes = self.reader.cache.spec.row_bytes_in_all
        windows = self._planned(epochs, first_epoch, first_step, draw, most)
        streamed = self.choice.tier == "stream"
        for window in in_background(windows, meter=self.meter if streamed else None):
            while window:  # each step is dropped before the next window is read: at most two windows at a time
                at = window.pop(0)
                self.meter.bytes_used += at.batch.size * row_bytes
                yield at
                del at

    def _planned(
        self, epochs: int, first_epoch: int, first_step: int, draw: Draw | None, most: int
    ) -> Iterator[Callable[[], list[Step]]]:
        """Yields one function per window that loads it. A window lies within one epoch."""
        length = min(self._window, most)
        for epoch in range(first_epoch, epochs):
            begin = first_step if epoch == first_epoch else 0
            for start in range(begin, self.streams.steps, length):
                yield partial(self._load, epoch, range(start, min(start + length, self.streams.steps)), draw)

    def _load(self, epoch: int, steps: range, draw: Draw | None = None) -> list[Step]:
        """The steps of a window."""
        batches = self.streams.batches(epoch, steps)
        table = self._read(batches) if self.choice.tier == "stream" else self._table
        window = [Step(epoch, step, batch, table) for step, batch in zip(steps, batches, strict=True)]
        return [replace(at, draws=d) for at, d in zip(window, draw(window), strict=True)] if draw else window

    def _start_streaming(self, budget: int, step_rows: int) -> None:
        """Chooses the length of windows and reads the hot set."""
        row_bytes = self.reader.row_bytes
        per_step = step_rows * row_bytes
        self._window = int(max(1, min(MAX_WINDOW_STEPS, WINDOW_SHARE * budget // per_step)))
        # The rows of a step in the dtype of training, gathered and fused.
        own = 2 * per_step * self.dtype.itemsize // self.reader.dtype.itemsize
        own = min(own, int(OWN_SHARE * budget))
        left = max(0, min(int(HOT_SHARE * budget), budget - 2 * self._window * per_step - own))
        self._hot_rows, self.expected_hit_rate = hot_samples(self.streams, row_bytes, left)
        values = self.reader.read(self._hot_rows, self.device)
        self._hot = FeatureTable(self._hot_rows, values, self.dtype, self.device)

    def _read(self, batches: list[Batch]) -> FeatureTable:
        """Reads the features of the rows of a window. Hot rows are in memory already."""
        rows = np.unique(np.concatenate([batch.rows for batch in batches]))
        rows = np.setdiff1d(rows, self._hot_rows, assume_unique=True)
        values = self.reader.read(rows, self.device)
        for batch in batches:
            self.meter.draws += batch.receivers.size
            self.meter.hits += int(np.isin(batch.receivers, self._hot_rows).sum())
        return FeatureTable(rows, values, self.dtype, self.device, self._hot)


def plan_tier(streams: Streams, reader: FeatureReader, settings: Residency, room: Room) -> Choice:
    """The tier that memory allows. Raises UserError if the tier set in `settings` does not fit."""
    need = streams.count * reader.row_bytes
    choice = choose_tier(settings.residency, need, room.features, room.on_gpu)
    on_gpu = room.gpu > 0 and choice.tier == "device"
    most = room.gpu if on_gpu else int(MOST_HOST_SHARE * room.host)
    if choice.tier != "stream" and need > most:
        raise UserError(
            f"train_classifier.residency: {choice.tier} needs {sized(need)} for the features, "
            f"{sized(most)} can be used; set it to auto or stream"
        )
    return choice
