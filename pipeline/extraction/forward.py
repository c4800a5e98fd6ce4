"""Forward passes: turns rows into maps in the stored dtype.

Every pass has exactly `batch_size` images. At another size libraries may sum in another order; at a fixed size a row
does not depend on the rows batched with it. A thread decodes the next images in the background. On a GPU a pass is
launched before the maps of the one before have arrived, and maps are converted on the GPU, so fewer bytes are copied.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.pipeline.base.device import choose
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import Precision, guarded_maps
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.views import normalised
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.batchnorm import Statistics
from h2t.pipeline.extraction.row_plan import RowPlan
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.trained import load_backbone

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}

#: Shard -> the numbers of its rows that need a forward pass, ascending, int64.
Todo = Mapping[int, np.ndarray]


def settings(batch_size: int, precision: Precision, device: torch.device) -> dict[str, Any]:
    """The settings that rounding depends on: if they, fingerprint and layout are equal, so are the cache's bytes."""
    return {
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("numcodecs", "numpy", "pillow", "torch", "torchvision")},
    }


@dataclass
class Passes:
    """Cost of the forward passes of this process.

    `images`: images that went through the backbone, including those that fill up a batch. `seconds`: duration of the
    passes; on a GPU its own time, from copying the images to copying the maps. `cpu`: processor seconds of the whole
    process during the passes, which includes decoding in the background; on a GPU, during their launch.
    """

    images: int = 0
    seconds: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True)
class Launched:
    """A forward pass that may still run: its `maps` as computed, and `kept`, the same in the stored dtype.

    One tensor (B, C, H, W) per expert. On a GPU `kept` and `finite` are being copied to pinned memory; the copies are
    complete once `done` has happened.
    """

    maps: list[torch.Tensor]
    kept: list[torch.Tensor]
    finite: torch.Tensor
    started: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None

    def landed(self, passes: Passes) -> list[np.ndarray]:
        """Waits for the maps: one array per expert, bfloat16 as uint16. Adds to `passes.seconds`.

        Raises UserError if a value is NaN or infinite, or too large for the stored dtype.
        """
        if self.started is not None and self.done is not None:
            self.done.synchronize()
            passes.seconds += self.started.elapsed_time(self.done) / 1000
        if not self.finite:
            raise self._unfit()
        return [(m.view(torch.uint16) if m.dtype == torch.bfloat16 else m).numpy() for m in self.kept]

    def _unfit(self) -> UserError:
        if not all(m.isfinite().all() for m in self.maps):
            return UserError("extract: maps must be finite; got NaN or infinity; check the backbone's weights")
        dtype, largest = self.kept[0].dtype, max(float(m.abs().max()) for m in self.maps)
        name = str(dtype).removeprefix("torch.")
        return UserError(
            f"extract.dtype: {name} holds values up to {torch.finfo(dtype).max:g}; "
            f"got {largest:.0f}; use bfloat16 or float32"
        )


@dataclass(frozen=True)
class Job:
    """The work of an extraction: rows and all that their maps depend on. It is sent to the workers of a cluster."""

    rows: RowPlan
    todo: Todo
    images: Images
    backbone_dir: Path
    identity: Mapping[str, Any]
    statistics: bytes
    seed: int
    device: torch.device
    spec: CacheSpec
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """Computes the maps of a job's rows with `backbone`, which is on `device`, and adds the cost to `passes`."""

    job: Job
    backbone: Backbone
    device: torch.device
    passes: Passes

    @cached_property
    def statistics(self) -> Statistics:
        """The batch-norm statistics of the cache, by name."""
        return batchnorm.from_bytes(self.job.statistics)

    @property
    def batch_size(self) -> int:
        """Images in a forward pass."""
        return int(self.job.settings["batch_size"])

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array in the stored dtype to copy maps into; beside a GPU in pinned memory, which torch uses again."""
        dtype = self.job.spec.stored_dtype
        size = int(np.prod(shape)) * dtype.itemsize
        flat = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        array: np.ndarray = flat.numpy().view(dtype).reshape(shape)
        return array

    def batches(self, numbers: np.ndarray, *, packed: bool) -> Iterator["Batch"]:
        """The forward passes over the rows `numbers`, ascending. The rows of a pass have the same statistics.

        A row has the same place in the same batch whatever else is computed, so a resumed extraction computes the same
        bits; rows that are not wanted may go through the network again. If `packed`, batches hold wanted rows alone.
        """
        plan = self.job.rows
        for part in plan.parts:
            begin, end = np.searchsorted(numbers, (part.start, part.stop)) if packed else (part.start, part.stop)
            for first in range(begin, end, self.batch_size):
                last = min(first + self.batch_size, end)
                if packed:
                    rows, inside = numbers[first:last], np.arange(last - first)
                else:
                    rows = np.arange(first, last)
                    inside = numbers[slice(*np.searchsorted(numbers, (first, last)))] - first
                if len(inside):
                    yield Batch(part.statistics, *plan.lines(rows), inside)

    def decode(self, batch: "Batch") -> torch.Tensor:
        """Images of one forward pass, float32 (batch_size, 3, H, W); for a GPU, which normalises them itself, uint8
        (batch_size, H, W, 3) in pinned memory. The last image is repeated to fill up the batch.
        """
        samples, views = batch.samples.tolist(), batch.views.tolist()
        keys = [None if view == 0 else (self.job.seed, view) for view in views]
        images, cuda = self.job.images, self.device.type == "cuda"
        shape = (self.batch_size, images.transform.size, images.transform.size, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=cuda)
        images.pixels(samples, keys, pixels[: len(samples)].numpy())
        pixels[len(samples) :] = pixels[len(samples) - 1]
        return pixels if cuda else normalised(pixels, images.transform)

    @torch.no_grad()
    def launch(self, x: torch.Tensor, wanted: np.ndarray) -> Launched:
        """Starts the forward pass of `x` (from `decode`), of which the places `wanted` are kept; on the CPU, runs it.

        Uses the batch-norm statistics that the backbone holds now.
        """
        cuda = self.device.type == "cuda"
        clock, used = time.perf_counter(), time.process_time()
        started = _event(self.device) if cuda else None
        if cuda:
            x = normalised(x.to(self.device, non_blocking=True), self.job.images.transform)
        computed_maps = guarded_maps(self.backbone, x, self.job.settings["precision"])
        self.passes.images += len(x)
        self.passes.seconds += 0 if cuda else time.perf_counter() - clock
        self.passes.cpu += time.process_time() - used
        first, last = int(wanted[0]), int(wanted[-1]) + 1
        maps = [m[first:last] for m in computed_maps]
        if len(wanted) < last - first:
            some = torch.from_numpy(wanted - first).to(self.device)
            maps = [m[some] for m in maps]
        kept = [m.to(DTYPES[self.job.spec.dtype]) for m in maps]
        finite = torch.stack([m.isfinite().all() for m in kept]).all()
        if cuda:
            kept, finite = [_pinned(m) for m in kept], _pinned(finite)
        done = _event(self.device) if cuda else None
        return Launched(maps, kept, finite, started, done)


@dataclass(frozen=True)
class Batch:
    """The rows of a forward pass under `statistics`: int64 (B,) samples and views.

    `wanted`: the places of those that are wanted, ascending.
    """

    statistics: str
    samples: np.ndarray
    views: np.ndarray
    wanted: np.ndarray


def computed(
    work: Work, todo: Todo, tick: Callable[[int], None], *, straddle: bool = False
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(shard, maps of its rows in `todo`, one array per expert), in order.

    With `straddle` batches hold rows of `todo` alone, which saves passes if each shard has few rows to compute.
    """
    spec = work.job.spec
    numbers = np.concatenate([np.empty(0, np.int64), *todo.values()])
    batches = _forwarded(work, work.batches(numbers, packed=straddle))
    left = [np.empty((0, *shape), spec.stored_dtype) for shape in spec.maps]  # computed rows that no shard has yet
    for shard, rows in todo.items():
        whole = [work.empty((len(rows), *shape)) for shape in spec.maps]
        filled = 0
        while filled < len(rows):
            if not len(left[0]):
                left = next(batches)
                tick(len(left[0]))
            count = min(len(left[0]), len(rows) - filled)
            for into, maps in zip(whole, left, strict=True):
                into[filled : filled + count] = maps[:count]
            left = [maps[count:] for maps in left]
            filled += count
        yield shard, whole


@dataclass(frozen=True)
class Remote:
    """A job as sent to cluster workers, which write the same bytes as this process would.

    `write` takes a shard and the maps of its rows in `job.todo`, one array per expert.
    """

    job: Job
    write: Callable[[int, list[np.ndarray]], Any]

    def open(self, number: int) -> Callable[[int], Callable[[], Any]]:
        """A function that computes a shard and returns one that writes it, so that the next is computed meanwhile.

        Raises UserError if this worker's backbone or settings differ, as it would compute other bytes.
        """
        device = self.job.device
        device = choose(f"cuda:{number % torch.cuda.device_count()}") if device.type == "cuda" else device
        torch.set_num_threads(self.job.settings["threads"])
        backbone, identity = load_backbone(self.job.backbone_dir)
        here = {**identity, **settings(self.job.settings["batch_size"], self.job.settings["precision"], device)}
        for key, value in {**self.job.identity, **self.job.settings}.items():
            if here[key] != value:
                raise UserError(
                    f"run.cluster: {key} must be {value} on every worker; got {here[key]}; give the worker the same "
                    "files, device and versions, or leave it out"
                )
        work = Work(self.job, backbone.to(device), device, Passes())
        return lambda shard: partial(
            self.write, *next(computed(work, {shard: self.job.todo[shard]}, lambda rows: None))
        )


def _forwarded(work: Work, batches: Iterator[Batch]) -> Iterator[list[np.ndarray]]:
    """The wanted maps of every batch, one array per expert. Passes run in this thread; another decodes images."""
    in_place: str | None = None
    launched: Launched | None = None
    with ThreadPoolExecutor(1, "decode-ahead") as decoder:
        ahead: deque[tuple[Batch, Future[torch.Tensor]]] = deque()
        while True:
            while len(ahead) < 3 and (item := next(batches, None)) is not None:
                ahead.append((item, decoder.submit(work.decode, item)))
            if not ahead:
                break
            batch, decoded = ahead.popleft()
            x = decoded.result()
            if batch.statistics != in_place:
                batchnorm.use(work.backbone, work.statistics[batch.statistics])
                in_place = batch.statistics
            last, launched = launched, work.launch(x, batch.wanted)
            if last is not None:
                yield last.landed(work.passes)
        if launched is not None:
            yield launched.landed(work.passes)


def _event(device: torch.device) -> torch.cuda.Event:
    """A timed event, recorded at this point of the GPU's current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory. The copy runs asynchronously."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
