"""What heads say of the rows of a cache: those of a trained stack, and that of stage I."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.func import vmap

from cache.reader import Cache
from pipeline.errors import UserError
from pipeline.features import FeatureReader, identity_if_pooled, maps_fingerprint, pool_label
from pipeline.head import global_average, logits
from pipeline.heads import Heads, head_parts, load_heads
from pipeline.metrics import Answers, answers
from pipeline.network import StageOneHead, backbone_digest
from pipeline.stack import POOL
from pipeline.streams import sample_rows

STAGE1 = "stage1"
BLOCK_BYTES = 256 * 1024**2


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
    said = [
        Answers(*(np.concatenate([getattr(a, k) for a in mine]) for k in ("guesses", "confidence"))) for mine in parts
    ]
    return Scores(statistics, rows.labels, rows.samples, said)


def head_logits(cache: Cache, heads: Heads, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Logits of every head on the cache's `rows` (n,): (heads, n, classes)."""
    return torch.cat(list(_logits_in_blocks(cache, heads, rows, device)), 1)


def _logits_in_blocks(cache: Cache, heads: Heads, rows: np.ndarray, device: torch.device) -> Iterator[torch.Tensor]:
    """The same for some rows at a time, in order."""
    host, pool = head_parts(heads.parts, heads.context)
    already = identity_if_pooled(cache, pool_label(heads.parts.pool, heads.parts.pool_options))
    pooling = already or ((lambda maps: pool({}, maps)) if pool.commutes else None)
    state = {name: t.to(device) for name, t in heads.state.items()}
    x = FeatureReader(cache, pooling).read(rows).to(device, torch.float32)  # (E, n, C[, H, W])

    def one(head: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        own = {k: t for k, t in head.items() if not k.startswith(POOL)}
        if pooling is None:
            x = pool({k.removeprefix(POOL): t for k, t in head.items() if k.startswith(POOL)}, x)
        result: torch.Tensor = host.logits(own, x)
        return result

    count = len(heads.table)
    block = max(1, BLOCK_BYTES // (4 * max(x[:, :1].numel(), len(heads.about["counts"])) * count))
    for first in range(0, x.shape[1], block):
        with torch.no_grad():
            found: torch.Tensor = vmap(one, in_dims=(0, None))(state, x[:, first : first + block])
        yield found


def score_stage1(cache: Cache, head: StageOneHead, split: str, device: torch.device) -> Scores:
    """What the stage-I head says of the samples of `split`, under its own statistics; one head."""
    rows = sample_rows(cache.rows, split, STAGE1)
    identity_if_pooled(cache, "gap")  # the stage-I head knows averages only
    features = FeatureReader(cache, global_average).read(rows.first).to(device)
    state = {name: t.to(device) for name, t in head.state.items()}
    with torch.no_grad():
        found = logits(head.classifier, state, features, head.scale)
    return Scores(STAGE1, rows.labels, rows.samples, [answers(found.cpu().numpy())])
