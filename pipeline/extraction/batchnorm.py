"""Estimates, loads and saves batch-norm statistics of a backbone. `extraction.recipes` says what they are for."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.data.classes import class_index
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.samples import Samples

BATCH = 128
#: Weight of the instance statistics in `mixture`. The published loop passes a balanced and then an instance batch in
#: each step, with momentum 0.1. Its running statistics converge to the weights 0.9 / 1.9 and 1 / 1.9 = 0.526.
INSTANCE_SHARE = 0.526

#: Name of the statistics -> name of the buffer -> values (C,), float32.
Statistics = dict[str, dict[str, torch.Tensor]]

#: Name of the statistics -> the samplers whose batches they are estimated on, in turn.
SAMPLERS = {
    "balanced": ("balanced",),
    "instance": ("instance",),
    "reverse": ("reverse",),
    "calibrated": ("balanced", "instance"),
}


def _norms(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    """The batch norms before pooling. Those after it belong to the head and keep their statistics."""
    after = {part for module in getattr(backbone, "modules_after", ()) for part in module.modules()}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in after:
            yield name, module


def current(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the running means and variances of `backbone`, (C,) each, by buffer name, on the CPU."""
    return {
        f"{name}.{kind}": getattr(module, kind).detach().cpu().clone()
        for name, module in _norms(backbone)
        for kind in ("running_mean", "running_var")
    }


def use(backbone: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Overwrites the running statistics of `backbone` with `buffers`."""
    for name, module in _norms(backbone):
        module.running_mean.copy_(buffers[f"{name}.running_mean"])
        module.running_var.copy_(buffers[f"{name}.running_var"])


@torch.no_grad()
def estimate(
    backbone: nn.Module,
    samplers: tuple[str, ...],
    samples: Samples,
    images: Images,
    *,
    passes: int,
    seed: int,
    device: torch.device,
    name: str,
) -> dict[str, torch.Tensor]:
    """Estimates running statistics on `passes` augmented training batches, drawn by `samplers` in turn.

    The result averages the batches' means and unbiased variances, with frozen weights. The statistics of `backbone`
    itself are unchanged afterwards. Images and batches depend on `seed` and `name` alone.
    """
    before = current(backbone)
    backbone.train()
    live = [m for _, m in _norms(backbone) if m.training]  # frozen parts keep their statistics
    momenta = [m.momentum for m in live]
    train = samples.of("train")
    index = class_index(samples.labels[train], samples.facts["classes"])
    size = min(BATCH, len(train))
    steps = len(train) // size
    modules = [plugins.load("samplers", sampler) for sampler in samplers]
    backbone.eval()
    for module in live:
        module.reset_running_stats()
        module.momentum = None  # torch then averages over all batches
        module.train()
    try:
        for number in progress(range(passes), f"batch norm {name}", unit="batch"):
            which = number % len(modules)
            turn = number // len(modules)

            def streams(*key: int, which: int = which) -> object:
                return stream(seed, "batchnorm", name, samplers[which], *key)

            drawn = train[modules[which].draw(index, streams, turn // steps, turn % steps, size)]
            x = images.batch(drawn.tolist(), [(seed, "batchnorm", name, number, i) for i in range(len(drawn))])
            backbone(x.to(device))
        return current(backbone)
    finally:
        for module, momentum in zip(live, momenta, strict=True):
            module.momentum = momentum
        use(backbone, before)
        backbone.eval()


def compute(
    backbone: nn.Module,
    wanted: list[str],
    samples: Samples,
    images: Images,
    *,
    passes: int,
    seed: int,
    device: torch.device,
) -> Statistics:
    """All statistics named in `wanted`: estimated, mixed of estimated ones, or those of stage I."""
    statistics: Statistics = {}
    needed = set(wanted) | ({"balanced", "instance"} if "mixture" in wanted else set())
    for name in sorted(needed & set(SAMPLERS)):
        statistics[name] = estimate(
            backbone, SAMPLERS[name], samples, images, passes=passes, seed=seed, device=device, name=name
        )
    if "mixture" in wanted:
        statistics["mixture"] = {
            buffer: INSTANCE_SHARE * value + (1 - INSTANCE_SHARE) * statistics["balanced"][buffer]
            for buffer, value in statistics["instance"].items()
        }
    if "stage1" in wanted:
        statistics["stage1"] = current(backbone)
    return {name: statistics[name] for name in sorted(wanted)}


def to_bytes(statistics: Statistics) -> bytes:
    """A safetensors file with keys `<statistics>/<buffer>`. Equal values give equal bytes.

    Statistics of a network without batch norm are an empty tensor `<statistics>/`.
    """
    none = {"": torch.empty(0)}
    return save({f"{name}/{buffer}": t for name, own in statistics.items() for buffer, t in (own or none).items()})


def from_bytes(data: bytes) -> Statistics:
    """The statistics that `to_bytes` wrote. Raises UserError if `data` is malformed or not finite."""
    statistics: Statistics = {}
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"batchnorm.safetensors: cannot be read ({error}); extract again") from None
    for key, tensor in tensors.items():
        name, _, buffer = key.partition("/")
        if key == f"{name}/" and not tensor.numel():
            statistics.setdefault(name, {})
            continue
        if not buffer:
            raise UserError(f"batchnorm.safetensors: keys must be <statistics>/<buffer>; got {key!r}; extract again")
        if not tensor.isfinite().all():
            raise UserError(f"batchnorm.safetensors: {key} holds NaN or infinity; extract again")
        statistics.setdefault(name, {})[buffer] = tensor
    return statistics
