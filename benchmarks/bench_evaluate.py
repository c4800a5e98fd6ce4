"""Memory and time of `evaluate` and `report` on 1,000 classes, 50,000 test and 20,000 validation images and 55 heads.

    python -m benchmarks.bench_evaluate --data DIR                    # 0.6 GB in DIR, a quarter of an hour
    python -m benchmarks.bench_evaluate --data DIR --channels 64

The size of ImageNet-LT behind a ResNet-50: random vectors, 11 ratios x 5 seeds of host `dr`, trained for two steps.
Each command is a process of its own, whose peak includes all its imports. At most 2 GB are allowed.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from benchmarks.bench_rows import MOST_BYTES
from benchmarks.bench_scale import step
from benchmarks.measure import arguments, machine, memory, save, table
from benchmarks.synthetic import rows_of
from h2t.cache.format.spec import CacheSpec
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter

CLASSES, CHANNELS = 1000, 2048
OF_A_CLASS = {"train": 2, "val": 20, "test": 50}  # images
TINY_CLASSES, TINY_CHANNELS, TINY_OF_A_CLASS = 20, 64, {"train": 2, "val": 2, "test": 5}
STEPS = {
    "train-classifier": ["train-classifier", "dr", "cache", "backbone", "train_classifier/dr"],
    "evaluate": ["evaluate", "dr", "cache", "train_classifier/dr", "backbone", "evaluate/dr"],
    "report": ["report", "evaluate", "report"],
}
PARAMETERS = {
    "device": "cpu",
    "prepare": {"dataset": "digits"},
    "backbones": {"b": {"arch": "resnet50", "objective": "ce"}},
    "extract": {"batchnorm": ["stage1"]},
    "pool": {},
    "hosts": {
        "dr": {
            "host": "dr",
            "backbone": "b",
            "batchnorm": "stage1",
            "optimiser": {"epochs": 1, "batch_size": 1000},
            "grid": {"ratio": [i / 10 for i in range(11)], "seed": list(range(5))},
        }
    },
    "evaluate": {},
    "report": {},
}


def write(place: Path, classes: int, channels: int, of_a_class: Mapping[str, int]) -> None:
    """Writes a cache of random vectors, the head of its backbone, and parameters into `place`."""
    import torch

    from h2t.pipeline.networks.weights import save_weights, weights_digest

    draws = np.random.default_rng(0)
    backbone = {"none": torch.zeros(1)}  # evaluate reads its digest alone
    head = {"weight": torch.rand(1, classes, channels), "bias": torch.zeros(1, classes)}
    about = {"arch": "resnet50", "options": {}, "channels": channels, "experts": 1}
    (place / "backbone").mkdir(parents=True)
    save_weights(place / "backbone/backbone.safetensors", backbone, about)
    about |= {"objective": "ce", "classifier": "linear", "scale": 1.0}
    save_weights(place / "backbone/head.safetensors", head, about)
    split = [name for name, each in of_a_class.items() for _ in range(each * classes)]
    label = [j for each in of_a_class.values() for j in range(classes) for _ in range(each)]
    spec = CacheSpec(
        rows=len(label),
        maps=((channels, 1, 1),),
        dtype="float32",
        codec="none",
        chunk_rows=64,
        shard_rows=8192,
        fingerprint_inputs={"backbone": {"weights": weights_digest(backbone)}},
        provenance={"classes": [f"class {j}" for j in range(classes)], "counts": [of_a_class["train"]] * classes},
    )
    with Staging(place / "cache") as staging:
        writer = CacheWriter(staging, spec, rows_of(split, label), {"numpy": np.__version__})
        for shard in writer.pending:
            values = draws.random((len(spec.shard_range(shard)), channels, 1, 1), np.float32)
            writer.write(shard, [values])
        writer.commit(b"", b"# Random vectors\n")
    (place / "params.yaml").write_text(yaml.safe_dump(PARAMETERS), encoding="utf-8")


def run(name: str, place: Path, sizes: tuple[int, int, Mapping[str, int]]) -> None:
    """One step, in this process."""
    if name == "write":
        write(place, *sizes)
        return
    from h2t.pipeline.command_line.main import main as h2t

    os.chdir(place)
    h2t(STEPS[name], standalone_mode=False)


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_evaluate", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--step", choices=["write", *STEPS], help=argparse.SUPPRESS)  # what it starts itself with
    parser.add_argument("--channels", type=int)
    options = parser.parse_args(given)
    place = options.data / "evaluate"
    tiny, full = (TINY_CLASSES, TINY_CHANNELS, TINY_OF_A_CLASS), (CLASSES, options.channels or CHANNELS, OF_A_CLASS)
    sizes = tiny if options.tiny else full
    if options.step:
        run(options.step, place, sizes)
        print(json.dumps({"peak_bytes": memory("VmHWM")}))
        return
    about = machine()
    shutil.rmtree(place, ignore_errors=True)
    results = {}
    for name in ("write", *STEPS):
        print(f"{name} ...", flush=True)
        command = ["benchmarks.bench_evaluate", "--data", str(options.data.resolve()), "--step", name]
        command += ["--channels", str(sizes[1]), *(["--tiny"] if options.tiny else [])]
        measured, said = step(command, 0, {})
        results[name] = {k: measured[k] for k in ("seconds", "cpu_s")} | json.loads(said.splitlines()[-1])
    page = (place / "report/index.html").stat().st_size
    shutil.rmtree(place)
    promised = {name: results[name]["peak_bytes"] for name in ("evaluate", "report")}
    body = {
        "benchmark": "evaluate",
        "tiny": options.tiny,
        "machine": about,
        "case": {"classes": sizes[0], "channels": sizes[1], "images_of_a_class": sizes[2], "heads": 55},
        "steps": results,
        "page_bytes": page,
        "promises": {"allowed_bytes": MOST_BYTES, "within_bound": max(promised.values()) <= MOST_BYTES},
    }
    save(options.out, body)
    lines = [
        [n, f"{r['seconds']:.0f}", f"{r['cpu_s']:.0f}", f"{r['peak_bytes'] / 1e6:.0f}"] for n, r in results.items()
    ]
    print(table(["step", "s", "CPU s", "peak MB"], lines))
    if not options.tiny and max(promised.values()) > MOST_BYTES:
        raise SystemExit(f"bench_evaluate: at most {MOST_BYTES / 1e9:.0f} GB are allowed; got {promised}")


if __name__ == "__main__":
    main()
