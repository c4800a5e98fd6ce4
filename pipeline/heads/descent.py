"""SGD with momentum for the parameters of a stack, by the function behind `torch.optim.SGD`.

The class itself imports torch's compiler when it is made: two seconds, as long as training takes.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.sgd import sgd


class Descent:
    """Steps of SGD on `tensors`, name -> (K, ...), from their `grad`.

    `rates`: name -> factor on the learning rate, 1 for all others. `state`, as in `torch.optim`, holds each tensor's
    `momentum_buffer` after the first step.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], rates: Mapping[str, float], momentum: float, weight_decay: float
    ) -> None:
        self.groups: dict[float, list[torch.Tensor]] = defaultdict(list)
        for name, tensor in tensors.items():
            self.groups[rates.get(name, 1.0)].append(tensor)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of learning rate `rate`."""
        for factor, tensors in self.groups.items():
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
