"""One way of feeding stage II, in a process of its own so that its memory can be measured. `bench_epoch` starts it.

    python -m benchmarks.epoch_run stream CACHE --budget 209715200 --steps 100

Prints one JSON object: seconds, peak memory beyond that of the imports, what was read, a digest of the head weights.
The way of feeding is all that differs: batches, heads and optimiser are the same.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # what torch.func loads at its first use: a cost of importing, whatever the data

from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.heads.batches import Batch, Streams
from h2t.pipeline.heads.features import FeatureReader, FeatureTable
from h2t.pipeline.heads.fusion import replaced_channels
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import Choice, Feed, Step
from h2t.pipeline.heads.stack import HeadSetting, Stack
from h2t.pipeline.heads.stored import HeadParts, build_head
from h2t.pipeline.networks.trained import StageOneHead

CPU = torch.device("cpu")
WAYS = ("stream", "memory", "oindex", "dataloader")
HEADS = [HeadSetting(0.0, "instance", "random", 0), HeadSetting(0.3, "instance", "random", 0)]
BATCH = 128


def memory(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (most so far) of this process, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def streams_of(cache: Cache) -> Streams:
    names = [str(label) for label in sorted(set(cache.rows["label"].to_pylist()))]
    return Streams(cache.rows, names, "stage1", {"instance": "stage1"}, [0], BATCH)


class ZarrArray:
    """Rows of expert 0 by zarr-python, sorted and without repeats, as its users do it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.array: Any = None

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        import zarr

        if self.array is None:  # opened where it is used: worker processes have their own
            self.array = zarr.open_group(f"{self.path}/maps.zarr", mode="r")["expert_0"]
        return torch.from_numpy(self.array.oindex[rows])


class StepDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Item s: the distinct rows of step s, (n, C, H, W)."""

    def __init__(self, path: str, wanted: list[np.ndarray]) -> None:
        self.source, self.wanted = ZarrArray(path), wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, step: int) -> torch.Tensor:
        return self.source.rows(self.wanted[step])


def distinct(batch: Batch) -> np.ndarray:
    return np.unique(np.concatenate([batch.receivers.ravel(), batch.donors.ravel()]))


def peer_steps(way: str, path: str, feed: Feed, steps: int, workers: int) -> Iterator[Step]:
    """The same steps, their rows read by zarr-python here or in the workers of a DataLoader."""
    batches = [feed.streams.batch(0, step) for step in range(steps)]
    wanted = [distinct(batch) for batch in batches]
    if way == "oindex":
        source = ZarrArray(path)
        values: Iterator[torch.Tensor] = map(source.rows, wanted)
    else:
        context = "forkserver" if workers else None  # a forked child inherits zarr's locks, and hangs
        loader = torch.utils.data.DataLoader(
            StepDataset(path, wanted), batch_size=None, num_workers=workers, multiprocessing_context=context
        )
        values = iter(loader)
    for step, (batch, rows, maps) in enumerate(zip(batches, wanted, values, strict=True)):
        yield Step(0, step, batch, FeatureTable(rows, maps[None], torch.float32, CPU))


class NoFeed(Feed):
    """A feed for peers: batches and shapes, nothing read."""

    def __init__(self, streams: Streams, reader: FeatureReader) -> None:
        self.streams, self.reader, self.device, self.dtype = streams, reader, CPU, torch.float32
        self.experts, self.shape, self.meter = reader.cache.experts, reader.shape, reader.meter
        self.expected_hit_rate = None


def run(way: str, path: str, budget: int, steps: int | None, workers: int) -> dict[str, Any]:
    """One epoch, or its first `steps`."""
    baseline = memory("VmRSS")
    with open_cache(path) as cache:
        streams = streams_of(cache)
        total = streams.steps
        count = min(steps or total, total)
        started = time.perf_counter()
        reader = FeatureReader(cache, None)
        ours = way in ("stream", "memory")
        feed = Feed(streams, reader, Choice(way, "asked"), budget, CPU, quiet) if ours else NoFeed(streams, reader)  # type: ignore[arg-type]
        prepared = time.perf_counter() - started
        channels = cache.spec.maps[0][0]
        context = Context(torch.from_numpy(streams.index.counts), channels, cache.experts)
        draws = torch.Generator().manual_seed(0)
        weight = torch.randn(cache.experts, context.classes, channels, generator=draws) * 0.1
        stage1 = StageOneHead({"weight": weight, "bias": torch.zeros(cache.experts, context.classes)}, "linear", 1.0)
        head = build_head(HeadParts("dr", {}, "linear", 1.0, "gap", {}, "hosts.dr"), context)
        stack = Stack(head, HEADS, feed)
        stack.start(stage1)
        optimiser = torch.optim.SGD(list(stack.state.values()), lr=0.02, momentum=0.9, weight_decay=5e-4)
        started = time.perf_counter()
        source = feed.steps(1) if ours else peer_steps(way, path, feed, count, workers)
        first = 0.0
        for at in itertools.islice(source, count):
            stack.step(at, optimiser)
            first = first or time.perf_counter() - started  # workers start once in an epoch, not once a step
        seconds = time.perf_counter() - started
        epoch = first + (seconds - first) * (total - 1) / max(1, count - 1)
        row_bytes, meter = cache.spec.row_bytes(), reader.meter
        used = sum(streams.batch(0, step).labels.size * 2 for step in range(count)) * row_bytes
        weights = sha256(b"".join(t.detach().numpy().tobytes() for _, t in sorted(stack.state.items())))
        return {
            "way": way,
            "steps": count,
            "steps_of_an_epoch": total,
            "prepare_s": prepared,
            "seconds": seconds,
            "first_step_s": first,
            "epoch_s": prepared + epoch,
            "useful_gb_per_s": used * total / count / epoch / 1e9,
            "baseline_bytes": baseline,
            "peak_beyond_baseline_bytes": memory("VmHWM") - baseline,
            "cache_bytes": cache.spec.value_bytes,
            "bytes_read": meter.bytes_read,
            "bytes_used": used,
            "stall": meter.stall,
            "hit_rate": meter.hit_rate,
            "expected_hit_rate": feed.expected_hit_rate,
            "weights": weights.hexdigest(),
            "replaced": [replaced_channels(head.ratio, channels, "floor") for head in HEADS],
        }


def quiet(line: str) -> None:
    """Takes what the feed says."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch_run", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("cache")
    parser.add_argument("--budget", type=int, default=200 * 2**20, help="bytes of features in host memory")
    parser.add_argument("--steps", type=int, help="stop after so many; a whole epoch by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the DataLoader")
    given = parser.parse_args(arguments)
    print(json.dumps(run(given.way, given.cache, given.budget, given.steps, given.workers)))


if __name__ == "__main__":
    main()
