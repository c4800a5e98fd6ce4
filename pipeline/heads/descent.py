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
class PerHead:
    """Constants of each head: its learning rate as a multiple of the one that a step is given, and its weight decay."""

    factors: Sequence[float]
    weight_decays: Sequence[float]


class Descent:
    """Steps of SGD on `tensors`, name -> (K, ...), from their `grad`.

    `rates`: name -> factor on the learning rate, 1 for all others. `per_head`: constants of the K heads; None if all
    share `weight_decay` and the rate of a step. `state`, as in `torch.optim`, holds each tensor's `momentum_buffer`
    after the first step.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        rates: Mapping[str, float],
        momentum: float,
        weight_decay: float,
        per_head: PerHead | None = None,
    ) -> None:
        self.by_factor: dict[float, list[torch.Tensor]] = defaultdict(list)
        for name, tensor in tensors.items():
            self.by_factor[rates.get(name, 1.0)].append(tensor)
        self.momentum, self.weight_decay, self.per_head = momentum, weight_decay, per_head
        self.state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        # For each tensor: factors and weight decays in its own dtype, (K, 1, ...).
        self._own = {tensor: _columns(per_head, tensor) for tensor in tensors.values()} if per_head else {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of learning rate `rate`."""
        for factor, tensors in self.by_factor.items():
            if self.per_head:
                for tensor in tensors:
                    self._step_per_head(tensor, rate * factor)
                continue
            buffers = [self.state[tensor].get("momentum_buffer") for tensor in tensors]
            # The fused kernel on the CPU ignores strides.
            gradients = [tensor.grad.contiguous() for tensor in tensors if tensor.grad is not None]
            assert len(gradients) == len(tensors)
            sgd(
                tensors,
                gradients,
                buffers,
                fused=True,
                lr=rate * factor,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            for tensor, buffer in zip(tensors, buffers, strict=True):
                self.state[tensor]["momentum_buffer"] = buffer

    def _step_per_head(self, tensor: torch.Tensor, rate: float) -> None:
        """The same formula; the function behind torch's SGD takes no tensors of rates or weight decays."""
        assert tensor.grad is not None
        factors, decays = self._own[tensor]
        gradient = torch.addcmul(tensor.grad, tensor, decays)
        buffer = self.state[tensor].get("momentum_buffer")
        buffer = gradient if buffer is None else buffer.mul_(self.momentum).add_(gradient)
        self.state[tensor]["momentum_buffer"] = buffer
        tensor.addcmul_(buffer, factors, value=-rate)


def _columns(per_head: PerHead, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (-1, *(1,) * (tensor.dim() - 1))
    factors, decays = (
        torch.tensor(values, dtype=tensor.dtype, device=tensor.device).reshape(shape)
        for values in (per_head.factors, per_head.weight_decays)
    )
    return factors, decays
