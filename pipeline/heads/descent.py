"""SGD with momentum for the parameters of a stack, by the function behind `torch.optim.SGD`.

The class itself imports torch's compiler when it is made: two seconds, as long as training takes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.sgd import sgd


@dataclass(frozen=True)
class Run:
    """Neighbouring heads of a stack, `first` up to, not including, `end`, with constants of their own.

    `factor`: their learning rate as a multiple of the one that a step is given.
    """

    first: int
    end: int
    factor: float
    weight_decay: float


class Descent:
    """Steps of SGD on `tensors`, name -> (K, ...), from their `grad`.

    `rates`: name -> factor on the learning rate, 1 for all others. `runs`: heads that have learning rates or weight
    decays of their own, together all K; None if all heads share `weight_decay` and the rate of a step. `state`, as in
    `torch.optim`, holds each tensor's `momentum_buffer` after the first step.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        rates: Mapping[str, float],
        momentum: float,
        weight_decay: float,
        runs: Sequence[Run] | None = None,
    ) -> None:
        self.tensors = [(tensor, rates.get(name, 1.0)) for name, tensor in tensors.items()]
        self.momentum, self.weight_decay, self.runs = momentum, weight_decay, runs
        self.state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of learning rate `rate`."""
        for tensor, factor in self.tensors:
            assert tensor.grad is not None
            gradient = tensor.grad.contiguous()  # the fused kernel on the CPU does not look at strides
            own = self.state[tensor]
            if self.runs is None:
                buffers = [own.get("momentum_buffer")]
                self._sgd(tensor, gradient, buffers, rate * factor, self.weight_decay)
                own["momentum_buffer"] = buffers[0]
                continue
            if own.get("momentum_buffer") is None:
                own["momentum_buffer"] = torch.zeros_like(gradient)
            for run in self.runs:
                part = slice(run.first, run.end)
                buffer: list[torch.Tensor | None] = [own["momentum_buffer"][part]]
                self._sgd(tensor[part], gradient[part], buffer, rate * factor * run.factor, run.weight_decay)

    def _sgd(
        self,
        tensor: torch.Tensor,
        gradient: torch.Tensor,
        buffers: list[torch.Tensor | None],
        rate: float,
        weight_decay: float,
    ) -> None:
        sgd(
            [tensor],
            [gradient],
            buffers,
            fused=True,
            lr=rate,
            momentum=self.momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
