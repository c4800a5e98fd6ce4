"""Trains all heads of one host, by gradient descent or by a closed-form fit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from h2t.pipeline.base.columns import column
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.parts import grouped, part_token
from h2t.pipeline.heads.residency import Feed
from h2t.pipeline.heads.setting import HeadSetting, Optimiser
from h2t.pipeline.heads.stack import NotFinite, Stack
from h2t.pipeline.heads.step_size import seeds_and_donors
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.resume import Checkpoint

HISTORY = pa.schema([("number", pa.int64()), ("epoch", pa.int64()), ("lr", pa.float64()), ("loss", pa.float64())])


@dataclass(frozen=True)
class Trained:
    """`state`: name -> (K, ...); `history`: a line per classifier and epoch; `restored`: steps of an earlier run."""

    state: dict[str, torch.Tensor]
    history: pa.Table
    restored: int = 0


def fit(
    heads: Sequence[Head], stage1: StageOneHead, streams: Streams, reader: FeatureReader, device: torch.device
) -> Trained:
    """The classifiers of a host with a closed-form fit, on the unaugmented view of every training sample."""
    features = reader.read(streams.receivers.first).to(device, torch.float32)
    labels = torch.from_numpy(streams.receivers.labels).to(device)
    states = [head.fit(features, labels, stage1) for head in heads]
    for state in states:
        _check_alike(states[0], state)
    history = pa.table({"number": [], "epoch": [], "lr": [], "loss": []}, schema=HISTORY)
    return Trained({k: torch.stack([state[k].to(torch.float32) for state in states]) for k in states[0]}, history)


def train(
    optimiser: Optimiser,
    run: Run,
    head_of: Callable[[HeadSetting], Head],
    parts: list[list[HeadSetting]],
    feed: Feed,
    stage1: StageOneHead,
    token: str,
) -> Trained:
    """Trains all heads by gradient descent, part by part. `head_of` gives what computes for the heads of a part."""
    state: dict[str, torch.Tensor] = {}
    history: list[tuple[int, int, float, float]] = []  # epoch, number, learning rate, loss
    done = restored = 0
    for number, part in enumerate(parts):
        places = grouped(part)
        ordered = [part[place] for place in places]
        stack = Stack(head_of(part[0]), ordered, feed.of(*seeds_and_donors(ordered)))
        stack.start(stage1)
        numbers = [done + place for place in places]
        done += len(part)

        own = [optimiser.of(setting) for setting in ordered]

        def report(epoch: int, losses: torch.Tensor, numbers: list[int] = numbers, own: list[Optimiser] = own) -> None:
            history.extend(
                (epoch, n, settings.rate(epoch), loss)
                for n, settings, loss in zip(numbers, own, losses.tolist(), strict=True)
            )

        checkpoint = Checkpoint(run.out, part_token(token, number, parts), part=number)
        try:
            stack.train(optimiser, run.name, report, checkpoint)
        except NotFinite as bad:
            raise NotFinite(bad.epoch, numbers[bad.head], bad.parameter) from None
        restored += checkpoint.restored
        _put(state, sum(map(len, parts)), numbers, stack.state)
    epochs, of, rates, lost = map(column, zip(*sorted(history), strict=True))
    return Trained(state, pa.table([of, epochs, rates, lost], schema=HISTORY), restored)


def joined(shares: Sequence[Sequence[int]], trained: Iterable[Trained]) -> Trained:
    """Heads that were trained in shares, as if they had been trained together. `shares`: the numbers of each one's."""
    state: dict[str, torch.Tensor] = {}
    histories, restored = [], 0
    for numbers, share in zip(shares, trained, strict=True):
        _put(state, sum(map(len, shares)), numbers, share.state)
        own = pa.array(np.asarray(numbers)[share.history["number"].to_numpy()], pa.int64())
        histories.append(share.history.set_column(0, "number", own))
        restored += share.restored
    history = pa.concat_tables(histories).sort_by([("epoch", "ascending"), ("number", "ascending")])
    return Trained(state, history, restored)


def _put(state: dict[str, torch.Tensor], heads: int, numbers: Sequence[int], part: Mapping[str, torch.Tensor]) -> None:
    """Puts the parameters of the heads `numbers` into `state`, which holds those of all `heads`, or nothing yet."""
    _check_alike({k: t[0] for k, t in (state or part).items()}, {k: t[0] for k, t in part.items()})
    for key, tensor in part.items():
        if key not in state:
            state[key] = torch.empty(heads, *tensor.shape[1:], dtype=tensor.dtype)
        state[key][list(numbers)] = tensor.detach().cpu()


def _check_alike(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError unless two classifiers have the same parameters, so that they can be stored together."""
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (one, other)]
    if shapes[0] != shapes[1]:
        differs = min(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise UserError(
            f"grid.loss: classifiers of a host must have the same parameters; {differs} is {shapes[0].get(differs)} "
            f"with one value and {shapes[1].get(differs)} with another; make an entry of hosts for each value"
        )
