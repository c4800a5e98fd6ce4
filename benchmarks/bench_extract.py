"""Extraction (images to a committed cache) against the bare forward pass over the same images, on the same device.

    python -m benchmarks.bench_extract --data DIR
    python -m benchmarks.bench_extract --data DIR --device cuda --arch resnet50 --size 224 --precision bf16
    python -m benchmarks.bench_extract --data DIR --model vit_base_patch16_224 --size 224 --images 512 --rounds 1

Turns alternate. Ours is `extract.run`, all of it: loading the backbone, decoding ahead, batches, forward pass,
conversion, crc, writing, fsync, commit. Bare is the backbone alone on batches that lie ready in memory, in the layout
that extraction uses. Both warm up on one batch. A third contestant extracts one batch alone: loading a large network
takes as long as thousands of images on a fast GPU, so the ratio is also given without this start.
"""

import shutil
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.measure import alternate, arguments, machine, ratio, save, table
from h2t.pipeline.base import device as devices
from h2t.pipeline.base import plugins
from h2t.pipeline.base.params import build
from h2t.pipeline.base.precision import computing
from h2t.pipeline.base.run import Run, silent
from h2t.pipeline.data.images import Images, Transform
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.extraction.on_gpu import memory_format
from h2t.pipeline.networks.backbone import build_backbone
from h2t.pipeline.networks.trained import load_backbone
from h2t.pipeline.networks.weights import save_weights
from h2t.pipeline.stages import extract

WANTED = 0.95  # of the bare forward pass's images per second
ARCH = "resnet32"
ROWS, TINY_ROWS = 16384, 64  # enough that starting and committing do not count
SIZE = 32
READY, READY_BYTES = 128, 2 * 2**30  # most batches in memory for the bare pass, which begins again with the first


def inputs(
    folder: Path, rows: int, arch: str, size: int, given: dict[str, Any] | None = None
) -> tuple[Samples, Images, Path]:
    """Random images as samples of ten classes, half for training, and a backbone with random weights.

    `given`: the backbone's options.
    """
    mean = [0.5, 0.5, 0.5]
    transform = Transform(size=size, mean=mean, std=mean)
    half = rows // 2
    sources = [f"{i:06}" for i in range(rows)]
    digests = [sha256(source.encode()).hexdigest() for source in sources]
    table = pa.table(
        {
            "sample": np.arange(rows),
            "split": ["test"] * (rows - half) + ["train"] * half,
            "label": pa.array(np.concatenate([np.arange(rows - half) % 10, np.arange(half) % 10]), pa.int32()),
            "source": sources,
            "digest": digests,
        }
    )
    counts = np.bincount(np.arange(half) % 10).tolist()
    facts = {
        "classes": [str(j) for j in range(10)],
        "counts": counts,
        "dataset": "synthetic",
        "transform": transform.model_dump(),
    }
    pixels = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)

    def decoder(data: bytes) -> np.ndarray:
        image: np.ndarray = pixels[int(data) % len(pixels)]
        return image

    images = Images(sources, digests, str.encode, decoder, transform)
    module = plugins.load("backbones", arch)
    torch.manual_seed(0)
    backbone = build_backbone(module, build(module.Options, "--model", given or {}), size)
    stated = {"input": {"size": size}} if hasattr(module, "input") else {}
    about = {"arch": arch, "options": given or {}, "channels": backbone.channels, "experts": 1, **stated}
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "backbone.safetensors", backbone.state_dict(), about)
    return Samples(table, facts), images, folder


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_extract", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="auto")
    parser.add_argument("--arch", default=ARCH)
    parser.add_argument("--model", help="a network of timm in place of --arch")
    parser.add_argument("--features", default="map", help="of --model: map, tokens or cls")
    parser.add_argument("--size", type=int, default=SIZE, help="of the images, pixels")
    parser.add_argument("--precision", default="float32", help="float32, bf16 or fp16")
    parser.add_argument("--images", type=int, default=ROWS)
    parser.set_defaults(rounds=5)
    options = parser.parse_args(given)
    about = machine()
    rows, rounds = (TINY_ROWS, 2) if options.tiny else (options.images, options.rounds)
    device = devices.choose(options.device)
    arch = "timm" if options.model else options.arch
    given_options = {"model": options.model, "features": options.features} if options.model else {}
    samples, images, folder = inputs(options.data / "backbone", rows, arch, options.size, given_options)
    params = extract.Params(batchnorm=["stage1"], batch_size=32 if options.tiny else 128, precision=options.precision)
    numbers = [list(range(i, min(i + params.batch_size, rows))) for i in range(0, rows, params.batch_size)]
    ready = max(2, min(READY, READY_BYTES // (12 * params.batch_size * options.size**2)))
    layout = memory_format(params.precision) if device.type == "cuda" else torch.contiguous_format
    lying_ready = [images.batch(n, [None] * len(n)).to(device, memory_format=layout) for n in numbers[:ready]]
    backbone, _ = load_backbone(folder)
    backbone.to(device)

    @torch.no_grad()
    def bare(batches: int = len(numbers)) -> None:
        with computing(device, params.precision):
            for i in range(batches):
                backbone(lying_ready[i % len(lying_ready)])
        if device.type == "cuda":
            torch.cuda.synchronize()

    def removed() -> None:
        shutil.rmtree(options.data / "cache", ignore_errors=True)

    passes: list[float] = []

    def ours(of: Samples = samples) -> None:
        made = extract.run(params, Run("bench", options.data / "cache", device, say=silent), of, images, folder)
        if of is samples:
            passes.append(made.forward_seconds)

    def start() -> None:
        ours(Samples(samples.table.slice(rows - params.batch_size), samples.facts))

    bare(1)
    removed()
    start()
    contestants = {"bare": bare, "ours": ours, "start": start}
    timings = alternate(contestants, rounds, removed, slow_rounds=rounds, warm_up=False)
    of_bare = ratio(timings["bare"], timings["ours"])
    share = 1 - params.batch_size / rows  # of the images, without those of the start
    running = timings["ours"].median - timings["start"].median
    without_start = share * timings["bare"].median / running if running > 0 else None
    removed()
    body: dict[str, Any] = {
        "tiny": options.tiny,
        "machine": {**about, "versions": {**about["versions"], "torch": version("torch")}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "case": f"{rows} images {options.size}x{options.size}, {options.model or arch}, {params.precision}, "
        f"batches of {params.batch_size}",
        "images_per_second": {name: rows / timings[name].median for name in ("bare", "ours")},
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "seconds_in_passes": passes,  # of ours
        "cpu_seconds": {name: timing.cpu for name, timing in timings.items()},
        "of_bare": of_bare,
        "without_start": without_start,
        "wanted": WANTED,
    }
    save(options.out, body)
    print(body["case"], "on", body["device"])
    lines = [[name, f"{rate:.0f}"] for name, rate in body["images_per_second"].items()]
    print(table(["", "images/s"], lines))
    spread = f"{of_bare['p10']:.3f} to {of_bare['p90']:.3f}"
    print(f"ours / bare: {of_bare['median']:.3f} ({spread}), by CPU seconds {of_bare['cpu']:.3f}; wanted {WANTED}")
    if without_start is not None:
        print(f"start: {timings['start'].median:.1f} s; ours without it / bare: {without_start:.3f}")


if __name__ == "__main__":
    main()
