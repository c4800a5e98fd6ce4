"""Metrics from logits: accuracy overall, per class and per class group (head, medium, tail), and calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from h2t.pipeline.data.classes import GROUPS

BINS = 15
AUROC = "auroc"


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


def calibration_gaps(predicted: "Answers", labels: np.ndarray) -> np.ndarray:
    """Each sample's share of the ECE, float64 (n,): their mean is `expected_calibration_error`, as a fraction.

    It is correctness minus confidence, with the sign of its bin's sum.
    """
    right = (predicted.guesses == labels).astype(float)
    place = _bins(predicted.confidence, BINS)
    gap = np.bincount(place, right - predicted.confidence, minlength=BINS)
    return np.sign(gap)[place] * (right - predicted.confidence)


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


@dataclass(frozen=True)
class Answers:
    """A classifier's predictions for n samples: class, int32 (n,), and confidence in [0, 1], float64 (n,).

    `score`: with two classes, the logit of class 1, the rarer, minus that of class 0, float32 (n,), if it is known.
    """

    guesses: np.ndarray
    confidence: np.ndarray
    score: np.ndarray | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Graded(Answers):
    """Predictions compared with the true classes.

    `rank`: how many classes come before the true one, int32 (n,). `loss`: minus the logarithm of the true class's
    probability, float64 (n,).
    """

    rank: np.ndarray
    loss: np.ndarray

    @staticmethod
    def bytes_each(classes: int) -> int:
        """The bytes that one sample takes."""
        return 4 + 8 + 4 + 8 + (4 if classes == 2 else 0)


def answers(logits: np.ndarray, labels: np.ndarray, temperature: float | np.ndarray = 1.0) -> Graded:
    """Predictions from logits (..., n, classes) for samples of the classes `labels`, int (n,); fields are (..., n).

    Confidence and loss are those of logits / temperature. Of equal logits, the first class comes first, for the
    predicted class as for ranks. (`top_k_accuracy_score` of scikit-learn puts the last one first, and sorts all
    classes.)
    """
    own = (..., np.arange(len(labels)), labels)
    of_own, classes = logits[own][..., None], logits.shape[-1]
    first = np.arange(classes) < labels[:, None]
    rank = np.count_nonzero(np.where(first, logits >= of_own, logits > of_own), axis=-1)
    shifted = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / temperature
    total = np.exp(shifted).sum(-1)
    score = logits[..., 1] - logits[..., 0] if classes == 2 else None
    guesses = logits.argmax(-1).astype(np.int32)
    return Graded(guesses, 1 / total, rank.astype(np.int32), np.log(total) - shifted[own], score=score)


def placements(score: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each image of two classes, the share of the other class's images that it is on the right side of.

    `score` (n,): larger for class 1; `labels`: int (n,), 0 or 1, both of which occur. Ties count half. float64 (n,);
    the mean over either class is the area under the ROC curve. Source: DeLong et al., "Comparing the Areas under Two or
    More Correlated Receiver Operating Characteristic Curves", Biometrics 44, 1988, eq. (4) and (5).
    """
    share = np.empty(len(score))
    for label in (0, 1):
        others, own = np.sort(score[labels != label]), score[labels == label]
        below, upto = (np.searchsorted(others, own, side) for side in ("left", "right"))
        share[labels == label] = (below + upto) / (2 * len(others))
    return np.where(labels == 1, share, 1 - share)


def two_class_figures(predicted: Answers, labels: np.ndarray) -> dict[str, float | None]:
    """`auroc`, the area under the ROC curve, and `average_precision` of the rarer of two classes, in percent.

    Both are None if one of the classes has no samples. With another number of classes: {}.
    """
    if predicted.score is None:
        return {}
    if len(np.unique(labels)) < 2:
        return {AUROC: None, "average_precision": None}
    from sklearn.metrics import average_precision_score

    precision = 100 * float(average_precision_score(labels, predicted.score))
    return {AUROC: float(100 * placements(predicted.score, labels)[labels == 1].mean()), "average_precision": precision}


def precision_and_f1(labels: np.ndarray, every: Sequence[np.ndarray], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and F1 of each classifier and class in percent, float64 (classifiers, classes) each.

    `labels`: int (n,); `every`: the predicted classes of each classifier, int (n,). NaN where undefined: precision of a
    class that is never predicted, F1 of one that has no samples either.
    """
    of_class, found = np.bincount(labels, minlength=classes), []
    for guesses in every:
        right, said = (np.bincount(v, minlength=classes) for v in (labels[guesses == labels], guesses))
        with np.errstate(invalid="ignore"):  # 0 / 0
            found.append((100 * (right / said), 100 * (2 * right / (of_class + said))))
    precision, f1 = np.array(found).swapaxes(0, 1)
    return precision, f1


def main_figures(predicted: Answers, labels: np.ndarray, group_of: Sequence[str | None]) -> dict[str, float | None]:
    """top1, head, medium, tail and ece of a classifier, in percent; arguments as for `summaries`."""
    right = predicted.guesses == labels
    return {
        "top1": float(100 * right.mean()),
        **group_accuracy(per_class_accuracy(labels, predicted.guesses, len(group_of)), group_of),
        "ece": expected_calibration_error(predicted.confidence, right.astype(float)),
    }


def summaries(
    every: Sequence[Graded], labels: np.ndarray, group_of: Sequence[str | None]
) -> list[dict[str, float | None]]:
    """The figures of each of several classifiers, all in percent but `nll`.

    Those of `main_figures`; `balanced_accuracy`, the mean recall of the classes that have samples; `macro_f1`, the mean
    F1 of the classes that have samples or are predicted; `top5`; `nll`, the mean negative log-likelihood in nats; with
    two classes those of `two_class_figures`.
    `labels` is int (n,); `group_of` has one entry per class.
    """
    classes = len(group_of)
    _, f1 = precision_and_f1(labels, [predicted.guesses for predicted in every], classes)
    return [
        {
            **main_figures(predicted, labels, group_of),
            "balanced_accuracy": float(np.nanmean(per_class_accuracy(labels, predicted.guesses, classes))),
            "macro_f1": float(np.nanmean(own)),
            "top5": float(100 * (predicted.rank < 5).mean()),
            "nll": float(predicted.loss.mean()),
            **two_class_figures(predicted, labels),
        }
        for predicted, own in zip(every, f1, strict=True)
    ]


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
