"""Scores the classifiers of all replicates of a host, and brings their classes and images to common numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Say
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.evaluation.folds import Folds, load_folds
from h2t.pipeline.evaluation.scoring import Scores, load_heads_for, score_heads, score_stage1
from h2t.pipeline.evaluation.tables import Scored
from h2t.pipeline.evaluation.tested_groups import groups_of
from h2t.pipeline.heads.replicate import Replicate
from h2t.pipeline.heads.start import backbone_head
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.networks.trained import StageOneHead


@dataclass(frozen=True)
class Loaded:
    """The classifiers of one replicate with all that they are scored with. `table`: their lines of heads.parquet."""

    replicate: Replicate
    heads: Heads
    stage1: StageOneHead
    folds: Folds | None
    table: Sequence[Mapping[str, Any]]

    @property
    def cache(self) -> Cache:
        """The replicate's cache."""
        return self.replicate.cache

    @property
    def names(self) -> list[str]:
        """Names of the classes in the order of this replicate's labels."""
        return recorded_names(self.cache.spec.provenance, self.cache.files)


def load(heads_dir: Path, replicates: Sequence[Replicate], device: torch.device, say: Say) -> list[Loaded]:
    """The classifiers of a host in `heads_dir`. Those of further replicates are numbered on from those before.

    Raises UserError if they were trained on other caches or backbones, or if a replicate has other classes.
    """
    found: list[Loaded] = []
    for replicate in replicates:
        heads = load_heads_for(replicate.cache, replicate.inside(heads_dir), replicate.backbone)
        stage1 = backbone_head(replicate.cache, replicate.backbone, "linear", device, say)
        first = sum(len(one.table) for one in found)
        table = [
            {
                **line,
                "number": first + line["number"],
                **({"replicate": replicate.number} if len(replicates) > 1 else {}),
            }
            for line in heads.table.to_pylist()
        ]
        found.append(Loaded(replicate, heads, stage1, load_folds(replicate.inside(heads_dir)), table))
        if set(found[-1].names) != set(found[0].names):
            other = sorted(set(found[-1].names) ^ set(found[0].names))[0]
            raise UserError(
                f"{replicate.cache.files}: all replicates must have the same classes; class {other!r} is not in all; "
                "hold out fewer images, or set replicates to [0]"
            )
    return found


def score(loaded: Sequence[Loaded], splits: Sequence[str], lines: Sequence[str], device: torch.device) -> list[Scored]:
    """The predictions of all classifiers for `splits` under each of the statistics `lines`, and those of stage I.

    Labels are those of replicate 0. Images have the number of replicate 0's sample of the same source; others follow.
    """
    images: dict[str, int] = {}
    found = []
    for index, one in enumerate(loaded):
        scores = {
            (split, statistics): score_heads(one.cache, one.heads, split, statistics, device)
            for split in splits
            for statistics in lines
        }
        has_head = bool(one.stage1.state)
        first = {split: score_stage1(one.cache, one.stage1, split, device) for split in splits} if has_head else {}
        if len(loaded) > 1:
            numbers = _numbered(one.cache, images)
            labels = np.array([loaded[0].names.index(name) for name in one.names])
            scores = {key: _translated(result, labels, numbers) for key, result in scores.items()}
            first = {key: _translated(result, labels, numbers) for key, result in first.items()}
        groups = groups_of(one.cache, lines[0])
        found.append(Scored(one.table, scores, first, one.replicate.number, -1 - index, groups))
    return found


def _numbered(cache: Cache, images: dict[str, int]) -> dict[int, int]:
    """Sample number -> number of the image, for all samples of the cache. Adds images that are new to `images`."""
    rows = cache.rows.select(["sample", "source"]).group_by(["sample", "source"]).aggregate([]).sort_by("sample")
    first, numbers = not images, {}
    following = max(images.values(), default=-1) + 1
    for sample, source in zip(rows["sample"].to_pylist(), rows["source"].to_pylist(), strict=True):
        if source not in images:
            images[source] = sample if first else following
            following += not first
        numbers[sample] = images[source]
    return numbers


def _translated(result: Scores, labels: np.ndarray, numbers: Mapping[int, int]) -> Scores:
    """`result` with labels, int (classes,) by its own label, and image numbers in place of its own."""
    said = [replace(one, guesses=labels[one.guesses].astype(one.guesses.dtype)) for one in result.said]
    samples = np.array([numbers[sample] for sample in result.samples.tolist()], result.samples.dtype)
    return replace(result, labels=labels[result.labels], samples=samples, said=said)
