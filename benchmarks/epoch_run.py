"""An epoch of stage II in a process of its own, so that its memory can be measured. `bench_scale` starts it.

    python -m benchmarks.epoch_run stream CACHE --budget 209715200 --steps 100
    python -m benchmarks.epoch_run read CACHE          # the same batches from the same windows, without training
    python -m benchmarks.epoch_run bare CACHE          # every byte of the maps once, in order, by plain reads

Prints one JSON object: seconds, peak memory beyond that of the imports, what was read, a digest of the head weights.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import own_memory
from h2t.cache.reader import open_cache
from h2t.pipeline.heads.descent import Descent
from h2t.pipeline.heads.fusion import replaced_channels
from h2t.pipeline.project.stacks import feed_of, settings, stack_on, streams_of

WAYS = ("stream", "read", "bare")
BLOCK = 8 * 2**20  # bytes of a plain read
HEADS = settings([0.0, 0.3], [0])


def bare(path: str) -> dict[str, Any]:
    """Reads the shards of the cache in the directory `path` in order, on one thread."""
    files, block = sorted(Path(path).glob("maps.zarr/*/c.*")), bytearray(BLOCK)
    read, started = 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as shard:
            while size := shard.readinto(block):
                read += size
    return {"way": "bare", "seconds": time.perf_counter() - started, "bytes_read": read, "bytes_used": read}


def run(way: Literal["stream", "read"], path: str, budget: int, steps: int | None) -> dict[str, Any]:
    """One epoch, or its first `steps`."""
    if way == "stream":
        import_module("torch._dynamo")  # torch.func loads it at its first use: a cost of importing, whatever the data
    baseline = own_memory("VmRSS")
    with open_cache(path) as cache:
        streams = streams_of(cache, [0])
        total = streams.steps
        count = min(steps or total, total)
        started = time.perf_counter()
        feed = feed_of(streams, cache, "stream", pooled=False, budget=budget)
        prepared = time.perf_counter() - started
        stack = stack_on(feed, HEADS)
        descent = Descent(stack.state, {}, momentum=0.9, weight_decay=5e-4)
        started = time.perf_counter()
        for at in itertools.islice(feed.steps(1, draw=stack.draw), count):
            if way != "read":
                stack.step(at, descent, 0.02)
        seconds = time.perf_counter() - started
        row_bytes, meter = cache.spec.row_bytes(), feed.meter
        used = sum(streams.batch(0, step).labels.size * 2 for step in range(count)) * row_bytes
        weights = sha256(b"".join(t.detach().numpy().tobytes() for _, t in sorted(stack.state.items())))
        return {
            "way": way,
            "steps": count,
            "steps_of_an_epoch": total,
            "prepare_s": prepared,
            "seconds": seconds,
            "baseline_bytes": baseline,
            "peak_beyond_baseline_bytes": own_memory("VmHWM") - baseline,
            "cache_bytes": cache.spec.value_bytes,
            "bytes_read": meter.bytes_read,
            "bytes_used": used,
            "stall": meter.stall,
            "hit_rate": meter.hit_rate,
            "expected_hit_rate": feed.expected_hit_rate,
            "weights": weights.hexdigest(),
            "replaced": [replaced_channels(head.ratio, cache.spec.maps[0][0], "floor") for head in HEADS],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch_run", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("cache")
    parser.add_argument("--budget", type=int, default=200 * 2**20, help="bytes of features in host memory")
    parser.add_argument("--steps", type=int, help="stop after so many; a whole epoch by default")
    given = parser.parse_args(arguments)
    way, cache = given.way, given.cache
    print(json.dumps(bare(cache) if way == "bare" else run(way, cache, given.budget, given.steps)))


if __name__ == "__main__":
    main()
