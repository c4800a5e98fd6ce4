"""Memory of an extraction by its rows: maps of 1x1x1 and images of 48 bytes.

    python -m benchmarks.bench_extract_rows --data DIR                   # 2,000,000 and 10,000,000 images
    python -m benchmarks.bench_extract_rows --data DIR --images 200000

Two processes do what grows with the rows: `part` reads the sample table, estimates batch-norm statistics, plans all
rows and extracts the first shard; `commit` makes the cache. The other shards are zeros, written in between, because
millions of forward passes would take hours. Of the peak, `anonymous` is what the kernel cannot drop: sample tables
beyond 16 MiB lie in a temporary file. Bytes a row are the difference between all images and a fifth of them.
"""

import argparse
import json
import os
import shutil
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.bench_rows import CLASSES, runs
from benchmarks.bench_scale import step
from benchmarks.measure import arguments, machine, save, table
from h2t.cache.format.spec import CacheSpec
from h2t.cache.write.parts import Part, PartWriter

IMAGES, TINY_IMAGES = 10_000_000, 20_000
MOST = 100  # bytes a row
PIECE = 2**18
SHARD_BYTES = 2**18
PLUGIN = '''"""One number an image."""

import torch
from h2t.pipeline.base.params import Section
from torch import nn


class Options(Section):
    pass


class OneNumber(nn.Sequential):
    channels, experts = 1, 1

    def forward(self, x):
        return (super().forward(x),)


def build(options):
    return OneNumber(nn.Conv2d(3, 1, 4, bias=False), nn.BatchNorm2d(1))
'''


def write(folder: Path, images: int) -> None:
    """What prepare and train-backbone would write, and a project with the backbone's plug-in."""
    import torch

    from h2t.pipeline.data.images import Transform
    from h2t.pipeline.data.samples import SCHEMA
    from h2t.pipeline.networks.weights import save_weights

    (folder / "plugins/backbones").mkdir(parents=True)
    (folder / "plugins/backbones/one_number.py").write_text(PLUGIN)
    split, labels, counts = zip(*runs(images), strict=True)
    ends = np.cumsum(counts)
    with pq.ParquetWriter(folder / "samples.parquet", SCHEMA, compression="zstd") as file:
        for start in range(0, images, PIECE):
            row = np.arange(start, min(start + PIECE, images))
            run = np.searchsorted(ends, row, side="right")
            numbers = pc.utf8_lpad(pa.array(row).cast(pa.string()), 10, "0")
            sources = pc.binary_join_element_wise("synthetic/images", numbers, "/").to_pylist()
            columns = {
                "sample": row,
                "split": pa.array(split).take(pa.array(run)),
                "label": np.array(labels, np.int32)[run],
                "source": sources,
                "digest": [sha256(source.encode()).hexdigest() for source in sources],
            }
            file.write_table(pa.table([columns[name] for name in SCHEMA.names], SCHEMA))
    transform = Transform(size=4, mean=[0.5] * 3, std=[0.5] * 3).model_dump(mode="json")
    facts = {
        "classes": [f"class {j}" for j in range(CLASSES)],
        "counts": [count for one, _, count in runs(images) if one == "train"],
        "dataset": "synthetic",
        "transform": transform,
    }
    (folder / "classes.json").write_text(json.dumps(facts))
    state = {"0.weight": torch.rand(1, 3, 4, 4), "1.weight": torch.ones(1), "1.bias": torch.zeros(1)}
    state |= {"1.running_mean": torch.zeros(1), "1.running_var": torch.ones(1)}
    about = {"arch": "one_number", "options": {}, "channels": 1, "experts": 1}
    save_weights(folder / "backbone.safetensors", state, about)


def of_status(key: str) -> int:
    """A figure of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def run(folder: Path, step: str) -> dict[str, Any]:
    """Runs `part` or `commit` in `folder`, an absolute path: rows and peaks."""
    os.chdir(folder)
    from h2t.pipeline.base.run import Run
    from h2t.pipeline.data import images as data_images
    from h2t.pipeline.data.images import Images
    from h2t.pipeline.data.samples import Texts, load_samples
    from h2t.pipeline.stages import extract

    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], of_status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    samples = load_samples(folder)
    data_images.KEEP_DECODED_BYTES = 0  # real images fill that cache after a few thousand rows
    pixels = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), np.uint8)
    sources, digests = (Texts(samples.table[name]) for name in ("source", "digest"))
    images = Images(sources, digests, str.encode, lambda data: pixels[int(data[-2:]) % 64], samples.transform)
    params = extract.Params(batchnorm=["calibrated"], batchnorm_passes=2, batch_size=4096, shard_bytes=SHARD_BYTES)
    of = -(-len(extract.planned_rows(params, samples)) * 2 // SHARD_BYTES)
    how: dict[str, Any] = {"part": Part(1, of)} if step == "part" else {"commit": True}
    summary = extract.run(params, Run("rows", folder / "cache"), samples, images, folder, **how)
    done.set()
    watcher.join()
    if step == "part":
        fill(folder, summary.rows, extract.layout(params, 2, summary.rows))
    return {"rows": summary.rows, "anonymous": peak[0], "peak_bytes": of_status("VmHWM")}


def fill(folder: Path, rows: int, layout: tuple[int, int]) -> None:
    """Writes zeros as the shards that are missing."""
    chunk, shard_rows = layout
    spec = CacheSpec(
        rows=rows,
        maps=((1, 1, 1),),
        dtype="float16",
        codec="none",
        chunk_rows=chunk,
        shard_rows=shard_rows,
        fingerprint_inputs={},
    )
    (written,) = (folder / ".cache.staging").glob("parts.*")
    writer = PartWriter(written, spec)
    for shard in range(1, spec.shards):
        writer.write(shard, [np.zeros((len(spec.shard_range(shard)), 1, 1, 1), np.float16)])


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_extract_rows", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--images", type=int)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # what the benchmark starts itself with
    options = parser.parse_args(given)
    if options.step:
        print(json.dumps(run(Path(options.step[0]), options.step[1])))
        return
    about = machine()
    images = options.images or (TINY_IMAGES if options.tiny else IMAGES)
    results: list[dict[str, Any]] = []
    for count in (images // 5, images):
        folder = options.data.resolve() / f"extract-rows-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, count)
        for name in ("part", "commit"):
            print(f"{name} of {count:,} ...", flush=True)
            command = ["benchmarks.bench_extract_rows", "--data", str(options.data), "--step", str(folder), name]
            measured, said = step(command, count, {})
            found = {k: measured[k] for k in ("seconds", "cpu_s")} | json.loads(said.splitlines()[-1])
            results.append({"step": name, "images": count, **found})
        shutil.rmtree(folder)
    fifth, whole = results[:2], results[2:]
    rows = whole[0]["rows"] - fifth[0]["rows"]
    slope = max((large["anonymous"] - small["anonymous"]) / rows for small, large in zip(fifth, whole, strict=True))
    promises = {"bytes_a_row": slope, "allowed": MOST, "within_bound": slope <= MOST}
    save(
        options.out,
        {"benchmark": "extract-rows", "tiny": options.tiny, "machine": about, "runs": results, "promises": promises},
    )
    lines = [
        [one["step"], f"{one['rows']:,}", *(f"{one[k] / 1e6:.0f}" for k in ("anonymous", "peak_bytes"))]
        for one in results
    ]
    print(table(["step", "rows", "anonymous MB", "peak MB"], lines))
    print(f"{slope:.0f} bytes a row")
    if not options.tiny and slope > MOST:
        raise SystemExit(f"bench_extract_rows: at most {MOST} bytes of memory a row are allowed; got {slope:.0f}")


if __name__ == "__main__":
    main()
