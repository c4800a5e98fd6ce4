"""The probe beside scikit-learn's L-BFGS: the same pooled matrix and penalty, in turns, in one process.

    python -m benchmarks.bench_probe                                 # 5,000 x 512, 50 classes, made up
    python -m benchmarks.bench_probe --cache data/extract/resnet50   # the training rows of a cache

Times are processor seconds on one thread, as libraries differ in how their threads wait. Both start from zero and stop
by their own rule, scikit-learn at its default tolerance (1e-4), so the losses that they reach stand beside the times;
the lower one is nearer to the optimum.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from benchmarks.measure import RESULTS, machine, save
from h2t.cache.reader import open_cache
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.networks import probe
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.probe import Probe


def made_up(rows: int, channels: int, classes: int, ratio: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features after a ReLU, float32 (n, channels), of long-tailed classes, and labels (n,)."""
    draws = np.random.default_rng(0)
    share = ratio ** (-np.arange(classes) / (classes - 1))
    labels = np.repeat(np.arange(classes), np.maximum(2, (rows * share / share.sum()).astype(int)))
    centres = 0.5 * np.abs(draws.standard_normal((classes, channels)))
    mixing = 0.7 * draws.standard_normal((channels, channels)) / np.sqrt(channels)
    values = np.maximum(0, centres[labels] + draws.standard_normal((len(labels), channels)) @ mixing + 0.2)
    return torch.from_numpy(values).float(), torch.from_numpy(labels)


def of_cache(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features of the training rows of a cache, (n, C), and their labels (n,)."""
    with open_cache(path) as cache:
        rows = sample_rows(cache.rows, "train", "stage1")
        return FeatureReader(cache, global_average).read(rows.first)[0], torch.from_numpy(rows.labels)


def loss(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, l2: float) -> float:
    """What both minimise, in float64."""
    weight = weight.double()
    return float(F.cross_entropy(x.double() @ weight.T + bias.double(), y) + l2 / 2 * weight.square().sum())


def compare(x: torch.Tensor, y: torch.Tensor, l2: float, rounds: int) -> dict[str, float]:
    """Median processor seconds of each, their ratio, and the losses."""
    classes, plain, labels = int(y.max()) + 1, x.numpy(), y.numpy()

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        state = probe.fit(x, y, classes, Probe(l2=l2), "linear")
        return state["weight"][0], state["bias"][0]

    def peer() -> tuple[torch.Tensor, torch.Tensor]:
        fitted = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=1000).fit(plain, labels)
        return torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)

    ways: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {"probe": ours, "scikit-learn": peer}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for turn in range(rounds + 1):  # the first is not counted: imports, memory
        for name, way in ways.items():
            started = time.process_time()
            found = way()
            if turn:
                seconds[name].append(time.process_time() - started)
            losses[name] = loss(*found, x, y, l2)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        **{f"{name} seconds": value for name, value in medians.items()},
        "ratio": medians["probe"] / medians["scikit-learn"],
        **{f"{name} loss": value for name, value in losses.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--l2", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "probe.json")
    given = parser.parse_args()
    x, y = of_cache(given.cache) if given.cache else made_up(given.rows, given.channels, given.classes)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        found = compare(x, y, given.l2, given.rounds)
    for name, value in found.items():
        print(f"{name:22} {value:.5g}")
    about = {"rows": len(y), "channels": x.shape[1], "classes": int(y.max()) + 1, "l2": given.l2}
    save(given.out, {"machine": machine(), **about, **found})


if __name__ == "__main__":
    main()
