"""Writes a committed cache of random post-ReLU maps, with the class counts of a long-tailed dataset.

    python -m benchmarks.synthetic OUT --rows 131072 --map 64,8,8

The maps are standard normal values with the negative half set to zero, so half of the values are zeros scattered at
random. Values depend on the seed, the shard and the expert only: the same arguments write the same bytes. One shard at
a time is in memory.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from h2t.cache.format.rows import make_rows
from h2t.cache.format.spec import CacheSpec, chunk_rows_for, shard_rows_for
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter

SHARD_BYTES = 64 * 1024 * 1024
TEST_SHARE = 20  # every 20th row belongs to the test split, with equal class counts


def class_counts(rows: int, classes: int, imbalance: float) -> np.ndarray:
    """Exponential counts, largest class first, int64 (classes,): they sum to `rows`, and no class is empty.

    Before rounding, the largest class is `imbalance` times the smallest.
    """
    if rows < classes:
        raise ValueError(f"rows: at least one per class ({classes}); got {rows}")
    share = imbalance ** -(np.arange(classes) / max(1, classes - 1))
    ends = np.rint(np.cumsum(share) / share.sum() * (rows - classes)).astype(np.int64)
    return np.diff(ends, prepend=0) + 1


def row_table(rows: int, classes: int, imbalance: float) -> pa.Table:
    """A row table with `stage1` rows only: a long-tailed train split and a small balanced test split."""
    test = rows // TEST_SHARE
    train = class_counts(rows - test, classes, imbalance)
    labels = np.concatenate([np.repeat(np.arange(classes), train), np.arange(test) % classes])
    return rows_of(["train"] * (rows - test) + ["test"] * test, labels.tolist())


def rows_of(split: Sequence[str], label: Sequence[int]) -> pa.Table:
    """The row table of samples with one row each, under `stage1`."""
    sources = [f"synthetic/{i:09d}" for i in range(len(label))]
    return make_rows(
        {
            "sample": np.arange(len(label)),
            "view": np.zeros(len(label), np.int16),
            "statistics": ["stage1"] * len(label),
            "split": split,
            "label": label,
            "source": sources,
            "digest": [hashlib.sha256(s.encode()).hexdigest() for s in sources],
        }
    )


def relu_maps(shape: tuple[int, ...], dtype: str, key: Sequence[int]) -> np.ndarray:
    """Half-normal values with as many zeros, from the random stream named `key`. bfloat16 comes as its bits."""
    values = np.random.default_rng(list(key)).standard_normal(shape, np.float32)
    np.maximum(values, 0, out=values)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype, copy=False)


def write_synthetic(
    out: Path,
    rows: int,
    shape: tuple[int, int, int],
    *,
    classes: int = 100,
    imbalance: float = 100.0,
    codec: str = "none",
    dtype: str = "float16",
    experts: int = 1,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
) -> None:
    """Writes and commits the cache `out`, through the same writer as extraction."""
    row_bytes = int(np.prod(shape)) * (4 if dtype == "float32" else 2)
    chunk_rows = chunk_rows_for(row_bytes)
    settings = {"rows": rows, "map": list(shape), "classes": classes, "imbalance": imbalance, "seed": seed}
    counts = class_counts(rows - rows // TEST_SHARE, classes, imbalance).tolist()
    spec = CacheSpec(
        rows=rows,
        maps=(shape,) * experts,
        dtype=dtype,
        codec=codec,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows_for(row_bytes, chunk_rows, shard_bytes),
        fingerprint_inputs={"synthetic": settings, "backbone": {"weights": "none"}},
        provenance={"classes": [f"class {j}" for j in range(classes)], "counts": counts},
    )
    with Staging(out) as staging:
        writer = CacheWriter(staging, spec, row_table(rows, classes, imbalance), {"numpy": np.__version__})
        for shard in writer.pending:
            size = len(spec.shard_range(shard))
            writer.write(shard, [relu_maps((size, *shape), dtype, (seed, shard, e)) for e in range(experts)])
        statistics = save({"stage1/running_mean": np.zeros(shape[0], np.float32)})
        writer.commit(statistics, b"# Synthetic cache\n\nRandom maps for benchmarks; see `benchmarks/synthetic.py`.\n")


def map_shape(text: str) -> tuple[int, int, int]:
    """`C,H,W` as numbers."""
    channels, height, width = (int(n) for n in text.split(","))
    return channels, height, width


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.synthetic", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=Path, help="directory of the new cache")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--map", type=map_shape, required=True, metavar="C,H,W", dest="shape")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--imbalance", type=float, default=100.0, help="largest class over smallest class")
    parser.add_argument("--codec", default="none")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32", "bfloat16"])
    parser.add_argument("--experts", type=int, default=1)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    settings = vars(parser.parse_args(arguments))
    write_synthetic(settings.pop("out"), settings.pop("rows"), settings.pop("shape"), **settings)


if __name__ == "__main__":
    main()
