"""Focal loss: cross-entropy weighted by (1 - p_y)^gamma, so that samples that are predicted well count less.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. (4): mean_i (1 - p_y)^gamma (-log p_y) with
p the softmax, as in long-tail repositories, or with a sigmoid per class, as published. gamma is 2 there; long-tail
repositories use 1 or 2. Batches are drawn instance-wise, as there; with `receiver: balanced` it is DR with this loss.

Published setting: the whole network, for detecting objects. Repositories for CIFAR-LT train by it from the first of 200
epochs; some multiply the loss by 10.
"""

from h2t.pipeline.heads.host import WeightedHost
from h2t.pipeline.training.weighted import Focal

NUMBER = 2026112601  # other results, another number: docs/numbers.md

Loss = Focal


class Host(WeightedHost):
    """Starts from the stage-I classifier."""
