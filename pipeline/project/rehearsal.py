"""Runs the stages on made-up images, to learn what an image costs on this machine.

Each stage runs at two sizes. The line through both times separates what a run costs once (loading, committing) from
what each image costs. The smaller run is short and repeated, so that its noise hardly changes the slope. Extraction
runs on few images; verify, pooling and stage II run on larger caches that repeat the extracted maps.
"""

import io
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from h2t.cache.format.card import card
from h2t.cache.format.spec import CacheSpec, shard_rows_for
from h2t.cache.reader import open_cache
from h2t.cache.tools.pooled import SHARD_BYTES, pooled
from h2t.cache.tools.verify import verify
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter
from h2t.pipeline.base import plugins
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run, silent
from h2t.pipeline.base.seeds import torch_seed
from h2t.pipeline.data.decoding import decode
from h2t.pipeline.data.images import Images, Transform
from h2t.pipeline.data.network_input import of_network
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.heads.descent import Descent
from h2t.pipeline.heads.features import load_pool
from h2t.pipeline.heads.stack import FLOAT
from h2t.pipeline.networks.backbone import build_backbone
from h2t.pipeline.networks.trained import backbone_facts
from h2t.pipeline.networks.weights import save_weights
from h2t.pipeline.project.stacks import feed_of, settings, stack_on, streams_of
from h2t.pipeline.stages import extract
from h2t.pipeline.stages.train_backbone import Params as Entry

CLASSES, TEST_SHARE = 10, 10  # every tenth image is a test image
PICTURES = 16  # different ones, used again and again
SECONDS = 8.0  # that the larger run of extraction takes beyond the smaller one, at least
GROWTH = 4  # as many images in the next attempt at a larger run
MOST_IMAGES = 32_768  # of a larger run
REPEATS = 5  # of short runs, of which the fastest counts
LONG_REPEATS = 3  # of longer ones
FILLED = 512 * 2**20  # bytes of maps in the larger cache that repeats them; the smaller has an eighth
MOST_FILLED = 131_072  # images of the larger cache; small maps would take millions to fill it
SMALLER = 8
SHARDS = 8  # of each of them, so that the threads of verify and pooling have work
MOST_REPEATED = 16 * 2**20  # bytes of each expert's maps that are repeated
DISK_SHARE = 0.25  # of the free space, for these caches
STEPS = (100, 400)  # of stage II
HEADS = settings([0.0, 0.3], [0])

Clock = Callable[[], float]


@dataclass(frozen=True)
class Cost:
    """Seconds of a run: `once`, and for `each` image (of `step`: for each step)."""

    once: float
    each: float

    def of(self, count: float) -> float:
        return self.once + self.each * count


@dataclass(frozen=True)
class Rehearsal:
    """What was measured by which settings, with the specifications of the rehearsed cache and of its pooled copy.

    `images`: those of the larger extraction. `table_bytes`: of a row in the row table on disk.
    """

    images: int
    spec: CacheSpec
    pooled: CacheSpec
    table_bytes: float
    costs: Mapping[str, Cost]
    params: extract.Params

    def as_dict(self) -> dict[str, Any]:
        """The costs as a JSON object."""
        return {"images": self.images, **{name: asdict(cost) for name, cost in self.costs.items()}}


class Stage:
    """The folder, network and settings of a rehearsal."""

    def __init__(self, folder: Path, entry: Entry, params: extract.Params, device: torch.device, clock: Clock) -> None:
        self.folder, self.device, self.clock = folder, device, clock
        arch = plugins.load("backbones", entry.arch)
        options = build(arch.Options, "options", entry.options)
        self.side = of_network(arch, options, entry.input).size or 0
        torch.manual_seed(torch_seed(0, "plan"))
        backbone = build_backbone(arch, options, self.side or None)
        self.channels, experts = backbone.channels, getattr(backbone, "experts", 1)
        about = {"arch": entry.arch, "options": entry.options, "channels": self.channels, "experts": experts}
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

    def filled(self, extracted: Path, count: int) -> Path:
        """A new cache of `count` images that repeats the maps of `extracted`, in at least `SHARDS` shards."""
        out = self.folder / f"filled-{count}"
        params = extract.with_recipes_of(self.params, backbone_facts(self.folder))
        planned = extract.planned_rows(params, self.samples(count, self.side or 32)[0])
        rows = planned.table()
        with open_cache(extracted) as cache, Staging(out) as staging:
            known = cache.spec
            few = np.arange(min(known.rows, MOST_REPEATED // known.row_bytes() + 1))
            maps = [cache.read(few, expert=expert) for expert in range(known.experts)]
            chunks = max(1, len(rows) // (SHARDS * known.chunk_rows))
            shard_rows = min(known.shard_rows, chunks * known.chunk_rows)
            counts = np.bincount(rows["label"].to_numpy()[rows["split"].to_numpy() == "train"], minlength=CLASSES)
            provenance = {**known.provenance, "counts": counts.tolist()}
            spec = replace(known, rows=len(rows), shard_rows=shard_rows, provenance=provenance)
            writer = CacheWriter(staging, spec, rows, {})
            for shard in writer.pending:
                writer.write(shard, [of[np.array(spec.shard_range(shard)) % len(few)] for of in maps])
            writer.commit(cache.statistics, card(spec, planned.plan.counts))
        return out

    def verify(self, cache: Path) -> float:
        return self.timed(lambda: verify(cache))

    def pool(self, cache: Path) -> tuple[Path, float]:
        """Pools the cache, in shards as small as its own; (the copy, seconds)."""
        out = cache.with_name(f"{cache.name}-pooled")
        gap = load_pool("gap", {}, "pool.pool_options", self.channels)

        @torch.no_grad()
        def vectors(maps: np.ndarray) -> np.ndarray:
            return gap({}, torch.from_numpy(maps)).numpy()

        with open_cache(cache) as maps:
            shard = maps.spec.shard_rows * self.channels * FLOAT
            return out, self.timed(lambda: pooled(maps, out, vectors, "gap", shard_bytes=shard, replace=True))

    def epoch(self, cache: Path, steps: Sequence[int]) -> list[float]:
        """Training of two classifiers on the pooled cache for each of `steps`; the seconds of each.

        Features are in memory; drawing counts, in the background as in a real run. The fastest of a few counts.
        """
        with open_cache(cache) as features:
            streams = streams_of(features, [0], features.index.statistics("train")[0])
            feed = feed_of(streams, features, "memory", self.device, pooled=False)  # they are pooled already
            stack = stack_on(feed, HEADS)
            descent = Descent(stack.state, {}, momentum=0.9, weight_decay=5e-4)

            def train(count: int) -> float:
                began = self.clock()
                for at in islice(feed.steps(-(-count // streams.steps), draw=stack.draw), count):
                    stack.step(at, descent, 0.02)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                return self.clock() - began

            train(1)  # loads what is loaded once in a process
            return [min(train(count) for _ in range(LONG_REPEATS)) for count in steps]

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
    filled: int = FILLED,
) -> Rehearsal:
    """Rehearses the stages after stage I in the empty `folder`, with random weights.

    Takes about twice `seconds`, and the time to write, verify and pool `filled` bytes a few times. On the CPU batches
    have at most 16 images: the time of an image hardly depends on it.
    """
    if device.type == "cpu":
        params = params.model_copy(update={"batch_size": min(params.batch_size, 16)})
    stage = Stage(folder, entry, params, device, clock)
    extracted, extraction = _extraction(stage, seconds)
    with open_cache(extracted) as cache:
        spec, images = cache.spec, len(set(cache.rows["sample"].to_pylist()))
    room = min(filled, int(DISK_SHARE * shutil.disk_usage(folder).free))
    large = max(SMALLER * 2 * CLASSES, min(MOST_FILLED, room * images // spec.value_bytes))
    sizes = (large // SMALLER, large)
    caches = [stage.filled(extracted, size) for size in sizes]
    checked = [min(stage.verify(cache) for _ in range(REPEATS)) for cache in caches]
    copies = [stage.pool(cache)[0] for cache in caches]
    pooling = [min(stage.pool(cache)[1] for _ in range(REPEATS)) for cache in caches]
    with open_cache(caches[1]) as cache, open_cache(copies[1]) as copy:
        table_bytes = cache.commit.files["rows.parquet"][0] / cache.spec.rows
        shard_rows = shard_rows_for(copy.spec.row_bytes(), copy.spec.chunk_rows, SHARD_BYTES)  # as h2t pool writes it
        vectors = replace(copy.spec, rows=spec.rows, shard_rows=shard_rows)
    costs = {"extract": extraction, "verify": line(sizes, checked), "pool": line(sizes, pooling)}
    costs["step"] = line(STEPS, stage.epoch(copies[1], STEPS))
    return Rehearsal(images, spec, vectors, table_bytes, costs, params)


def _extraction(stage: Stage, seconds: float) -> tuple[Path, Cost]:
    """(an extracted cache, the cost of extraction) from a run on a few images and one that takes `seconds` longer."""
    count = stage.params.batch_size + 2 * CLASSES
    _, first = stage.extract(count)  # loads what is loaded once in a process, so it is slower
    often = int(max(1, min(REPEATS, seconds / first)))
    small, shortest = count, min(stage.extract(count)[1] for _ in range(often))
    while True:
        count = min(GROWTH * count, MOST_IMAGES)
        cache, taken = stage.extract(count)
        if taken - shortest >= seconds or count == MOST_IMAGES:
            return cache, line((small, count), (shortest, taken))
        shutil.rmtree(cache)


def line(sizes: Sequence[int], seconds: Sequence[float]) -> Cost:
    """The cost whose line goes through both times.

    If that line falls or starts below 0, all of the longer time is `each`.
    """
    each = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    once = seconds[0] - each * sizes[0]
    return Cost(once, each) if each > 0 and once > 0 else Cost(0.0, seconds[1] / sizes[1])


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
