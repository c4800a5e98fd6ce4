"""What heads say of the rows of a cache: those of a trained stack, and that of stage I."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.func import vmap

from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.evaluation.metrics import Answers, answers
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.features import (
    FeatureReader,
    first_not_finite,
    identity_if_pooled,
    maps_fingerprint,
    pool_label,
)
from h2t.pipeline.heads.stored import Heads, build_head, load_heads
from h2t.pipeline.networks.classifier import global_average, logits
from h2t.pipeline.networks.trained import StageOneHead, backbone_digest

STAGE1 = "stage1"
BLOCK_BYTES = 256 * 1024**2  # of what is computed at once, or an eighth of the memory that is available


@dataclass(frozen=True)
class Scores:
    """What every head says of one split under one kind of statistics. Logits of all heads together can be too large."""

    statistics: str
    labels: np.ndarray
    samples: np.ndarray
    said: list[Answers]  # by head


def load_heads_for(cache: Cache, heads_dir: Path, backbone_dir: Path) -> Heads:
    """The heads in `heads_dir`. Raises UserError if they were trained on another backbone's maps."""
    heads = load_heads(heads_dir)
    expected = backbone_digest(backbone_dir)
    if heads.about["backbone"] != expected:
        raise UserError(
            f"{heads_dir}: heads were trained on backbone {heads.about['backbone'][:12]}, {backbone_dir} is "
            f"{expected[:12]}; train the heads again"
        )
    if heads.about["cache"] != maps_fingerprint(cache.spec):
        raise UserError(
            f"{heads_dir}: heads were trained on cache {heads.about['cache'][:12]}, this one is "
            f"{maps_fingerprint(cache.spec)[:12]}; train the heads again"
        )
    return heads


def score_heads(cache: Cache, heads: Heads, split: str, statistics: str, device: torch.device) -> Scores:
    """What all heads of a stack say of the samples of `split`, read under `statistics`."""
    rows = sample_rows(cache.rows, split, statistics)
    parts: list[list[Answers]] = [[] for _ in heads.table.to_pylist()]
    for block in _logits_in_blocks(cache, heads, rows.first, device):
        for mine, logits_of_head in zip(parts, block.cpu().numpy(), strict=True):
            mine.append(answers(logits_of_head))
    return Scores(statistics, rows.labels, rows.samples, [_joined(mine) for mine in parts])


def _joined(parts: list[Answers]) -> Answers:
    return Answers(*(np.concatenate([getattr(a, k) for a in parts]) for k in ("guesses", "confidence")))


def head_logits(cache: Cache, heads: Heads, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Logits of every head on the cache's `rows` (n,): (heads, n, classes)."""
    return torch.cat(list(_logits_in_blocks(cache, heads, rows, device)), 1)


def _logits_in_blocks(cache: Cache, heads: Heads, rows: np.ndarray, device: torch.device) -> Iterator[torch.Tensor]:
    """The same for some rows at a time, in order. Raises UserError for logits that are not finite."""
    head = build_head(heads.parts, heads.context)
    already = identity_if_pooled(cache, pool_label(heads.parts.pool, heads.parts.pool_options))
    pooling = already or ((lambda maps: head.pool({}, maps)) if head.pool.commutes else None)
    state = {name: t.to(device) for name, t in heads.state.items()}
    reader = FeatureReader(cache, pooling)

    numbers = reader.row_bytes // reader.dtype.itemsize
    for part in _blocks(rows, max(numbers, len(heads.about["counts"])) * len(heads.table)):
        x = reader.read(part).to(device, torch.float32)  # (E, n, C[, H, W])
        with torch.no_grad():
            found: torch.Tensor = vmap(head.logits, in_dims=(0, None))(state, x)
        _check_finite(found, cache, part)
        yield found


def _blocks(rows: np.ndarray, numbers: int) -> list[np.ndarray]:
    """`rows` in blocks that suit memory, if each needs so many `numbers` in float32."""
    block = max(1, min(BLOCK_BYTES, available_memory() // 8) // (4 * numbers))
    return [rows[first : first + block] for first in range(0, len(rows), block)]


def _check_finite(found: torch.Tensor, cache: Cache, rows: np.ndarray) -> None:
    """Raises UserError for logits (..., n, classes) of `rows` that are not finite, naming the row at fault."""
    if not found.isfinite().all():
        row = first_not_finite(cache, rows)
        what = f"{row} holds NaN or infinity" if row else "the heads' weights hold NaN, infinity or too large numbers"
        raise UserError(f"{cache.files}: {what}; {'extract' if row else 'train them'} again")


def score_stage1(cache: Cache, head: StageOneHead, split: str, device: torch.device) -> Scores:
    """What the stage-I head says of the samples of `split`, under its own statistics; one head."""
    rows = sample_rows(cache.rows, split, STAGE1)
    identity_if_pooled(cache, "gap")  # the stage-I head knows averages only
    reader = FeatureReader(cache, global_average)
    state = {name: t.to(device) for name, t in head.state.items()}
    said: list[Answers] = []
    for part in _blocks(rows.first, reader.row_bytes // 4 + cache.experts * head.state["weight"].shape[-2]):
        with torch.no_grad():
            found = logits(head.classifier, state, reader.read(part).to(device), head.scale)
        _check_finite(found, cache, part)
        said.append(answers(found.cpu().numpy()))
    return Scores(STAGE1, rows.labels, rows.samples, [_joined(said)])
