"""Forward passes: turns rows into maps in the stored dtype, in this process or on the workers of a cluster.

Every pass has exactly `batch_size` images. At another size libraries may sum in another order; at a fixed size a row
does not depend on the rows batched with it. A thread decodes the next images in the background. On a GPU a pass is
launched before the maps of the one before have arrived, and maps are converted on the GPU, so fewer bytes are copied.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.pipeline.base.device import choose
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import Precision, guarded_maps
from h2t.pipeline.data.images import Images, normalised
from h2t.pipeline.extraction import batchnorm, cluster
from h2t.pipeline.extraction.batchnorm import Statistics
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
    """The work of an extraction, as sent to cluster workers, which compute the same bytes from it as this process."""

    rows: pa.Table
    todo: Todo
    images: Images
    backbone_dir: Path
    identity: Mapping[str, Any]
    statistics: bytes
    seed: int
    device: torch.device
    spec: CacheSpec
    settings: Mapping[str, Any]

    def open(self, number: int) -> Callable[[int], list[np.ndarray]]:
        """A function: shard -> maps of its rows in `todo`, one array per expert.

        Raises UserError if this worker's backbone or settings differ, as it would compute other bytes.
        """
        device = self.device
        device = choose(f"cuda:{number % torch.cuda.device_count()}") if device.type == "cuda" else device
        torch.set_num_threads(self.settings["threads"])
        backbone, identity = load_backbone(self.backbone_dir)
        here = {**identity, **settings(self.settings["batch_size"], self.settings["precision"], device)}
        for key, value in {**self.identity, **self.settings}.items():
            if here[key] != value:
                raise UserError(
                    f"run.cluster: {key} must be {value} on every worker; got {here[key]}; give the worker the same "
                    "files, device and versions, or leave it out"
                )
        work = Work(self, backbone.to(device), device, Passes())
        return lambda shard: next(computed(work, {shard: self.todo[shard]}, lambda rows: None))[1]


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

    def batches(self, numbers: np.ndarray) -> Iterator[tuple[str, pa.Table]]:
        """(statistics, rows) of each forward pass over the rows `numbers`: in order, at most `batch_size` rows."""
        chosen = self.job.rows.take(numbers)
        names = np.array(chosen["statistics"])
        cuts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(chosen)]
        for begin, end in pairwise(cuts):
            for first in range(begin, end, self.batch_size):
                yield str(names[first]), chosen.slice(first, min(self.batch_size, end - first))

    def decode(self, part: pa.Table) -> torch.Tensor:
        """Images of one forward pass, float32 (batch_size, 3, H, W); for a GPU, which normalises them itself, uint8
        (batch_size, H, W, 3) in pinned memory. The last image is repeated to fill up the batch.
        """
        samples, views = part["sample"].to_pylist(), part["view"].to_pylist()
        keys = [None if view == 0 else (self.job.seed, view) for view in views]
        missing = self.batch_size - len(samples)
        views = torch.from_numpy(self.job.images.pixels(samples, keys))
        if missing:
            views = torch.cat([views, views[-1:].expand(missing, -1, -1, -1)])
        if self.device.type == "cuda":
            return views.pin_memory()
        return normalised(views, self.job.images.transform)

    @torch.no_grad()
    def launch(self, x: torch.Tensor, count: int) -> Launched:
        """Starts the forward pass of `x` (from `decode`), of which the first `count` are wanted; on the CPU, runs it.

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
        maps = [m[:count] for m in computed_maps]
        kept = [m.to(DTYPES[self.job.spec.dtype]) for m in maps]
        finite = torch.stack([m.isfinite().all() for m in kept]).all()
        if cuda:
            kept, finite = [_pinned(m) for m in kept], _pinned(finite)
        done = _event(self.device) if cuda else None
        return Launched(maps, kept, finite, started, done)


def shards(
    job: Job,
    backbone: Backbone,
    address: str | None,
    tick: Callable[[int], None],
    passes: Passes,
    say: Callable[[str], None],
    *,
    straddle: bool,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(shard, maps of its rows in `todo`, one array per expert), computed here, in order, or by the cluster `address`.

    `tick` gets the number of new rows. `passes` counts the passes that run in this process. `say` gets lines on workers
    that are waited for. `straddle`: see `computed`.
    """
    if address is None:
        yield from computed(Work(job, backbone, job.device, passes), job.todo, tick, straddle=straddle)
        return
    for shard, maps in cluster.shards(address, job, list(job.todo), say):
        tick(len(job.todo[shard]))
        yield shard, maps


def computed(
    work: Work, todo: Todo, tick: Callable[[int], None], *, straddle: bool = False
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(shard, maps of its rows in `todo`, one array per expert), in order.

    With `straddle` a batch may hold rows of several shards. This saves passes if each shard has few rows to compute.
    """
    groups = [np.concatenate(list(todo.values()))] if straddle and todo else todo.values()
    batches = _forwarded(work, groups)
    spec = work.job.spec
    surplus = [np.empty((0, *shape), spec.stored_dtype) for shape in spec.maps]  # rows of the next shard
    for shard, rows in todo.items():
        parts = [[maps] for maps in surplus]
        filled = len(surplus[0])
        while filled < len(rows):
            batch = next(batches)
            for mine, maps in zip(parts, batch, strict=True):
                mine.append(maps)
            filled += len(batch[0])
            tick(len(batch[0]))
        joined = [np.concatenate(mine) for mine in parts]
        surplus = [maps[len(rows) :].copy() for maps in joined]
        yield shard, [maps[: len(rows)] for maps in joined]


def _forwarded(work: Work, groups: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Maps of every batch, one array per expert. Passes run in this thread; another thread decodes images."""
    batches = (batch for numbers in groups for batch in work.batches(numbers))
    in_place: str | None = None
    launched: Launched | None = None
    with ThreadPoolExecutor(1, "decode-ahead") as decoder:
        ahead: deque[tuple[str, int, Future[torch.Tensor]]] = deque()
        while True:
            while len(ahead) < 3 and (item := next(batches, None)) is not None:
                statistics, part = item
                ahead.append((statistics, len(part), decoder.submit(work.decode, part)))
            if not ahead:
                break
            statistics, count, decoded = ahead.popleft()
            x = decoded.result()
            if statistics != in_place:
                batchnorm.use(work.backbone, work.statistics[statistics])
                in_place = statistics
            last, launched = launched, work.launch(x, count)
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
