"""Focal loss: cross-entropy weighted by (1 - p_y)^gamma, so that samples that are predicted well count less.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. (4): mean_i (1 - p_y)^gamma (-log p_y) with
p the softmax, as in long-tail repositories, or with a sigmoid per class, as published. gamma is 2 there; long-tail
repositories use 1 or 2, from the first epoch on. Host `focal` has the same loss.

Published setting: for detecting objects. On CIFAR-LT other authors take 200 epochs, rate 0.1, times 0.01 at epochs 160
and 180 (`gamma: 0.01`); some multiply the loss by 10.
"""

from h2t.pipeline.training.weighted import Focal, WeightedObjective

NUMBER = 2026112601  # other results, another number: docs/numbers.md

Loss = Focal


class Objective(WeightedObjective):
    """A linear classifier; the loss is taken on the mean of the experts' logits."""
