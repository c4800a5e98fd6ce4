"""The processes of one training run: those that torchrun started, or one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from h2t.pipeline.base.errors import UserError, first_line, of_the_machine


@dataclass(frozen=True)
class Group:
    """Process number `rank`, from 0, of `size` processes, and the device it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, in one message. All have one dtype and device.

        Raises UserError if another process has ended.
        """
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        try:
            distributed.all_reduce(flat)
        except RuntimeError as error:  # gloo has no exception class of its own
            if of_the_machine(error) is not None:
                raise
            raise UserError(
                f"torchrun: another process of this training has ended ({first_line(error)}); mend the error that "
                "it printed, then run the same command again"
            ) from None
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def processes(device: torch.device) -> Iterator[Group]:
    """The group in torchrun's environment: NCCL with one GPU per process, or gloo on the CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(device, distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
