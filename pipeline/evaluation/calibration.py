"""Temperatures of trained heads and of the stage-I head, and the calibration error with and without them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from h2t.cache.reader import Cache
from h2t.pipeline.evaluation import temperature
from h2t.pipeline.evaluation.folds import Folds
from h2t.pipeline.evaluation.metrics import expected_calibration_error
from h2t.pipeline.evaluation.scoring import (
    STAGE1,
    Scores,
    head_logits,
    score_heads,
    score_stage1,
    stage1_logits,
)
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.networks.trained import StageOneHead


@dataclass(frozen=True)
class Calibrated:
    """A head's temperature, and its expected calibration error on the test split with it, in percent."""

    temperature: float
    ece: float


def of_heads(
    cache: Cache, heads: Heads, numbers: Sequence[int], folds: Folds | None, device: torch.device
) -> list[float] | None:
    """The temperatures of the heads `numbers`: from cross-validation if there was one, else from validation images.

    Validation images are read under the statistics of the test images. None for a cache without validation rows.
    """
    if folds:
        return folds.of(heads, numbers)
    if not _has_validation(cache):
        return None
    rows, labels = _validation(cache, heads.about["evaluate"], len(heads.about["counts"]))
    each = (head_logits(cache, heads.of([number]), rows, device)[0] for number in numbers)
    return [temperature.fit(logits, labels) for logits in each]


def calibrated(
    cache: Cache, heads: Heads, numbers: Sequence[int], stage1: StageOneHead, folds: Folds | None, device: torch.device
) -> Mapping[int, Calibrated]:
    """Temperature and calibration error of the heads `numbers`, and of the stage-I head as -1, under their statistics.

    The stage-I head has none if there was a cross-validation; nobody has without validation rows.
    """
    found: dict[int, Calibrated] = {}
    if numbers and (fitted := of_heads(cache, heads, numbers, folds, device)):
        scores = score_heads(cache, heads.of(numbers), "test", heads.about["evaluate"], device, fitted)
        found = {n: Calibrated(t, _ece(scores, i)) for i, (n, t) in enumerate(zip(numbers, fitted, strict=True))}
    if stage1.state and not folds and _has_validation(cache):
        rows, labels = _validation(cache, STAGE1, stage1.state["weight"].shape[-2])
        own = temperature.fit(stage1_logits(cache, stage1, rows, device), labels)
        found[-1] = Calibrated(own, _ece(score_stage1(cache, stage1, "test", device, own), 0))
    return found


def _has_validation(cache: Cache) -> bool:
    return "val" in cache.index.splits


def _validation(cache: Cache, statistics: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels of validation samples, (n,) each, for fitting temperatures."""
    rows = sample_rows(cache.index, "val", statistics)
    some = temperature.spread(np.arange(len(rows.first)), classes)
    return rows.first[some], rows.labels[some]


def _ece(scores: Scores, place: int) -> float:
    said = scores.said[place]
    return expected_calibration_error(said.confidence, (said.guesses == scores.labels).astype(float))
