"""Forward passes: rows into maps in the stored dtype, here or on the workers of a cluster.

Every pass runs at exactly `batch_size` images, because at another size libraries sum in another order; at one size a
row hangs on none of its neighbours. Images are decoded ahead in a thread of their own. On a GPU the next pass is
launched before the maps of the last one have arrived; they are converted there, so that half as many bytes come over.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from h2t.cache.format.spec import CacheSpec
from h2t.pipeline.base.device import choose
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import Precision, guarded_maps
from h2t.pipeline.data.images import Images
from h2t.pipeline.extraction import batchnorm, cluster
from h2t.pipeline.extraction.batchnorm import Statistics
from h2t.pipeline.networks.trained import load_backbone

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}

Todo = Mapping[int, np.ndarray]  # shard -> those of its rows that need a forward pass, ascending


def settings(batch_size: int, precision: Precision, device: torch.device) -> dict[str, Any]:
    """All that must be equal for two runs to give the same bytes from the same fingerprint and layout."""
    return {
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("numcodecs", "numpy", "pillow", "torch", "torchvision")},
    }


@dataclass
class Passes:
    """What forward passes took: `images` through them, those that fill up a batch included, and seconds.

    `cpu` is the processor time of the whole process meanwhile, so the decoding of the next images counts in it. On a
    GPU `seconds` are its own, from the images' copy to that of the maps, and `cpu` is what launching took.
    """

    images: int = 0
    seconds: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True)
class Launched:
    """A forward pass that may still run: its `maps` as computed, and as they are `kept`, in the storage dtype.

    On a GPU `kept` and `finite` are on their way to pinned memory, and there once `done` has happened.
    """

    maps: list[torch.Tensor]
    kept: list[torch.Tensor]
    finite: torch.Tensor
    started: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None

    def landed(self, passes: Passes) -> list[np.ndarray]:
        """Waits for the maps, an array per expert. Raises UserError for values that the storage dtype cannot hold."""
        if self.started is not None and self.done is not None:
            self.done.synchronize()
            passes.seconds += self.started.elapsed_time(self.done) / 1000
        if not self.finite:
            raise self._unfit()
        return [(m.view(torch.uint16) if m.dtype == torch.bfloat16 else m).numpy() for m in self.kept]

    def _unfit(self) -> UserError:
        if not all(m.isfinite().all() for m in self.maps):
            return UserError("extract: the backbone gave NaN or infinity; check its weights and the images")
        dtype, largest = self.kept[0].dtype, max(float(m.abs().max()) for m in self.maps)
        name = str(dtype).removeprefix("torch.")
        return UserError(
            f"extract.dtype: {name} holds values up to {torch.finfo(dtype).max:g}; "
            f"got {largest:.0f}; use bfloat16 or float32"
        )


@dataclass(frozen=True)
class Work:
    """What turns rows of the table `rows` into maps of `dtype`. `seed` is that of the views."""

    rows: pa.Table
    images: Images
    backbone: nn.Module
    statistics: Statistics
    batch_size: int
    precision: Precision
    dtype: str
    seed: int
    device: torch.device
    passes: Passes

    def batches(self, numbers: np.ndarray) -> Iterator[tuple[str, pa.Table]]:
        """(statistics, rows) of every forward pass over the rows `numbers`, at most `batch_size` rows, in order."""
        chosen = self.rows.take(numbers)
        names = np.array(chosen["statistics"])
        cuts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(chosen)]
        for begin, end in pairwise(cuts):
            for first in range(begin, end, self.batch_size):
                yield str(names[first]), chosen.slice(first, min(self.batch_size, end - first))

    def decode(self, part: pa.Table) -> torch.Tensor:
        """Input of one forward pass, always `batch_size` images: the last one is repeated to fill up."""
        samples, views = part["sample"].to_pylist(), part["view"].to_pylist()
        keys = [None if view == 0 else (self.seed, view) for view in views]
        missing = self.batch_size - len(samples)
        batch = self.images.batch(samples, keys)
        if missing:
            batch = torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)])
        return batch.pin_memory() if self.device.type == "cuda" else batch

    @torch.no_grad()
    def launch(self, x: torch.Tensor, count: int) -> Launched:
        """Starts the forward pass of the images `x`, of which the first `count` are wanted; on the CPU it is done then.

        The backbone's batch-norm statistics are those in place.
        """
        cuda = self.device.type == "cuda"
        clock, used = time.perf_counter(), time.process_time()
        started = _event(self.device) if cuda else None
        found = guarded_maps(self.backbone, x.to(self.device, non_blocking=True), self.precision)
        self.passes.images += len(x)
        self.passes.seconds += 0 if cuda else time.perf_counter() - clock
        self.passes.cpu += time.process_time() - used
        maps = [m[:count] for m in found]
        kept = [m.to(DTYPES[self.dtype]) for m in maps]
        finite = torch.stack([m.isfinite().all() for m in kept]).all()
        if cuda:
            kept, finite = [_pinned(m) for m in kept], _pinned(finite)
        done = _event(self.device) if cuda else None
        return Launched(maps, kept, finite, started, done)


@dataclass(frozen=True)
class Job:
    """All that a worker of a cluster needs to compute shards as this process would."""

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
        """Shard -> maps of its rows to do, an array per expert. Raises UserError where the bytes would be others."""
        device = self.device
        device = choose(f"cuda:{number % torch.cuda.device_count()}") if device.type == "cuda" else device
        torch.set_num_threads(self.settings["threads"])
        backbone, identity = load_backbone(self.backbone_dir)
        found = {**identity, **settings(self.settings["batch_size"], self.settings["precision"], device)}
        for key, value in {**self.identity, **self.settings}.items():
            if found[key] != value:
                raise UserError(f"run.cluster: {key} must be {value} on every worker; got {found[key]}")
        work = self.work(backbone.to(device), device, Passes())
        return lambda shard: next(computed(work, self.spec, {shard: self.todo[shard]}, lambda rows: None))[1]

    def work(self, backbone: nn.Module, device: torch.device, passes: Passes) -> Work:
        """What computes rows by `backbone`, which is on `device`; counts in `passes`."""
        statistics = batchnorm.from_bytes(self.statistics)
        batch_size, precision, dtype = self.settings["batch_size"], self.settings["precision"], self.spec.dtype
        return Work(
            self.rows, self.images, backbone, statistics, batch_size, precision, dtype, self.seed, device, passes
        )


def shards(
    job: Job,
    backbone: nn.Module,
    address: str | None,
    tick: Callable[[int], None],
    passes: Passes,
    say: Callable[[str], None],
    *,
    straddle: bool,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(shard, maps of its rows to do, an array per expert): here, in order, or from the cluster at `address`.

    `passes` counts those that run here. `say` is told which workers a cluster waits for.
    """
    if address is None:
        yield from computed(job.work(backbone, job.device, passes), job.spec, job.todo, tick, straddle=straddle)
        return
    for shard, maps in cluster.shards(address, job, list(job.todo), say):
        tick(len(job.todo[shard]))
        yield shard, maps


def computed(
    work: Work, spec: CacheSpec, todo: Todo, tick: Callable[[int], None], *, straddle: bool = False
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(shard, maps of its rows to do, an array per expert), in order.

    With `straddle`, a batch may hold rows of several shards: a few rows of each are then no pass of their own.
    """
    groups = [np.concatenate(list(todo.values()))] if straddle and todo else todo.values()
    batches = _forwarded(work, groups)
    left = [np.empty((0, *shape), spec.stored_dtype) for shape in spec.maps]
    for shard, rows in todo.items():
        parts = [[maps] for maps in left]
        filled = len(left[0])
        while filled < len(rows):
            batch = next(batches)
            for mine, maps in zip(parts, batch, strict=True):
                mine.append(maps)
            filled += len(batch[0])
            tick(len(batch[0]))
        joined = [np.concatenate(mine) for mine in parts]
        left = [maps[len(rows) :].copy() for maps in joined]
        yield shard, [maps[: len(rows)] for maps in joined]


def _forwarded(work: Work, groups: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Maps of every batch, an array per expert. Forward passes in this thread; images are decoded in another."""
    batches = (batch for numbers in groups for batch in work.batches(numbers))
    in_place: str | None = None
    flying: Launched | None = None
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
            last, flying = flying, work.launch(x, count)
            if last is not None:
                yield last.landed(work.passes)
        if flying is not None:
            yield flying.landed(work.passes)


def _event(device: torch.device) -> torch.cuda.Event:
    """A point in the work of a GPU, with its time."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, under way."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
