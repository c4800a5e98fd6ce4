"""cRT: a new classifier, trained from random weights by cross-entropy on class-balanced batches.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1.

Published setting: in the authors' code batches of 512, rate 0.2, sampler `cyclic`, and batch norm in train mode with
frozen scales. Here batches of 128, rate 0.02 and sampler `balanced`, unless set otherwise.
"""

import math

import numpy as np
import torch

from h2t.pipeline.heads.host import CrossEntropyHost
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Host(CrossEntropyHost):
    """The initial weights are uniform within +- 1 / sqrt(D), as in torch's linear layer; stage I's are not used."""

    starts_from = "own"
    linear = True

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """Weight (E, K, D) and, for a linear classifier, bias (E, K), drawn by the head's seed."""
        context = self.context
        bound = 1 / math.sqrt(context.channels)
        shape = (context.experts, context.classes, context.channels)
        state = {"weight": torch.from_numpy(draws.uniform(-bound, bound, shape))}
        if self.classifier == "linear":
            state["bias"] = torch.from_numpy(draws.uniform(-bound, bound, shape[:2]))
        return state
