"""Which device to compute on, and how to make it repeat itself."""

import re

import torch

from h2t.pipeline.base.errors import UserError


def check(name: object) -> None:
    """Raises UserError for anything but a device's name. Whether this machine has it is not asked."""
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"device: must be auto, cpu, cuda or cuda:N; got {name!r}")


def choose(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; TF32 and benchmarking are off so that runs repeat."""
    check(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {name} asked for, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return device
