"""Steps of stage I against a loop written here from the published recipes, in float64.

The loop shares nothing with `training.loop` but the network, the objective (test_objectives.py), the decoded images and
the addresses of random draws: order of samples, share and partners of mixup. Optimiser, schedule, mixing are its own.
"""

import numpy as np
import pytest
import torch
from pipeline_builders import CPU, silent
from torch import nn

from h2t.pipeline.base import plugins
from h2t.pipeline.base.seeds import stream, torch_seed
from h2t.pipeline.training.loop import StageOne
from h2t.pipeline.training.parallel import Group
from h2t.pipeline.training.resume import Checkpoint
from h2t.pipeline.training.settings import Training

EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 3, 128, 0.1, 0.9, 5e-4
CHANNELS, EXACT = 8, 1e-10


class Net(nn.Module):
    """A convolution that the experts share, then one of their own, each with batch norm."""

    def __init__(self, experts):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.each = nn.ModuleList(
            nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
            for _ in range(experts)
        )

    def forward(self, x):
        shared = self.stem(x)
        return tuple(expert(shared) for expert in self.each)

    def alone(self, x, expert):
        return self.each[expert](self.stem(x))


class InDouble:
    """Images whose batches are float64."""

    def __init__(self, images):
        self.images = images

    def batch(self, samples, keys):
        return self.images.batch(samples, keys).double()

    def turned(self, rotation):
        return InDouble(self.images.turned(rotation))


def network(experts, name, counts, **loss):
    """Backbone and objective as stage I starts them, float64."""
    objectives = plugins.load("objectives", name)
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(0, "stage1", "initial"))
        backbone = Net(experts)
        objective = objectives.Objective(objectives.Loss(**loss), CHANNELS, experts, torch.tensor(counts))
    return backbone.double(), objective.double()


def stepped(params, backbone, objective, samples, images, folder):
    training = StageOne(params, backbone, objective, samples, images, 0, Group(CPU, 0, 1))
    return training.run("b", Checkpoint(folder / "b", ""), silent)


def rate(epoch, rise):
    """Warm-up over the first two epochs, from 0 or, as in ResLT, from a third."""
    f = min(1.0, (epoch + 1) / 2)
    return RATE * (f if not rise else (1 - f) / 3 + f) * (0.1 if epoch >= 2 else 1)


def pasted(x, y, samples, images, epoch, step, *, epochs, cmo, power):
    """CMO as in the authors' code: (images with a rectangle of others, labels of those, the images' share of the area).

    None if this step has none. Weights of single images, in place of classes; a mask, in place of slices.
    """
    draws = stream(0, "stage1", "cmo", epoch, step)
    if not 3 < epoch < epochs - 3 or draws.random() >= cmo:
        return None
    share, right, down = draws.random(), draws.random(), draws.random()
    n = torch.tensor(samples.counts).double()
    train = samples.of("train")
    weight = n[samples.labels[train]] ** -power
    by_class = torch.stack([weight[samples.labels[train] == k].sum() for k in range(len(n))])
    chosen = draws.choice(len(n), size=len(y), p=(by_class / by_class.sum()).numpy())
    inside = draws.integers(n.long().numpy()[chosen])
    own = [np.flatnonzero(samples.labels[train] == k)[i] for k, i in zip(chosen, inside, strict=True)]
    others = train[own]
    z = images.batch(others.tolist(), [(0, "stage1", epoch, "cmo", step)] * len(y))
    size = x.shape[-1]
    half, place = int(size * (1 - share) ** 0.5) // 2, torch.arange(size)

    def between(middle):
        return (place >= middle - half) & (place < middle + half)

    mask = between(int(size * down))[:, None] & between(int(size * right))[None]
    return torch.where(mask, z, x), torch.from_numpy(samples.labels[others]), 1 - mask.double().mean()


def bilateral(backbone, objective, samples, images, x, y, epoch, step, epochs):
    """BBN's loss as in the authors' code: features weighted by 2 a and 2 (1 - a), side by side, in one linear layer."""
    draws = stream(0, "stage1", "second", epoch, step)
    train, n = samples.of("train"), torch.tensor(samples.counts).double()
    chosen = draws.choice(len(n), size=len(y), p=((1 / n) / (1 / n).sum()).numpy())
    inside = draws.integers(n.long().numpy()[chosen])
    others = np.array([train[samples.labels[train] == k][i] for k, i in zip(chosen, inside, strict=True)])
    z = images.batch(others.tolist(), [(0, "stage1", epoch, "second", step)] * len(y))
    a = 1 - ((epoch + 1 - 1) / epochs) ** 2
    f_c = backbone.each[0](backbone.stem(x)).mean((2, 3))
    f_r = backbone.each[1](backbone.stem(z)).mean((2, 3))
    mixed = 2 * torch.cat([a * f_c, (1 - a) * f_r], 1)
    found = mixed @ torch.cat([objective.weight[0], objective.weight[1]], 1).T + objective.bias[0]
    log_p = found - found.exp().sum(1, keepdim=True).log()
    everyone, other = torch.arange(len(y)), torch.from_numpy(samples.labels[others])
    loss = -a * log_p[everyone, y].mean() - (1 - a) * log_p[everyone, other].mean()
    best = found.argmax(1)
    return loss, a * (best == y).double().mean() + (1 - a) * (best == other).double().mean()


def loop(
    name, backbone, objective, samples, images, *, mixup, nesterov, drop_last, rise, epochs=EPOCHS, cmo=0.0, power=1.0
):
    """The published loops: one update a batch, by torch's SGD written out.

    Returns the losses of the epochs and, of BBN, the training accuracies in percent.
    """
    parameters = [*backbone.parameters(), *objective.parameters()]
    speed = [torch.zeros_like(p) for p in parameters]
    train = samples.of("train")
    losses, accuracies = [], []
    backbone.train()
    objective.train()
    for epoch in range(epochs):
        draws = stream(0, "stage1", "epoch", epoch)
        order = train[draws.permutation(len(train))]
        total = seen = correct = 0
        for step, first in enumerate(range(0, len(order), BATCH)):
            batch = order[first : first + BATCH]
            if drop_last and len(batch) < BATCH:
                continue
            x = images.batch(batch.tolist(), [(0, "stage1", epoch)] * len(batch))
            y = torch.from_numpy(samples.labels[batch])
            if name == "bbn":
                loss, right = bilateral(backbone, objective, samples, images, x, y, epoch, step, epochs)
                correct += right.item() * len(batch)
            elif mixup:
                share = draws.beta(mixup, mixup)
                partner = torch.from_numpy(draws.permutation(len(batch)))
                found = objective(backbone(share * x + (1 - share) * x[partner]))
                loss = share * objective.cost(found, y, epoch) + (1 - share) * objective.cost(found, y[partner], epoch)
            elif mixed := pasted(x, y, samples, images, epoch, step, epochs=epochs, cmo=cmo, power=power):
                x, others, share = mixed
                found = objective(backbone(x))
                loss = share * objective.cost(found, y, epoch) + (1 - share) * objective.cost(found, others, epoch)
            else:
                loss = objective.cost(objective(backbone(x)), y, epoch)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, speed, gradients, strict=True):
                    g = g + DECAY * p
                    v.mul_(MOMENTUM).add_(g)
                    p.sub_(rate(epoch, rise) * (g + MOMENTUM * v if nesterov else v))
            total += loss.item() * len(batch)
            seen += len(batch)
        losses.append(total / seen)
        accuracies.append(100 * correct / seen)
    return losses, accuracies


def apart(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize(
    ("name", "loss", "more"),
    [
        ("ce", {}, {}),
        ("ce", {}, {"mixup": 1.0}),
        ("ride", {"reweight_epoch": 1}, {"nesterov": True, "rotation": 15.0}),
        ("ride", {"reweight_epoch": 1}, {"mixup": 1.0}),
        ("reslt", {"groups": [2, 4]}, {"nesterov": True, "drop_last": True, "warmup_from": 1 / 3}),
        ("reslt", {"groups": [2, 4]}, {"mixup": 1.0}),
        ("ce", {}, {"epochs": 9, "cmo": 0.5}),
        ("balanced_softmax", {}, {"epochs": 8, "cmo": 1.0, "cmo_power": 2.0}),
        ("ride", {"reweight_epoch": 1}, {"epochs": 8, "cmo": 1.0}),
        ("bbn", {}, {}),
        ("bbn", {}, {"epochs": 5, "nesterov": True, "drop_last": True}),
    ],
)
def test_steps_are_those_of_the_published_loop(digits, tmp_path, name, loss, more):
    samples, images = digits
    experts = 2 if name in ("ride", "reslt", "bbn") else 1
    recipe = {"epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY, **more}
    params = Training(**recipe, warmup_epochs=2, milestones=[2])
    backbone, objective = network(experts, name, samples.counts, **loss)
    other, by_hand = network(experts, name, samples.counts, **loss)
    curves = stepped(params, backbone, objective, samples, InDouble(images), tmp_path)
    pictures = InDouble(images.turned(params.rotation) if params.rotation else images)
    losses, accuracies = loop(
        name, other, by_hand, samples, pictures,
        mixup=params.mixup, nesterov=params.nesterov, drop_last=params.drop_last, rise=bool(params.warmup_from),
        epochs=params.epochs, cmo=params.cmo, power=params.cmo_power,
    )  # fmt: skip
    assert [c["loss"] for c in curves] == pytest.approx(losses, rel=EXACT)
    if name == "bbn":
        assert [c["accuracy"] for c in curves] == pytest.approx(accuracies, rel=EXACT)
    for found, expected in ((backbone, other), (objective, by_hand)):
        for key, value in expected.state_dict().items():
            assert apart(found.state_dict()[key].double(), value.double()) < EXACT, key
