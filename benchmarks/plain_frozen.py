"""What people write by hand for a frozen network: run it over the images, then fit scikit-learn to its features.

benchmarks.frozen runs this beside our stages, on the same images. Nothing of h2t is used here.
"""

import io
import itertools
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Weighting = Literal["balanced"] | None

BATCH = 128
#: Six settings, as many as hosts are trained: l2 and the weighting of samples.
SETTINGS: list[tuple[float, Weighting]] = [
    (l2, weighting) for l2 in (1e-4, 1e-3, 1e-2) for weighting in (None, "balanced")
]


@torch.no_grad()
def features(
    model: str,
    weights: Path,
    files: Mapping[str, str],
    sources: Mapping[str, Sequence[str]],
    stated: Mapping[str, Any],
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Split -> averaged maps, float32 (n, C), of its images. A source is a file's name, a colon and a row."""
    columns = {name: pq.ParquetFile(file).read(["image"])["image"] for name, file in files.items()}
    network = timm.create_model(model)
    network.load_state_dict(load_file(weights))
    network.eval().to(device)
    side = stated["size"]
    mean, std = (torch.tensor(stated[k])[:, None, None] for k in ("mean", "std"))
    filter_ = Image.Resampling[stated["interpolation"].upper()]

    def image(source: str) -> torch.Tensor:
        name, _, row = source.rpartition(":")
        picture = Image.open(io.BytesIO(columns[name][int(row)]["bytes"].as_py())).convert("RGB")
        pixels = np.array(picture.resize((side, side), filter_))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std

    found = {}
    with ThreadPoolExecutor() as threads:
        for split, names in sources.items():
            parts = []
            for first in range(0, len(names), BATCH):
                batch = torch.stack(list(threads.map(image, names[first : first + BATCH])))
                parts.append(network.forward_features(batch.to(device)).mean((2, 3)).cpu())
            found[split] = torch.cat(parts).numpy()
    return found


def logistic_regression(x: np.ndarray, labels: np.ndarray, l2: float, weighting: Weighting) -> LogisticRegression:
    """scikit-learn's own, at the penalty that corresponds to `l2` of a mean loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver = LogisticRegression(C=1 / (l2 * len(labels)), class_weight=weighting, max_iter=1000)
        return solver.fit(x, labels)


def fused(x: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Each row with a random share `ratio` of its channels taken from another row, drawn once."""
    draws = np.random.default_rng(seed)
    replaced = np.argsort(draws.random(x.shape), axis=1) < int(ratio * x.shape[1])
    return np.where(replaced, x[draws.permutation(len(x))], x)


def fits(
    of: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    ratios: Sequence[float],
    seeds: Sequence[int],
    seconds: float,
) -> int:
    """Fits and scores one classifier for each setting, ratio and seed, in random order, for at most so many `seconds`.

    Returns how many were fitted, at least one.
    """
    wanted = list(itertools.product(SETTINGS, ratios, seeds))
    started = time.perf_counter()
    for done, i in enumerate(np.random.default_rng(0).permutation(len(wanted))):
        if done and time.perf_counter() - started > seconds:
            return done
        (l2, weighting), ratio, seed = wanted[i]
        fitted = logistic_regression(fused(of["train"], ratio, seed), labels["train"], l2, weighting)
        for split in ("val", "test"):
            fitted.score(of[split], labels[split])
    return len(wanted)
