"""Fifty-five linear classifiers on the same pooled features: our stack beside scikit-learn and a plain PyTorch loop.

    python -m benchmarks.bench_peers                     # CIFAR-10-LT features of examples/cifar10_lt, about 10 minutes
    python -m benchmarks.bench_peers --cache data/extract/ce_mixup

All train without H2T, on one view of every training image in memory, and count every class alike. The stack and the
loop train 11 learning rates x 5 seeds by SGD from the same start, for as many steps of as many samples; scikit-learn
fits 55 penalties, in a loop and by joblib on all cores. Each has its own stopping rule, so the accuracy on test images
stands beside the seconds. Every contestant first fits one classifier that is not timed, for its imports; joblib's new
processes import again. All but joblib compute on one thread; the stack draws its batches in a second one. Processor
seconds count all threads and processes.

At the end the stack trains the 660 heads of the paper's grid (11 ratios, 3 donors, 4 selections, 5 seeds).
"""

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from joblib.externals.loky import get_reusable_executor  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from benchmarks.measure import RESULTS, machine, save, timed
from benchmarks.tables import peers_table
from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.heads.batches import SampleRows, Streams, sample_rows
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.fusion import Selection
from h2t.pipeline.heads.parts import grouped
from h2t.pipeline.heads.setting import HeadSetting, Optimiser
from h2t.pipeline.heads.step_size import seeds_and_donors
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.project.stacks import RATIOS, SEEDS, feed_of, stack_on
from h2t.pipeline.reporting.published import different_runs

CACHE = Path(__file__).parents[1] / "examples" / "cifar10_lt" / "data" / "extract" / "ce_mixup"
RATES = np.geomspace(0.005, 0.32, 11).tolist()
PENALTIES = np.geomspace(1e-4, 1e-1, 55).tolist()
DONORS: Sequence[str] = ("instance", "balanced", "reverse")
SELECTIONS: Sequence[Selection] = ("random", "first", "middle", "last")

Classifiers = tuple[np.ndarray, np.ndarray]  # weights (K, N, C) and biases (K, N)


@dataclass(frozen=True)
class Task:
    """Features float32 (n, C) and labels int64 (n,) of the training and of the test rows; `cache` holds the same."""

    cache: Cache
    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    settings: Optimiser

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (N, C) and bias (N,) that the loop starts from: those of `stack_on`."""
        draws = torch.Generator().manual_seed(0)
        return 0.1 * torch.randn(self.classes, self.x.shape[1], generator=draws), torch.zeros(self.classes)


def load(cache: Cache, settings: Optimiser) -> Task:
    """One view of every training and test image of `cache`."""
    reader = FeatureReader(cache, global_average)
    parts: list[torch.Tensor] = []
    for split in ("train", "test"):
        rows: SampleRows = sample_rows(cache.rows, split, "stage1")
        parts += [reader.read(rows.first)[0], torch.from_numpy(rows.labels)]
    x, y, test_x, test_y = parts
    return Task(cache, x, y, test_x, test_y, settings)


def stack(task: Task, heads: Sequence[HeadSetting]) -> Classifiers:
    """Our stack, as stage II trains it."""
    heads = [heads[place] for place in grouped(heads)]
    rows = task.cache.rows.filter(pc.equal(task.cache.rows["view"], 0))
    names, donors = [str(i) for i in range(task.classes)], {head.donor: "stage1" for head in heads}
    seeds = sorted({head.seed for head in heads})
    streams = Streams(rows, names, "stage1", donors, seeds, task.settings.batch_size, epochs=task.settings.epochs)
    trained = stack_on(feed_of(streams, task.cache, "memory").of(*seeds_and_donors(heads)), heads)
    trained.train(task.settings, "bench", lambda epoch, losses: None)
    return trained.state["weight"].detach()[:, 0].numpy(), trained.state["bias"].detach()[:, 0].numpy()


def loop(task: Task, heads: Sequence[HeadSetting]) -> Classifiers:
    """One classifier after the other, as one would write it in PyTorch."""
    counts = torch.bincount(task.y)
    starts = torch.cumsum(counts, 0) - counts
    order = torch.argsort(task.y, stable=True)
    size = task.settings.batch_size
    found = []
    for head in heads:
        own, draws = task.settings.of(head), torch.Generator().manual_seed(head.seed)
        layer = torch.nn.Linear(task.x.shape[1], task.classes)
        with torch.no_grad():
            for parameter, value in zip(layer.parameters(), task.start(), strict=True):
                parameter.copy_(value)
        descent = torch.optim.SGD(layer.parameters(), own.lr, own.momentum, weight_decay=own.weight_decay)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(descent, own.epochs)
        for _ in range(own.epochs):
            label = torch.randint(task.classes, (len(task.y),), generator=draws)
            place = (torch.rand(len(task.y), generator=draws) * counts[label]).long()
            for batch in order[starts[label] + place].split(size):
                descent.zero_grad()
                F.cross_entropy(layer(task.x[batch]), task.y[batch]).backward()
                descent.step()
            falling.step()
        found.append([parameter.detach().numpy() for parameter in layer.parameters()])
    weights, biases = zip(*found, strict=True)
    return np.stack(weights), np.stack(biases)


def _fitted(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=1 / (penalty * len(y)), class_weight="balanced", max_iter=1000).fit(x, y)
    return model.coef_, model.intercept_


def scikit(task: Task, penalties: Sequence[float], jobs: int) -> Classifiers:
    """Logistic regression of scikit-learn at its default tolerance, with so many processes."""
    x, y = task.x.numpy(), task.y.numpy()
    if jobs == 1:
        found = [_fitted(x, y, penalty) for penalty in penalties]
    else:
        found = Parallel(n_jobs=jobs)(delayed(_fitted)(x, y, penalty) for penalty in penalties)
        get_reusable_executor().shutdown(wait=True)  # the processor time of a process counts when it has ended
    weights, biases = zip(*found, strict=True)
    return np.stack(weights), np.stack(biases)


def accuracy(task: Task, found: Classifiers) -> np.ndarray:
    """Top-1 on the test images of each classifier, percent (K,)."""
    weights, biases = (torch.from_numpy(part).float() for part in found)
    guesses = (task.test_x @ weights.mT + biases[:, None]).argmax(-1)
    return 100 * (guesses == task.test_y).double().mean(1).numpy()


def compare(task: Task, rates: Sequence[float], seeds: Sequence[int], penalties: Sequence[float]) -> dict[str, Any]:
    """Contestant -> seconds, cpu, and the mean and best accuracy of its classifiers."""
    heads = [HeadSetting(0.0, "instance", "random", s, constants=(("lr", lr),)) for lr in rates for s in seeds]
    short = Task(**{**vars(task), "settings": task.settings.model_copy(update={"epochs": 1})})
    ways: dict[str, tuple[Callable[[], Classifiers], Callable[[], Classifiers]]] = {
        "ours": (lambda: stack(short, heads[:1]), lambda: stack(task, heads)),
        "PyTorch loop": (lambda: loop(short, heads[:1]), lambda: loop(task, heads)),
        "scikit-learn loop": (lambda: scikit(task, penalties[-1:], 1), lambda: scikit(task, penalties, 1)),
        "scikit-learn joblib": (
            lambda: scikit(task, penalties[-1:], 1),
            lambda: scikit(task, penalties, os.cpu_count() or 1),
        ),
    }
    body = {}
    for name, (first, whole) in ways.items():
        first()
        with timed() as spent:
            found = whole()
        top1 = accuracy(task, found)
        body[name] = {
            **spent,
            "classifiers": len(top1),
            "mean_top1": float(top1.mean()),
            "best_top1": float(top1.max()),
        }
        print(f"{name}: {spent['cpu']:.1f} s of processor time, {spent['seconds']:.1f} s by the clock", flush=True)
    return body


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--tiny", action="store_true", help="few classifiers, one epoch: does it work, not how fast")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = Optimiser(epochs=1 if options.tiny else 10)
    about = machine()
    with open_cache(options.cache) as cache:
        task = load(cache, settings)
        few = slice(2 if options.tiny else None)
        contestants = compare(task, RATES[few], SEEDS[few], PENALTIES[-4:] if options.tiny else PENALTIES)
        grid = [
            HeadSetting(r, d, w, s) for r, d, w, s in product(RATIOS[few], DONORS[few], SELECTIONS[few], SEEDS[few])
        ]
        with timed() as spent:
            stack(task, grid)
    twice, once = different_runs(pd.DataFrame([vars(head) for head in grid]))  # with two passes a step, and with one
    body = {
        "benchmark": "peers",
        "machine": about,
        "load_after": os.getloadavg()[0],
        "tiny": options.tiny,
        "samples": len(task.y),
        "channels": task.x.shape[1],
        "classes": task.classes,
        "contestants": contestants,
        "grid": {**spent, "classifiers": len(grid), "twice": twice, "once": once},
    }
    save(options.out, body)
    print(peers_table(contestants))
    print(
        f"{len(grid)} heads of the grid: {spent['cpu']:.1f} s of processor time, {spent['seconds']:.1f} s by the clock"
    )


if __name__ == "__main__":
    main()
