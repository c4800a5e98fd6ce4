"""Batch-norm statistics: how they are estimated, put in place and kept. `extraction.recipes` says what they are for."""

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
#: Running mixture of the published loop at rest: two passes a step with momentum 0.1, the instance batch last.
INSTANCE_SHARE = 0.526

Statistics = dict[str, dict[str, torch.Tensor]]  # statistics name -> buffer name -> values


#: Statistics name -> the samplers whose batches it is estimated on, in turn.
SAMPLERS = {
    "balanced": ("balanced",),
    "instance": ("instance",),
    "reverse": ("reverse",),
    "calibrated": ("balanced", "instance"),
}


def _norms(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield name, module


def current(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances that `backbone` holds now, by buffer name."""
    return {
        f"{name}.{kind}": getattr(module, kind).detach().cpu().clone()
        for name, module in _norms(backbone)
        for kind in ("running_mean", "running_var")
    }


def use(backbone: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Puts `buffers` in place of the running statistics of `backbone`."""
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
    """Running statistics over `passes` augmented training batches drawn by `samplers` in turn, weights frozen.

    Cumulative average of the batches' means and unbiased variances, in train mode. `backbone` keeps its own statistics.
    """
    before = current(backbone)
    backbone.train()
    live = [m for _, m in _norms(backbone) if m.training]  # a frozen part of the backbone keeps its statistics
    momenta = [m.momentum for m in live]
    train = samples.of("train")
    index = class_index(samples.labels[train], samples.facts["classes"])
    size = min(BATCH, len(train))
    steps = len(train) // size
    laws = [plugins.load("samplers", sampler) for sampler in samplers]
    backbone.eval()
    for module in live:
        module.reset_running_stats()
        module.momentum = None  # torch's way to say: cumulative average
        module.train()
    try:
        for number in progress(range(passes), f"batch norm {name}", unit="batch"):
            which = number % len(laws)
            turn = number // len(laws)

            def streams(*key: int, which: int = which) -> object:
                return stream(seed, "batchnorm", name, samplers[which], *key)

            drawn = train[laws[which].draw(index, streams, turn // steps, turn % steps, size)]
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
    """All statistics named in `wanted`."""
    found: Statistics = {}
    needed = set(wanted) | ({"balanced", "instance"} if "mixture" in wanted else set())
    for name in sorted(needed & set(SAMPLERS)):
        found[name] = estimate(
            backbone, SAMPLERS[name], samples, images, passes=passes, seed=seed, device=device, name=name
        )
    if "mixture" in wanted:
        found["mixture"] = {
            buffer: INSTANCE_SHARE * value + (1 - INSTANCE_SHARE) * found["balanced"][buffer]
            for buffer, value in found["instance"].items()
        }
    if "stage1" in wanted:
        found["stage1"] = current(backbone)
    return {name: found[name] for name in sorted(wanted)}


def to_bytes(statistics: Statistics) -> bytes:
    """A safetensors file with keys `<statistics>/<buffer>`; the same values give the same bytes."""
    return save({f"{name}/{buffer}": t for name, buffers in statistics.items() for buffer, t in buffers.items()})


def from_bytes(data: bytes) -> Statistics:
    """What `to_bytes` wrote. Raises UserError for anything else, and for numbers that are not finite."""
    found: Statistics = {}
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"batchnorm.safetensors: cannot be read ({error}); extract again") from None
    for key, tensor in tensors.items():
        name, _, buffer = key.partition("/")
        if not buffer:
            raise UserError(f"batchnorm.safetensors: key {key!r} is not <statistics>/<buffer>")
        if not tensor.isfinite().all():
            raise UserError(f"batchnorm.safetensors: {key} holds NaN or infinity; extract again")
        found.setdefault(name, {})[buffer] = tensor
    return found
