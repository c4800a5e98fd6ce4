"""Figures of the field from logits: accuracy overall, per class and per class group, and calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from h2t.pipeline.data.classes import GROUPS

BINS = 15


def confusion(labels: np.ndarray, guesses: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true, predicted, count) of every pair that occurs, by true and then predicted class; int64 (pairs,) each.

    Pairs and not a matrix: that of 100,000 classes would take 80 GB.
    """
    pairs, count = np.unique(labels.astype(np.int64) * classes + guesses, return_counts=True)
    return *np.divmod(pairs, classes), count


def per_class_accuracy(labels: np.ndarray, guesses: np.ndarray, classes: int) -> np.ndarray:
    """Percent right of each class, (classes,); NaN for a class without samples."""
    totals = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[guesses == labels], minlength=classes)
    return np.where(totals > 0, 100 * right / np.maximum(totals, 1), np.nan)


def group_accuracy(accuracy: np.ndarray, group_of: Sequence[str | None]) -> dict[str, float | None]:
    """Mean accuracy over the classes of each group that have samples; None for a group without any."""
    found: dict[str, float | None] = {}
    for group in GROUPS:
        members = [a for a, g in zip(accuracy.tolist(), group_of, strict=True) if g == group and not np.isnan(a)]
        found[group] = float(np.mean(members)) if members else None
    return found


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """ECE in percent over equal bins ((b / bins, (b + 1) / bins], right-closed; confidence 0 falls in the first.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. (3).
    """
    place = _bins(confidence, bins)
    gap = np.bincount(place, right - confidence, minlength=bins)
    return float(100 * np.abs(gap).sum() / len(confidence))


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, float | int | None]]:
    """Samples, mean confidence and accuracy in percent of equal bins, as `expected_calibration_error` cuts them."""
    place = _bins(confidence, bins)
    found: list[dict[str, float | int | None]] = []
    for b in range(bins):
        inside = place == b
        count = int(inside.sum())
        mean, share = (float(100 * v[inside].mean()) if count else None for v in (confidence, right))
        edges = {"low": 100 * b / bins, "high": 100 * (b + 1) / bins}
        found.append({"bin": b, "count": count, **edges, "confidence": mean, "accuracy": share})
    return found


def _bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def softmax_confidence(logits: np.ndarray) -> np.ndarray:
    """The largest softmax probability of each line of logits (n, classes), float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return 1 / np.exp(shifted).sum(1)


@dataclass(frozen=True)
class Answers:
    """What a classifier says of n samples: the class it guesses, and how sure it is, (n,) each."""

    guesses: np.ndarray
    confidence: np.ndarray


def answers(logits: np.ndarray) -> Answers:
    """Of logits (n, classes); the first of equal logits is the guess."""
    return Answers(logits.argmax(1), softmax_confidence(logits))


def summary(found: Answers, labels: np.ndarray, group_of: Sequence[str | None]) -> dict[str, float | None]:
    """top1, head, medium, tail and ece in percent; `group_of` has one entry for each class."""
    accuracy = per_class_accuracy(labels, found.guesses, len(group_of))
    right = found.guesses == labels
    return {
        "top1": float(100 * right.mean()),
        **group_accuracy(accuracy, group_of),
        "ece": expected_calibration_error(found.confidence, right.astype(float)),
    }


def over_seeds(figures: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean of each figure and its standard deviation (`<name>_std`, ddof 1); None where there is nothing to average."""
    result: dict[str, float | None] = {}
    for name in figures[0]:
        values = [v for f in figures if (v := f[name]) is not None]
        whole = len(values) == len(figures)
        result[name] = float(np.mean(values)) if whole else None
        result[f"{name}_std"] = float(np.std(values, ddof=1)) if whole and len(values) > 1 else None
    return result
