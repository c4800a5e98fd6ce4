"""Choosing the device to compute on, with settings that make runs repeatable."""

import re
from typing import TYPE_CHECKING

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted

if TYPE_CHECKING:
    import torch


def check(name: object) -> None:
    """Raises UserError unless `name` is a valid device name. Does not check that this machine has the device."""
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"device: must be auto, cpu, cuda or cuda:N; got {name!r}")


def choose(name: str) -> "torch.device":
    """The device called `auto`, `cpu`, `cuda` or `cuda:N`. Raises UserError if this machine does not have it.

    Makes cuDNN deterministic and turns off its benchmarking, so that runs are repeatable, and turns off TF32, which
    keeps 10 of float32's 23 fraction bits and which torch allows in convolutions by default.
    """
    import torch

    check(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: must be present on this machine; got {name}, but torch sees "
            f"{counted(torch.cuda.device_count(), 'CUDA device')}; use --device cpu"
        )
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return device
