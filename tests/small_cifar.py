"""Stands in for CIFAR-10 where docs/results.md is followed in small: Parquet files and weights, named in cifar.yaml."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from image_builders import encoded
from PIL import Image
from safetensors.torch import save_file

from h2t.pipeline.base import plugins

CLASSES, SIDE = 10, 32


def write_images(path: Path, per_class: int, seed: int) -> None:
    """Noise around a colour of the class, as PNG."""
    draws = np.random.default_rng(seed)
    labels = [j for j in range(CLASSES) for _ in range(per_class)]
    images = []
    for label in labels:
        pixels = draws.integers(0, 120, (SIDE, SIDE, 3)) + np.array([12 * label, 120 - 12 * label, 60])
        images.append({"bytes": encoded(Image.fromarray(pixels.astype(np.uint8)), "png"), "path": None})
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int64())}), path)


def write_weights(path: Path) -> None:
    """A ResNet-32 as it starts, with a head."""
    torch.manual_seed(0)
    module = plugins.load("backbones", "resnet32")
    body = module.build(module.Options()).state_dict()
    save_file({**body, "fc.weight": torch.randn(CLASSES, 64) / 8, "fc.bias": torch.zeros(CLASSES)}, path)


def main() -> None:
    params = Path("cifar.yaml")
    values = yaml.safe_load(params.read_text(encoding="utf-8"))
    write_images(Path("small-train.parquet"), 24, 0)
    write_images(Path("small-test.parquet"), 5, 1)
    write_weights(Path("small.safetensors"))
    values["inputs"] = {"train": "small-train.parquet", "test": "small-test.parquet", "weights": "small.safetensors"}
    values["prepare"]["imbalance"]["ratio"] = 12.0
    values["extract"]["batchnorm_passes"] = 2
    params.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
