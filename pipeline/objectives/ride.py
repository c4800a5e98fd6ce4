"""RIDE: several experts, each trained with a margin loss, and a term that rewards different predictions.

Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021, section 3, as
in the authors' code. The loss is the sum over experts e of
CE_w(z_e - s m_y 1_y, y) + diversity T^2 KL(softmax(z / T_j) || softmax(z_e / T_j)),
with m the margins of LDAM and z the mean of the experts' logits, without gradient in the second term. Before
`reweight_epoch` w = 1 and T_j = T = 1. From then on w are the weights of LDAM-DRW, T_j = temperature t_j / max t with
t_j = K eta n_j / N + 1 - eta, and T is the mean of the T_j.

Published setting: on CIFAR-100-LT 200 epochs, Nesterov's momentum, weight decay 0.0005, times 0.01 at epochs 160 and
180, images rotated by up to 15 degrees, experts of three quarters of the channels. Presets have experts of full width,
as the code of H2T does.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from h2t.pipeline.base.params import Beta, Index, NonNegative, Positive, Ratio, Real, Section
from h2t.pipeline.networks.classifier import expert_logits, fresh_linear, global_average
from h2t.pipeline.training import objective
from h2t.pipeline.training.longtail import effective_weights, ldam_margins

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `backbones.NAME.loss`; the defaults are those for CIFAR-100-LT.

    With a linear classifier the margins have scale 1, unlike in the authors' code, which keeps 30 for every classifier.
    No configuration with a linear one was published.
    """

    classifier: Literal["linear", "cosine"] = "cosine"
    """Linear or cosine classifier of each expert."""
    scale: Positive = 30.0
    """Factor of the cosine logits; a linear classifier has 1."""
    margin: NonNegative = 0.5
    """Largest margin, that of the rarest class."""
    diversity: Real = -0.45
    """Weight of the divergence between each expert and their mean; negative values push experts apart."""
    temperature: Positive = 1.0
    """Highest temperature of the divergence, that of the most frequent class."""
    eta: Ratio = 0.05
    """How much temperatures follow the class counts: 0 not at all, 1 in proportion."""
    beta: Beta = 0.9999
    """Class weights by the effective number of samples, from `reweight_epoch` on."""
    reweight_epoch: Index = 160
    """Epoch, counted from 0, from which classes are weighted and temperatures apply."""


def temperatures(counts: torch.Tensor, temperature: float, eta: float) -> torch.Tensor:
    """T_j, (K,), float64, from counts (K,)."""
    relative = len(counts) * eta * counts.double() / counts.sum() + 1 - eta
    return temperature * relative / relative.max()


class Objective(objective.Objective):
    """One classifier per expert; at test time their logits are averaged."""

    def __init__(self, loss: Loss, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        self.classifier = loss.classifier
        self.scale = loss.scale if loss.classifier == "cosine" else 1.0
        self.diversity = loss.diversity
        self.reweight_epoch = loss.reweight_epoch
        shape = (experts, len(counts), channels)
        if loss.classifier == "cosine":
            self.weight = nn.Parameter(F.normalize(torch.empty(shape).uniform_(-1, 1), dim=-1))
        else:
            self.weight, self.bias = map(nn.Parameter, fresh_linear(*shape))
        self.margins = ldam_margins(counts, loss.margin)
        self.weights = effective_weights(counts, loss.beta)
        self.temperatures = temperatures(counts, loss.temperature, loss.eta)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits of each expert, (E, B, K)."""
        features = torch.stack([global_average(m) for m in maps])
        return expert_logits(self.classifier, dict(self.named_parameters()), features, self.scale)

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """The loss, summed over experts and averaged over the batch, from logits of each expert (E, B, K)."""
        reweighted = epoch >= self.reweight_epoch
        weights = self.weights.to(outputs) if reweighted else None
        heat = self.temperatures.to(outputs) if reweighted else torch.ones_like(self.margins).to(outputs)
        margins = self.scale * F.one_hot(labels, len(self.margins)) * self.margins.to(outputs)
        mean = (outputs.detach().mean(0) / heat).log_softmax(-1)
        total = outputs.new_zeros(())
        for logits in outputs:
            distance = F.kl_div((logits / heat).log_softmax(-1), mean, reduction="batchmean", log_target=True)
            classified = F.cross_entropy(logits - margins, labels, weights)
            total = total + classified + self.diversity * heat.mean() ** 2 * distance
        return total
