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
        self.tensors = [(tensor, rates.get(name, 1.0)) for name, tensor in tensors.items()]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of learning rate `rate`."""
        for tensor, factor in self.tensors:
            assert tensor.grad is not None
            buffers = [self.state[tensor].get("momentum_buffer")]
            sgd(
                [tensor],
                [tensor.grad.contiguous()],  # the fused kernel on the CPU does not look at strides
                buffers,
                fused=True,
                lr=rate * factor,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            self.state[tensor]["momentum_buffer"] = buffers[0]
