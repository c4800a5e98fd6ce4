"""train_backbone (stage I): train a network by an objective, or take its weights from a file.

Writes `backbone.safetensors` (the network up to its maps), `head.safetensors` (the stage-I classifier) and training
curves as tab-separated files in `plots/metrics`, the layout that DVC's own logger uses.
"""

import csv
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from pipeline import plugins
from pipeline.checkpoints import fill, fit_head, load_checkpoint, save_weights, split_head
from pipeline.errors import UserError
from pipeline.head import global_average, logits
from pipeline.images import Images
from pipeline.outputs import fresh_directory
from pipeline.params import Count, NonNegative, Positive, Section, at_least, build, plugin
from pipeline.progress import progress
from pipeline.samples import Samples
from pipeline.seeds import stream, torch_seed


class Params(Section):
    """An entry of section `backbones`. With `weights`, a checkpoint file, nothing is trained."""

    arch: Annotated[str, plugin("backbones")]
    options: dict[str, Any] = {}
    objective: Annotated[str, plugin("objectives")] = "ce"
    loss: dict[str, Any] = {}
    weights: str | None = None
    sha256: str | None = None
    epochs: Count = 200
    batch_size: Count = 128
    lr: Positive = 0.1
    momentum: NonNegative = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 2e-4
    warmup_epochs: Annotated[int, at_least(0)] = 5
    schedule: Literal["cosine", "step"] = "step"
    milestones: list[Annotated[int, at_least(0)]] = [160, 180]
    gamma: Positive = 0.1
    mixup: NonNegative = 0.0


def learning_rate(params: Params, epoch: int) -> float:
    """Per epoch, from 0: linear warm-up, then cosine to 0 or steps at the milestones."""
    if epoch < params.warmup_epochs:
        return params.lr * (epoch + 1) / params.warmup_epochs
    if params.schedule == "cosine":
        return params.lr * 0.5 * (1 + math.cos(math.pi * epoch / params.epochs))
    return params.lr * params.gamma ** sum(epoch >= m for m in params.milestones)


def run(
    params: Params,
    name: str,
    samples: Samples,
    images: Images,
    seed: int,
    device: torch.device,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Trains (or loads) the backbone called `name` into the directory `out`."""
    where = f"backbones.{name}"
    arch, objectives = plugins.load("backbones", params.arch), plugins.load("objectives", params.objective)
    counts = torch.tensor(samples.counts)
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(seed, "stage1", "initial"))
        backbone = arch.build(build(arch.Options, f"{where}.options", params.options))
        loss = build(objectives.Loss, f"{where}.loss", params.loss)
        objective = objectives.Objective(loss, backbone.channels, backbone.experts, counts)
    if params.weights is not None:
        curves = _load(params, where, backbone, objective)
        say(f"{name}: weights from {Path(params.weights).name}, nothing trained")
    else:
        backbone.to(device), objective.to(device)
        curves = _train(params, name, backbone, objective, samples, images, seed, device)
        last = curves[-1]
        say(f"{name}: {params.epochs} epochs, loss {last['loss']:.3f}, training accuracy {last['accuracy']:.1f} %")
    if not all(torch.isfinite(p).all() for p in backbone.state_dict().values()):
        raise UserError(f"{where}: training diverged, weights are not finite; lower {where}.lr")
    about = {"arch": params.arch, "options": params.options, "channels": backbone.channels, "experts": backbone.experts}
    with fresh_directory(out) as into:
        save_weights(into / "backbone.safetensors", backbone.state_dict(), about)
        save_weights(
            into / "head.safetensors",
            objective.state_dict(),
            {**about, "objective": params.objective, "classifier": objective.classifier, "scale": objective.scale},
        )
        _write_curves(into / "plots" / "metrics", curves)


def _load(params: Params, where: str, backbone: torch.nn.Module, objective: torch.nn.Module) -> list[dict[str, float]]:
    path = Path(str(params.weights))
    if params.sha256 is not None and path.is_file():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != params.sha256:
            raise UserError(f"{where}.weights: {path.name} must have sha256 {params.sha256}; got {found}")
    body, head = split_head(load_checkpoint(path))
    fill(backbone, body, f"{where}.weights")
    objective.load_state_dict(fit_head(head, objective.state_dict(), f"{where}.weights"))
    return []


def _train(
    params: Params,
    name: str,
    backbone: torch.nn.Module,
    objective: torch.nn.Module,
    samples: Samples,
    images: Images,
    seed: int,
    device: torch.device,
) -> list[dict[str, float]]:
    labels = torch.from_numpy(samples.labels)
    train = samples.of("train")
    optimiser = torch.optim.SGD(
        [*backbone.parameters(), *objective.parameters()],
        lr=params.lr,
        momentum=params.momentum,
        weight_decay=params.weight_decay,
        nesterov=params.nesterov,
    )
    curves = []
    bar = progress(range(params.epochs), f"train_backbone {name}", unit="epoch")
    for epoch in bar:
        rate = learning_rate(params, epoch)
        for group in optimiser.param_groups:
            group["lr"] = rate
        backbone.train()
        draws = stream(seed, "stage1", "epoch", epoch)
        order = train[draws.permutation(len(train))]
        total, right = 0.0, 0
        with torch.random.fork_rng():
            torch.manual_seed(torch_seed(seed, "stage1", "noise", epoch))
            for first in range(0, len(order), params.batch_size):
                batch = order[first : first + params.batch_size]
                if len(batch) == 1:
                    continue  # batch norm cannot be trained on one image
                x = images.batch(batch.tolist(), [(seed, "stage1", epoch)] * len(batch)).to(device)
                y = labels[batch].to(device)
                loss, correct = _step_loss(params.mixup, backbone, objective, x, y, epoch, draws)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(batch)
                right += correct
        curves.append({"lr": rate, "loss": total / len(order), "accuracy": 100 * right / len(order)})
        bar.set_postfix(loss=f"{curves[-1]['loss']:.3f}", refresh=False)
    return curves


def _step_loss(
    mixup: float,
    backbone: torch.nn.Module,
    objective: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    epoch: int,
    draws: np.random.Generator,
) -> tuple[torch.Tensor, int]:
    """The loss of a batch and how many it gets right.

    Mixup (Zhang et al., ICLR 2018): one share and one permutation per batch, the loss mixed like the images.
    """
    share, other = 1.0, y
    if mixup:
        share = float(draws.beta(mixup, mixup))
        order = torch.from_numpy(draws.permutation(len(x))).to(x.device)
        x, other = share * x + (1 - share) * x[order], y[order]
    maps = backbone(x)
    loss = objective.loss(maps, y, epoch)
    if mixup:
        loss = share * loss + (1 - share) * objective.loss(maps, other, epoch)
    with torch.no_grad():
        features = torch.stack([global_average(m) for m in maps])
        guess = logits(objective.classifier, objective.state_dict(), features, objective.scale).argmax(1)
    return loss, int((guess == y).sum())


def _write_curves(folder: Path, curves: list[dict[str, float]]) -> None:
    for metric in curves[0] if curves else ():
        path = folder / "train" / f"{metric}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, delimiter="\t", lineterminator="\n")
            lines.writerow(["step", metric])
            lines.writerows([epoch, f"{point[metric]:.6g}"] for epoch, point in enumerate(curves))
