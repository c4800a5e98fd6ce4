"""Many heads in one stack beside the same heads trained one after another, in one process.

    python -m benchmarks.bench_stack                                  # 11 ratios x 5 seeds, 64 channels, 10 classes
    python -m benchmarks.bench_stack --device cuda --channels 2048 --classes 1000 --steps 50

Both train the same steps on pooled features that lie in memory already, so only training is timed: drawing rows and
channels, gathering, fusing, gradients, updates. Single runs draw for their own seed only. Contestants take turns; a
third one is a single head, as the unit of cost.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, Timing, alternate, machine, ratio, save, table
from benchmarks.synthetic import write_synthetic
from h2t.cache.reader import open_cache
from h2t.pipeline.base.device import choose
from h2t.pipeline.heads.residency import Feed
from h2t.pipeline.heads.setting import HeadSetting, Optimiser
from h2t.pipeline.heads.stack import Stack
from h2t.pipeline.project.stacks import BATCH, feed_of, settings, stack_on, streams_of


class Training:
    """One epoch of `steps` steps of any heads, on one cache in memory."""

    def __init__(self, cache: Path, device: torch.device) -> None:
        self.device = device
        self.cache = cache
        self._feeds: dict[tuple[int, ...], Feed] = {}

    def feed(self, seeds: tuple[int, ...]) -> Feed:
        """Features in memory and the batches of `seeds`; made once."""
        if seeds not in self._feeds:
            with open_cache(self.cache) as cache:
                self._feeds[seeds] = feed_of(streams_of(cache, seeds), cache, "device", self.device)
        return self._feeds[seeds]

    def run(self, heads: list[HeadSetting]) -> Stack:
        """Trains `heads` together."""
        stack = stack_on(self.feed(tuple(sorted({h.seed for h in heads}))), heads)
        stack.train(Optimiser(epochs=1), "bench", lambda epoch, losses: None)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return stack


def bench(training: Training, heads: list[HeadSetting], rounds: int) -> dict[str, Timing]:
    """Turns of the stack, of all single runs, and of one single run."""
    contestants: dict[str, Callable[[], object]] = {
        "stack": lambda: training.run(heads),
        "singles": lambda: [training.run([head]) for head in heads],
        "one head": lambda: training.run(heads[len(heads) // 2 :][:1]),
    }
    for seed in sorted({h.seed for h in heads}):
        training.feed((seed,))
    return alternate(contestants, rounds, slow_rounds=rounds)


def agreement(training: Training, heads: list[HeadSetting]) -> float:
    """The largest max|d| / max|w| between a head of the stack and the head alone, over a few heads."""
    together = {name: t.detach() for name, t in training.run(heads).state.items()}
    worst = 0.0
    for k in range(0, len(heads), max(1, len(heads) // 5)):
        alone = training.run([heads[k]]).state
        for name, tensor in ((n, t.detach()) for n, t in alone.items()):
            worst = max(worst, float((together[name][k] - tensor[0]).abs().max() / tensor.abs().max()))
    return worst


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_stack", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=RESULTS / "stack.json")
    parser.add_argument(
        "--data", type=Path, default=None, help="directory for the features; by default a temporary one"
    )
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tiny", action="store_true", help="few heads and steps: does it work, not how fast")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tiny:
        options.steps, options.rounds = 2, 2
    heads = settings()
    if options.tiny:
        heads = heads[::9]
    device = choose(options.device)
    about = {**machine(), "torch_threads": torch.get_num_threads()}
    about["versions"]["torch"] = torch.__version__
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.data or scratch) / f"stack-{options.channels}-{options.classes}-{options.steps}"
        rows = -(-options.steps * BATCH * 20 // 19) + 1
        if not (folder / "cache.json").is_file():
            write_synthetic(folder, rows, (options.channels, 1, 1), classes=options.classes)
        training = Training(folder, device)
        timings = bench(training, heads, options.rounds)
        distance = agreement(training, heads)
        steps = training.feed((0,)).streams.steps
    body: dict[str, Any] = {
        "benchmark": "stack",
        "machine": about,
        "load_after": os.getloadavg()[0],
        "tiny": options.tiny,
        "heads": len(heads),
        "channels": options.channels,
        "classes": options.classes,
        "batch": BATCH,
        "steps": steps,
        "rounds": options.rounds,
        "contestants": {name: timing.json() for name, timing in timings.items()},
        "stack_over_singles": ratio(timings["stack"], timings["singles"]),
        "stack_over_one_head": ratio(timings["stack"], timings["one head"]),
        "ms_per_step": {n: 1e3 * t.median / steps for n, t in timings.items()},
        "distance_to_heads_alone": distance,
    }
    save(options.out, body)
    lines = [
        (n, f"{t.median:.3f}", f"{1e3 * t.median / steps:.2f}", f"{statistics.median(t.cpu):.3f}")
        for n, t in timings.items()
    ]
    print(f"{len(heads)} heads, {options.channels} channels, {options.classes} classes, {steps} steps of {BATCH}")
    print(table(("contestant", "s", "ms a step", "CPU s"), lines))
    for name in ("stack_over_singles", "stack_over_one_head"):
        found = body[name]
        print(f"{name}: {found['median']:.3f} ({found['p10']:.3f} to {found['p90']:.3f}); CPU {found['cpu']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
