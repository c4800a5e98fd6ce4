"""Trains all heads of one host, by gradient descent or by a closed-form fit."""

from dataclasses import dataclass

import pyarrow as pa
import torch

from h2t.pipeline.base.run import Run
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.parts import grouped, part_token, seeds_and_donors
from h2t.pipeline.heads.residency import Feed
from h2t.pipeline.heads.stack import HeadSetting, NotFinite, Optimiser, Stack
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.resume import Checkpoint

HISTORY = pa.schema([("number", pa.int64()), ("epoch", pa.int64()), ("lr", pa.float64()), ("loss", pa.float64())])


@dataclass(frozen=True)
class Trained:
    """`state`: name -> (K, ...); `history`: a line per classifier and epoch; `restored`: steps of an earlier run."""

    state: dict[str, torch.Tensor]
    history: pa.Table
    restored: int = 0


def fit(head: Head, stage1: StageOneHead, streams: Streams, reader: FeatureReader, device: torch.device) -> Trained:
    """The one classifier of a host with a closed-form fit, on the unaugmented view of every training sample."""
    features = reader.read(streams.receivers.first).to(device, torch.float32)
    state = head.fit(features, torch.from_numpy(streams.receivers.labels).to(device), stage1)
    history = pa.table({"number": [], "epoch": [], "lr": [], "loss": []}, schema=HISTORY)
    return Trained({k: t.to(torch.float32)[None] for k, t in state.items()}, history)


def train(
    optimiser: Optimiser,
    run: Run,
    head: Head,
    parts: list[list[HeadSetting]],
    feed: Feed,
    stage1: StageOneHead,
    token: str,
) -> Trained:
    """Trains all heads by gradient descent, part by part."""
    state: dict[str, torch.Tensor] = {}
    history: list[dict[str, float]] = []
    done = restored = 0
    for number, part in enumerate(parts):
        places = grouped(part)
        ordered = [part[place] for place in places]
        stack = Stack(head, ordered, feed.of(*seeds_and_donors(ordered)))
        stack.start(stage1)
        numbers = [done + place for place in places]
        done += len(part)

        def report(epoch: int, losses: torch.Tensor, numbers: list[int] = numbers) -> None:
            rate = optimiser.rate(epoch)
            history.extend(
                {"number": n, "epoch": epoch, "lr": rate, "loss": loss}
                for n, loss in zip(numbers, losses.tolist(), strict=True)
            )

        checkpoint = Checkpoint(run.out, part_token(token, number, parts), part=number)
        try:
            stack.train(optimiser, run.name, report, checkpoint)
        except NotFinite as bad:
            raise NotFinite(bad.epoch, numbers[bad.head], bad.parameter) from None
        restored += checkpoint.restored
        for key, tensor in stack.state.items():
            if key not in state:
                state[key] = torch.empty(sum(map(len, parts)), *tensor.shape[1:], dtype=tensor.dtype)
            state[key][numbers] = tensor.detach().cpu()
    table = pa.Table.from_pylist(history, HISTORY).sort_by([("epoch", "ascending"), ("number", "ascending")])
    return Trained(state, table, restored)
