"""Which device to compute on, and how to make it repeat itself."""

import torch

from pipeline.errors import UserError


def choose(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; TF32 and benchmarking are off so that runs repeat."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {name} asked for, but torch sees no CUDA device; use --device cpu")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return device
