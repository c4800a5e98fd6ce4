"""Forward passes: turns rows into maps in the stored dtype.

Every pass has exactly `batch_size` images. At another size libraries may sum in another order; at a fixed size a row
does not depend on the rows batched with it. A thread decodes the next images in the background. On a GPU
(`extraction.on_gpu`) passes are launched before the maps of those before have arrived.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.cache.write import parts
from h2t.cache.write.parts import StagingFolder
from h2t.pipeline.base.device import choose
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import Precision, guarded_maps
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.views import normalised
from h2t.pipeline.extraction import batchnorm, stored_maps
from h2t.pipeline.extraction.batchnorm import Statistics
from h2t.pipeline.extraction.on_gpu import IN_FLIGHT, GpuPass, GpuPasses, Place, memory_format
from h2t.pipeline.extraction.row_plan import RowPlan
from h2t.pipeline.extraction.stored_maps import DTYPES
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.trained import load_backbone

#: Shard -> the numbers of its rows that need a forward pass, ascending, int64.
Todo = Mapping[int, np.ndarray]


def settings(batch_size: int, precision: Precision, device: torch.device) -> dict[str, Any]:
    """The settings that rounding depends on: if they, fingerprint and layout are equal, so are the cache's bytes."""
    cuda = device.type == "cuda"
    last = cuda and memory_format(precision) == torch.channels_last
    return {
        **({"memory_format": "channels_last"} if last else {}),
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("numcodecs", "numpy", "pillow", "torch", "torchvision")},
    }


def written_with(staging: StagingFolder, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the parts were written with: the committing machine may have another device.

    `asked`: batch size and precision of the parameters. Raises UserError if these differ, and as `parts.written_with`.
    """
    settings = parts.written_with(staging)
    for key, value in asked.items():
        if settings.get(key) != value:
            raise UserError(
                f"extract.{key}: must be {settings.get(key)}, with which the parts were written; got {value}; commit "
                "with the parameters of the parts"
            )
    return settings


@dataclass
class Passes:
    """Cost of the forward passes of this process.

    `images`: images that went through the backbone, including those that fill up a batch. `seconds`: duration of the
    passes; on a GPU its own time, from normalising the images to converting the maps. `cpu`: processor seconds of the
    whole process during the passes, which includes decoding in the background; on a GPU, during their launch.
    """

    images: int = 0
    seconds: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True)
class CpuPass:
    """A forward pass that has ended, after `seconds`."""

    largest: torch.Tensor
    seconds: float

    def wait(self) -> float:
        """The duration of the pass."""
        return self.seconds


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

    @cached_property
    def gpu(self) -> GpuPasses | None:
        """What launches the passes, if `device` is a GPU."""
        if self.device.type != "cuda":
            return None
        job = self.job
        return GpuPasses(
            self.backbone, self.device, job.images.transform, job.settings["precision"], DTYPES[job.spec.dtype]
        )

    @property
    def batch_size(self) -> int:
        """Images in a forward pass."""
        return int(self.job.settings["batch_size"])

    def room(self, shard: int, begin: int, end: int) -> "Filling":
        """Room for the maps of `shard`, which are the rows `begin` to `end` of all that are computed.

        Beside a GPU it lies in pinned memory, which torch uses again.
        """
        spec = self.job.spec
        pinned = self.device.type == "cuda"
        shapes = [(end - begin, *shape) for shape in spec.maps]
        return Filling(shard, begin, end, [torch.empty(s, dtype=DTYPES[spec.dtype], pin_memory=pinned) for s in shapes])

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
    def launch(self, x: torch.Tensor, wanted: np.ndarray, places: Sequence[Place]) -> CpuPass | GpuPass:
        """Starts the forward pass of `x` (from `decode`); the maps at the places `wanted` go to `places`.

        Uses the batch-norm statistics that the backbone holds now. On the CPU the pass is over afterwards.
        """
        first, last = int(wanted[0]), int(wanted[-1]) + 1
        whole = len(wanted) == last - first
        some = slice(first, last) if whole else torch.from_numpy(wanted).to(self.device)
        clock, used = time.perf_counter(), time.process_time()
        self.passes.images += len(x)
        if self.gpu is not None:
            launched = self.gpu.launch(x, some, places)
            self.passes.cpu += time.process_time() - used
            return launched
        maps = guarded_maps(self.backbone, x, self.job.settings["precision"])
        seconds = time.perf_counter() - clock
        self.passes.cpu += time.process_time() - used
        kept = [m[some] for m in maps]
        for rows, room in places:
            for into, one in zip(room, kept, strict=True):
                into.copy_(one[rows])
        return CpuPass(stored_maps.largest(kept), seconds)

    def landed(self, launched: CpuPass | GpuPass) -> None:
        """Waits for the maps of a pass. Raises UserError if one is NaN, infinite, or too large for the stored dtype."""
        self.passes.seconds += launched.wait()
        stored_maps.check(launched.largest, DTYPES[self.job.spec.dtype])


@dataclass(frozen=True)
class Filling:
    """A shard whose maps are being computed: the rows `begin` to `end` of all. `room`: (rows, C, H, W) per expert."""

    shard: int
    begin: int
    end: int
    room: list[torch.Tensor]

    def place(self, first: int, last: int) -> Place:
        """The part of the rows `first` to `last` that lies in this shard."""
        begin, end = max(first, self.begin), min(last, self.end)
        return slice(begin - first, end - first), [r[begin - self.begin : end - self.begin] for r in self.room]

    def arrays(self) -> list[np.ndarray]:
        """The maps, one array per expert, bfloat16 as uint16."""
        return [(r.view(torch.uint16) if r.dtype == torch.bfloat16 else r).numpy() for r in self.room]


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
    numbers = np.concatenate([np.empty(0, np.int64), *todo.values()])
    ends = np.cumsum([len(rows) for rows in todo.values()]).tolist()
    ahead = deque(zip(todo, [0, *ends], ends, strict=False))  # shard, its first row, the row after its last
    filling: deque[Filling] = deque()
    launched: deque[tuple[CpuPass | GpuPass, int, int]] = deque()  # with the rows before it and after it

    def landed() -> Iterator[tuple[int, list[np.ndarray]]]:
        """Waits for the next pass; the shards that are complete then."""
        one, first, rows = launched.popleft()
        work.landed(one)
        tick(rows - first)
        while filling and filling[0].end <= rows:
            yield filling[0].shard, filling.popleft().arrays()

    rows = 0
    for batch, x in _decoded(work, work.batches(numbers, packed=straddle)):
        first, rows = rows, rows + len(batch.wanted)
        while ahead and ahead[0][1] < rows:
            filling.append(work.room(*ahead.popleft()))
        places = [f.place(first, rows) for f in filling if f.end > first]
        launched.append((work.launch(x, batch.wanted, places), first, rows))
        while len(launched) > (IN_FLIGHT if work.gpu else 0):
            yield from landed()
    while launched:
        yield from landed()
    for shard, begin, end in ahead:  # of which no row is computed
        yield shard, work.room(shard, begin, end).arrays()


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
        one_at_a_time = threading.Lock()  # for a worker of several threads: a backbone holds one set of statistics

        def compute(shard: int) -> Callable[[], Any]:
            with one_at_a_time:
                return partial(self.write, *next(computed(work, {shard: self.job.todo[shard]}, lambda rows: None)))

        return compute


def _decoded(work: Work, batches: Iterator[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Every batch with its images, and its statistics in place. A thread decodes the next ones meanwhile."""
    in_place: str | None = None
    with ThreadPoolExecutor(1, "decode-ahead") as decoder:
        ahead: deque[tuple[Batch, Future[torch.Tensor]]] = deque()
        while True:
            while len(ahead) < 3 and (item := next(batches, None)) is not None:
                ahead.append((item, decoder.submit(work.decode, item)))
            if not ahead:
                return
            batch, decoded = ahead.popleft()
            x = decoded.result()
            if batch.statistics != in_place:
                batchnorm.use(work.backbone, work.statistics[batch.statistics])
                in_place = batch.statistics
            yield batch, x
