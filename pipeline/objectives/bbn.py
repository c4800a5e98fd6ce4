"""BBN: one branch trains on instance-wise images, one on a reverse sampler's, and the weight moves to the second.

Source: Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual Recognition", CVPR
2020, section 4, as in the authors' code. In epoch T of T_max (T from 1) a = 1 - ((T - 1) / T_max)^2. Images x_c are
drawn instance-wise, images x_r of a class with probability proportional to 1 / its count; each batch runs through its
branch alone. With f_c, f_r the averaged maps, the logits are z = W [2 a f_c; 2 (1 - a) f_r] + b and the loss is
a CE(z, y_c) + (1 - a) CE(z, y_r). At test time both branches see the same image and a is 1/2: z = W [f_c; f_r] + b.

A cache holds both branches' maps of each image, as two experts. `scale` 2 makes the mean of the experts' logits the
published sum, so hosts train a classifier on the concatenated features. Of the two biases the second stays 0, because
the published classifier has one. The training accuracy is that of the mixed logits, mixed like the loss.

Published setting: ResNet-32 whose branches own the last block (`options: {experts: 2, fork: last_block}`), on CIFAR-LT
200 epochs, two batches of 128, rate 0.1, times 0.01 at epochs 120 and 160, in `presets/cifar10-100-objectives`. For 90
or 180 epochs the authors' code divides by 100 or 200 in place of T_max; here it is always T_max. An epoch runs twice as
many images as with other objectives. The H2T paper quotes 79.82 and 42.56 for CIFAR-10-LT and CIFAR-100-LT, ratio 100.
"""

import torch
from torch import nn
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.classifier import global_average, logits
from h2t.pipeline.training import objective

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Objective(objective.Objective):
    """One linear classifier on the features of all branches, E D numbers; initial weights are torch's default ones."""

    classifier = "linear"

    def __init__(self, loss: Section, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        whole = nn.Linear(experts * channels, len(counts))
        with torch.no_grad():
            self.weight = nn.Parameter(whole.weight.unflatten(1, (experts, channels)).transpose(0, 1).contiguous())
            self.bias = nn.Parameter(F.pad(whole.bias[None], (0, 0, 0, experts - 1)))
        self.scale = float(experts)

    def first_branch_share(self, progress: float) -> float:
        """a, from `progress` (T - 1) / T_max."""
        return 1 - progress**2

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits (B, K), the sum over branches."""
        features = torch.stack([global_average(m) for m in maps])
        bias = F.pad(self.bias[:1], (0, 0, 0, len(maps) - 1))  # so that the others get no gradient
        return logits("linear", {"weight": self.weight, "bias": bias}, features, self.scale)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Cross-entropy of logits (B, K)."""
        return F.cross_entropy(outputs, labels)
