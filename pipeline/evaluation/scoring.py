"""Scores cached rows with trained heads: those of a stack, and the stage-I head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.func import vmap

from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.evaluation.metrics import Graded, answers
from h2t.pipeline.heads.batches import SampleRows, sample_rows
from h2t.pipeline.heads.features import (
    FeatureReader,
    first_not_finite,
    identity_if_pooled,
    maps_fingerprint,
    pool_label,
)
from h2t.pipeline.heads.stored import Heads, load_heads
from h2t.pipeline.networks.classifier import global_average, logits
from h2t.pipeline.networks.trained import StageOneHead, backbone_digest

STAGE1 = "stage1"
BLOCK_BYTES = 16 * 1024**2  # limit of one block of logits, of which a few copies exist; less if memory is short
FEWEST_ROWS = 8  # of a block, where memory is: each block reads the weights of all heads anew
AT_ONCE = 2**15  # logits that are graded in one call: copies stay in the processor's cache, and calls are few


@dataclass(frozen=True)
class Scores:
    """Predictions of every head for one split under one kind of batch-norm statistics.

    `labels` and `samples` are int (n,). Logits are not kept: those of all heads together can be too large.
    """

    statistics: str
    labels: np.ndarray
    samples: np.ndarray
    said: list[Graded]  # one entry per head


def load_heads_for(cache: Cache, heads_dir: Path, backbone_dir: Path) -> Heads:
    """The heads in `heads_dir`. Raises UserError if they were trained on another backbone or another cache."""
    heads = load_heads(heads_dir)
    expected = backbone_digest(backbone_dir)
    if heads.about["backbone"] != expected:
        raise UserError(
            f"{heads_dir}: heads were trained on backbone {heads.about['backbone'][:12]}, but {backbone_dir} holds "
            f"{expected[:12]}; train the heads again"
        )
    if heads.about["cache"] != maps_fingerprint(cache.spec):
        raise UserError(
            f"{heads_dir}: heads were trained on cache {heads.about['cache'][:12]}, but {cache.files} is "
            f"{maps_fingerprint(cache.spec)[:12]}; train the heads again"
        )
    return heads


def score_heads(
    cache: Cache,
    heads: Heads,
    split: str,
    statistics: str,
    device: torch.device,
    temperatures: Sequence[float] | None = None,
) -> Scores:
    """Predictions of all heads of a stack for the samples of `split`, from the rows under `statistics`.

    `temperatures`: what each head's logits are divided by; None is 1. Raises UserError for logits that are not finite.
    """
    rows = sample_rows(cache.index, split, statistics)
    blocks = _logits_in_blocks(cache, heads, rows.first, device)
    divisors = temperatures or [1.0] * len(heads.table)
    return _scores(statistics, rows, cache, blocks, len(heads.about["counts"]), divisors)


def _scores(
    statistics: str,
    rows: SampleRows,
    cache: Cache,
    blocks: Iterator[tuple[np.ndarray, torch.Tensor]],
    classes: int,
    temperatures: Sequence[float],
) -> Scores:
    """Predictions of each head from blocks of logits (heads, n, classes), which together cover all `rows`.

    Logits are divided by the `temperatures` of the heads.
    The arrays are made once: with many heads and samples, they are most of what evaluation holds. They are written to
    before the first block, so that the size of the blocks is chosen from the memory that is left.
    """
    labels = rows.labels
    kinds = {"guesses": np.int32, "confidence": np.float64, "rank": np.int32, "loss": np.float64}
    kinds |= {"score": np.float32} if classes == 2 else {}
    said = {name: np.full((len(temperatures), len(labels)), -1, kind) for name, kind in kinds.items()}
    divisors, first = np.array(temperatures)[:, None, None], 0
    for part, block in blocks:
        finite, of_block = _finite(block, cache, part).numpy(), slice(first, first + len(part))
        heads = max(1, AT_ONCE // finite[0].size)
        for some in (slice(n, n + heads) for n in range(0, len(finite), heads)):
            found = answers(finite[some], labels[of_block], divisors[some])
            for name, of_all in said.items():
                of_all[some, of_block] = getattr(found, name)
        first += len(part)
    of_each = [Graded(**dict(zip(said, one, strict=True))) for one in zip(*said.values(), strict=True)]
    return Scores(statistics, labels, rows.samples.astype(np.int64), of_each)


def head_logits(cache: Cache, heads: Heads, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Logits of every head on the cache's `rows`, int (n,): float32 (heads, n, classes), in host memory.

    Raises UserError for logits that are not finite.
    """
    shape = (len(heads.table), len(rows), len(heads.about["counts"]))
    return _joined(cache, _logits_in_blocks(cache, heads, rows, device), shape)


def _joined(
    cache: Cache, blocks: Iterator[tuple[np.ndarray, torch.Tensor]], shape: tuple[int, int, int]
) -> torch.Tensor:
    """Blocks of logits (heads, n, classes) as one array of this shape, which is made once."""
    joined, first = torch.empty(shape), 0
    for part, block in blocks:
        joined[:, first : first + len(part)] = _finite(block, cache, part)
        first += len(part)
    return joined


def _logits_in_blocks(
    cache: Cache, heads: Heads, rows: np.ndarray, device: torch.device
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Blocks of `rows` in order, each with its logits (heads, n, classes) on `device`, not checked."""
    kinds = heads.kinds(device)
    pool = kinds[0][1].pool
    already = identity_if_pooled(cache, pool_label(heads.parts.pool, heads.parts.pool_options))
    reader = FeatureReader(cache, already or ((lambda maps: pool({}, maps)) if pool.commutes else None))
    one = len(kinds) == 1  # the usual case, without a copy
    states = [{k: (t if one else t[numbers]).to(device) for k, t in heads.state.items()} for numbers, _ in kinds]
    order = torch.tensor([number for numbers, _ in kinds for number in numbers]).argsort()

    numbers = reader.row_bytes // reader.dtype.itemsize
    for part in _blocks(rows, max(numbers, len(heads.about["counts"])) * len(heads.table)):
        x = reader.read(part).to(device, torch.float32)  # (E, n, C[, H, W])
        with torch.no_grad():
            blocks = [
                vmap(head.logits, in_dims=(0, None))(own, x) for (_, head), own in zip(kinds, states, strict=True)
            ]
        yield part, blocks[0] if one else torch.cat(blocks)[order.to(device)]


def _blocks(rows: np.ndarray, numbers: int) -> list[np.ndarray]:
    """Splits `rows` into blocks that fit in memory; each row needs `numbers` float32 values."""
    each, room = 4 * numbers, available_memory()
    block = max(1, max(min(BLOCK_BYTES, room // 8), min(FEWEST_ROWS * each, room // 32)) // each)
    return [rows[first : first + block] for first in range(0, len(rows), block)]


def _finite(block: torch.Tensor, cache: Cache, rows: np.ndarray) -> torch.Tensor:
    """Logits (..., n, classes) of `rows` in host memory. Raises UserError if one is not finite, naming the row."""
    block = block.cpu()  # first, so that a GPU is not waited for twice
    if not block.isfinite().all():
        row = first_not_finite(cache, rows)
        if row:
            raise UserError(f"{cache.files}: {row} holds NaN or infinity; extract again")
        raise UserError(
            f"{cache.files}: logits are not finite; the heads' weights hold NaN, infinity or too large numbers; "
            "train the heads again"
        )
    return block


def score_stage1(
    cache: Cache, head: StageOneHead, split: str, device: torch.device, temperature: float = 1.0
) -> Scores:
    """Predictions of the stage-I head for the samples of `split`, under `stage1` statistics; `said` has one entry.

    Logits are divided by `temperature`. Raises UserError for logits that are not finite, and for a cache pooled by
    anything but an average.
    """
    rows = sample_rows(cache.index, split, STAGE1)
    blocks = _stage1_in_blocks(cache, head, rows.first, device)
    return _scores(STAGE1, rows, cache, blocks, head.state["weight"].shape[-2], [temperature])


def stage1_logits(cache: Cache, head: StageOneHead, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Logits of the stage-I head on the cache's `rows`, int (n,): float32 (n, classes), in host memory.

    Raises UserError as `score_stage1` does.
    """
    blocks = _stage1_in_blocks(cache, head, rows, device)
    return _joined(cache, blocks, (1, len(rows), head.state["weight"].shape[-2]))[0]


def _stage1_in_blocks(
    cache: Cache, head: StageOneHead, rows: np.ndarray, device: torch.device
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Blocks of `rows` in order, each with its logits (1, n, classes) on `device`, not checked."""
    identity_if_pooled(cache, "gap")  # the stage-I head takes averages only
    reader = FeatureReader(cache, global_average)
    state = {name: t.to(device) for name, t in head.state.items()}
    for part in _blocks(rows, reader.row_bytes // 4 + cache.experts * head.state["weight"].shape[-2]):
        with torch.no_grad():
            features = reader.read(part).to(device)
            features = features if head.frozen is None else head.frozen(features)
            block = logits(head.classifier, state, features, head.scale)
        yield part, block[None]
