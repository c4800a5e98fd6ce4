"""Metrics from logits: accuracy overall, per class and per class group (head, medium, tail), and calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from h2t.pipeline.data.classes import GROUPS

BINS = 15


def confusion(labels: np.ndarray, guesses: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The confusion matrix as (true, predicted, count) of the pairs that occur, int64 (pairs,) each.

    Sorted by true class, then by predicted class. A full matrix of 100,000 classes would take 80 GB.
    """
    pairs, count = np.unique(labels.astype(np.int64) * classes + guesses, return_counts=True)
    return *np.divmod(pairs, classes), count


def per_class_accuracy(labels: np.ndarray, guesses: np.ndarray, classes: int) -> np.ndarray:
    """Accuracy of each class in percent, float64 (classes,); NaN for a class without samples."""
    totals = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[guesses == labels], minlength=classes)
    return np.where(totals > 0, 100 * right / np.maximum(totals, 1), np.nan)


def group_accuracy(accuracy: np.ndarray, group_of: Sequence[str | None]) -> dict[str, float | None]:
    """Mean of `accuracy` (classes,) over the classes of each group; None for a group without samples.

    `group_of` names the group of each class. Classes without samples (NaN) are left out.
    """
    means: dict[str, float | None] = {}
    for group in GROUPS:
        members = [a for a, g in zip(accuracy.tolist(), group_of, strict=True) if g == group and not np.isnan(a)]
        means[group] = float(np.mean(members)) if members else None
    return means


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (ECE) in percent, over `bins` bins of equal width.

    Bin b is (b / bins, (b + 1) / bins]; confidence 0 belongs to bin 0. `confidence` lies in [0, 1], `right` is 1 for a
    correct prediction, else 0; both (n,). Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    eq. (3).
    """
    place = _bins(confidence, bins)
    gap = np.bincount(place, right - confidence, minlength=bins)
    return float(100 * np.abs(gap).sum() / len(confidence))


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, float | int | None]]:
    """Samples, mean confidence and accuracy (percent; None if empty) of each bin of `expected_calibration_error`."""
    place = _bins(confidence, bins)
    lines: list[dict[str, float | int | None]] = []
    for b in range(bins):
        inside = place == b
        count = int(inside.sum())
        mean, share = (float(100 * v[inside].mean()) if count else None for v in (confidence, right))
        edges = {"low": 100 * b / bins, "high": 100 * (b + 1) / bins}
        lines.append({"bin": b, "count": count, **edges, "confidence": mean, "accuracy": share})
    return lines


def _bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def softmax_confidence(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The largest softmax probability of each row of logits / temperature; logits (n, classes), result float64 (n,)."""
    shifted = (logits.astype(np.float64) - logits.max(1, keepdims=True)) / temperature
    return 1 / np.exp(shifted).sum(1)


@dataclass(frozen=True)
class Answers:
    """A classifier's predictions for n samples: class, int32 (n,), and confidence in [0, 1], float64 (n,)."""

    guesses: np.ndarray
    confidence: np.ndarray

    BYTES: ClassVar[int] = 4 + 8  # of one sample


def answers(logits: np.ndarray, temperature: float = 1.0) -> Answers:
    """Predictions from logits (n, classes); their confidence is that of logits / temperature.

    Among equal largest logits, the first class is predicted.
    """
    return Answers(logits.argmax(1).astype(np.int32), softmax_confidence(logits, temperature))


def summary(predicted: Answers, labels: np.ndarray, group_of: Sequence[str | None]) -> dict[str, float | None]:
    """top1, head, medium, tail and ece in percent. `labels` is int (n,); `group_of` has one entry per class."""
    accuracy = per_class_accuracy(labels, predicted.guesses, len(group_of))
    right = predicted.guesses == labels
    return {
        "top1": float(100 * right.mean()),
        **group_accuracy(accuracy, group_of),
        "ece": expected_calibration_error(predicted.confidence, right.astype(float)),
    }


def over_seeds(figures: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean and standard deviation (`<name>_std`, ddof 1) of each figure over seeds.

    The mean is None if any seed lacks the figure; so is the standard deviation, also with a single seed.
    """
    result: dict[str, float | None] = {}
    for name in figures[0]:
        values = [v for f in figures if (v := f[name]) is not None]
        whole = len(values) == len(figures)
        result[name] = float(np.mean(values)) if whole else None
        result[f"{name}_std"] = float(np.std(values, ddof=1)) if whole and len(values) > 1 else None
    return result
