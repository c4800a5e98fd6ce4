"""Runs the stages on a few made-up images, to learn what an image costs on this machine.

Each stage runs on a small and on a larger number of images. The line through both times separates what a run costs
once (loading, committing) from what each image costs.
"""

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from h2t.cache.format.spec import CacheSpec
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
from h2t.pipeline.base import plugins
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run, silent
from h2t.pipeline.base.seeds import torch_seed
from h2t.pipeline.data.decoding import decode
from h2t.pipeline.data.images import Images, Transform
from h2t.pipeline.data.network_input import chosen
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.descent import Descent
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import Choice, Feed
from h2t.pipeline.heads.stack import HeadSetting, Stack
from h2t.pipeline.heads.stored import HeadParts, build_head
from h2t.pipeline.networks.backbone import build_backbone
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.networks.weights import save_weights
from h2t.pipeline.stages import extract, pool
from h2t.pipeline.stages.train_backbone import Params as Entry

CLASSES, TEST_SHARE = 10, 10  # every tenth image is a test image
PICTURES = 16  # different ones, used again and again
SECONDS = 3.0  # that the smaller run of extraction takes, about
TIMES = 3  # as many images in the larger run
REPEATS = 7  # of short runs, of which the fastest counts
MOST_IMAGES = 8192  # of the smaller run
BATCH, STEPS = 128, 100  # of stage II
HEADS = [HeadSetting(0.0, "instance", "random", 0), HeadSetting(0.3, "instance", "random", 0)]

Clock = Callable[[], float]


@dataclass(frozen=True)
class Cost:
    """Seconds of a run: `once`, and for `each` image (of `epoch`: for each step)."""

    once: float
    each: float

    def of(self, count: float) -> float:
        return self.once + self.each * count


@dataclass(frozen=True)
class Rehearsal:
    """What was measured, with the specifications of the rehearsed cache and of its pooled copy.

    `images`: those of the larger run. `table_bytes`: of a row in the row table on disk.
    """

    images: int
    spec: CacheSpec
    pooled: CacheSpec
    table_bytes: float
    costs: Mapping[str, Cost]

    def as_dict(self) -> dict[str, Any]:
        """The costs as a JSON object."""
        return {"images": self.images, **{name: asdict(cost) for name, cost in self.costs.items()}}


class Stage:
    """The folder, network and settings of a rehearsal."""

    def __init__(self, folder: Path, entry: Entry, params: extract.Params, device: torch.device, clock: Clock) -> None:
        self.folder, self.device, self.clock = folder, device, clock
        arch = plugins.load("backbones", entry.arch)
        options = build(arch.Options, "options", entry.options)
        self.side = (chosen(arch.input(options), entry.input).size if hasattr(arch, "input") else entry.input.size) or 0
        torch.manual_seed(torch_seed(0, "plan"))
        backbone = build_backbone(arch, options, self.side or None)
        self.channels, self.experts = backbone.channels, getattr(backbone, "experts", 1)
        about = {"arch": entry.arch, "options": entry.options, "channels": self.channels, "experts": self.experts}
        about |= {"input": {"size": self.side}} if hasattr(arch, "input") else {}
        save_weights(folder / "backbone.safetensors", backbone.state_dict(), about)
        self.params = params

    def samples(self, count: int, side: int) -> tuple[Samples, Images]:
        """`count` images, of which one in `TEST_SHARE` is a test image, as JPEG files in memory."""
        pictures = [_picture(number, side) for number in range(PICTURES)]
        test = count // TEST_SHARE
        split = ["test"] * test + ["train"] * (count - test)
        label = np.concatenate([np.sort(np.arange(n) % CLASSES) for n in (test, count - test)])
        sources = [f"images/of/a/class/{i:08}.jpg" for i in range(count)]
        digests = [sha256(pictures[i % PICTURES]).hexdigest() for i in range(count)]
        columns = {"sample": np.arange(count), "split": split, "label": pa.array(label, pa.int32())}
        transform = Transform(size=side, mean=[0.5] * 3, std=[0.5] * 3)
        facts = {
            "classes": [f"class {j}" for j in range(CLASSES)],
            "counts": np.bincount(label[test:], minlength=CLASSES).tolist(),
            "dataset": "synthetic",
            "transform": transform.model_dump(),
        }
        images = Images(sources, digests, lambda source: pictures[int(source[-12:-4]) % PICTURES], decode, transform)
        return Samples(pa.table({**columns, "source": sources, "digest": digests}), facts), images

    def extract(self, count: int) -> tuple[Path, float]:
        """Extracts `count` images into a new cache; (the cache, seconds)."""
        out = self.folder / f"cache-{count}"
        samples, images = self.samples(count, self.side or 32)
        run = Run("plan", out, self.device, say=silent)
        return out, self.timed(lambda: extract.run(self.params, run, samples, images, self.folder, replace=True))

    def verify(self, cache: Path) -> float:
        return self.timed(lambda: verify(cache))

    def pool(self, cache: Path) -> tuple[Path, float]:
        """Pools the cache; (the copy, seconds)."""
        out = cache.with_name(f"{cache.name}-pooled")
        with open_cache(cache) as maps:
            run = Run("plan", out, say=silent)
            return out, self.timed(lambda: pool.run(pool.Params(), run, maps, replace=True))

    def epoch(self, cache: Path, steps: int) -> Cost:
        """Training of two classifiers on the pooled cache for about `steps`; the cost of a step."""
        with open_cache(cache) as features:
            names = features.spec.provenance["classes"]
            statistics = features.index.statistics("train")[0]
            streams = Streams(features.index, names, statistics, {"instance": statistics}, [0], BATCH)
            feed = Feed(streams, FeatureReader(features, None), Choice("memory", ""), 0, self.device, silent)
            context = Context(torch.from_numpy(streams.index.counts), self.channels, self.experts)
            weight = torch.zeros(self.experts, CLASSES, features.spec.maps[0][0])
            start = StageOneHead({"weight": weight, "bias": torch.zeros(self.experts, CLASSES)}, "linear", 1.0)
            head = build_head(HeadParts("dr", {}, "linear", 1.0, "gap", {}, "plan"), context)
            stack = Stack(head, HEADS, feed)
            stack.start(start)
            descent = Descent(stack.state, {}, momentum=0.9, weight_decay=5e-4)
            epochs = -(-steps // streams.steps)
            taken = []
            for at in feed.steps(epochs, draw=stack.draw):
                began = self.clock()
                stack.step(at, descent, 0.02)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append(self.clock() - began)
            return Cost(0.0, float(np.median(taken)))

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes."""
        began = self.clock()
        work()
        return self.clock() - began


def rehearse(
    folder: Path,
    entry: Entry,
    params: extract.Params,
    device: torch.device,
    *,
    clock: Clock = time.perf_counter,
    seconds: float = SECONDS,
) -> Rehearsal:
    """Rehearses the stages after stage I in the empty `folder`, with random weights; takes about 6 x `seconds`.

    On the CPU batches have at most 16 images: the time of an image hardly depends on it.
    """
    if device.type == "cpu":
        params = params.model_copy(update={"batch_size": min(params.batch_size, 16)})
    stage = Stage(folder, entry, params, device, clock)
    batch = params.batch_size
    stage.extract(2 * CLASSES)  # loads what is loaded once in a process
    rate = batch / stage.extract(batch + 2 * CLASSES)[1]
    small = batch * max(2, math.ceil(min(seconds * rate, MOST_IMAGES) / batch))
    sizes = (small, TIMES * small)
    caches, times = zip(*(stage.extract(size) for size in sizes), strict=True)
    checked = [min(stage.verify(cache) for _ in range(REPEATS)) for cache in caches]
    copies = [stage.pool(cache)[0] for cache in caches]
    pooling = [min(stage.pool(cache)[1] for _ in range(REPEATS)) for cache in caches]
    with open_cache(caches[1]) as cache, open_cache(copies[1]) as copy:
        spec, pooled, table_bytes = cache.spec, copy.spec, cache.commit.files["rows.parquet"][0] / cache.spec.rows
    costs = {name: line(sizes, of) for name, of in (("extract", times), ("verify", checked), ("pool", pooling))}
    costs["step"] = stage.epoch(copies[1], STEPS)
    return Rehearsal(sizes[1], spec, pooled, table_bytes, costs)


def line(sizes: tuple[int, ...], seconds: tuple[float, ...] | list[float]) -> Cost:
    """The cost whose line goes through both times; never below 0."""
    each = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])) or seconds[1] / sizes[1]
    return Cost(max(0.0, seconds[0] - each * sizes[0]), each)


def _picture(number: int, side: int) -> bytes:
    """A JPEG file of twice the side, or of 500 x 375 pixels: smooth colours with some noise."""
    width, height = (500, 375) if side >= 128 else (2 * side, 2 * side)
    draws = np.random.default_rng(number)
    smooth = Image.fromarray(draws.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = draws.normal(0, 8, (height, width, 3))
    data = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()
