"""M2m on features: samples of large classes are translated into rare ones by the stage-I classifier.

Source: Kim, Jeong and Shin, "M2m: Imbalanced Classification via Major-to-minor Translation", CVPR 2020, section 3. A
sample of class k in a class-balanced batch is replaced with probability 1 - n_k / n_max. The seed is drawn among the
batch, a sample of class k0 with probability proportional to q = 1 - beta^max(n_k0 - n_k, 0). It takes `steps` steps x -
r G / |G| with G the gradient of CE(g(x), k) + lambda f_k0(x); g is the stage-I classifier, f the one in training. The
result is kept if g_k(x) >= gamma and with probability q; else the sample stays. beta 0.999, lambda 0.5 and gamma 0.9 as
in the authors' code, which has ten steps of 0.1 on images.

Published setting: the whole network, on images, in the last 40 of 200 epochs; g is a network of its own, and a seed
starts from noise. Here x are features, after fusion; a step's length is a share of the mean feature length; features
are cut at 0 below, as after a ReLU; the start has no noise. On features g is what decides, so kept samples are easy for
it.
"""

import numpy as np
import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Count, NonNegative, Positive, Ratio, Section
from h2t.pipeline.heads.host import GradientHost, State
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.longtail import own_class

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    beta: Ratio = 0.999
    """Near 1, seeds must come from much larger classes."""
    suppress: NonNegative = 0.5
    """Weight of the seed class's logit, lambda in the paper."""
    confidence: Ratio = 0.9
    """Least probability of the new class, gamma in the paper."""
    steps: Count = 10
    """Steps of the translation."""
    step: Positive = 0.1
    """Length of a step, as a share of the mean feature length."""


class Host(GradientHost):
    """Needs a linear classifier, whose gradient has a closed form."""

    only_classifier = "linear"
    constants: Loss
    length: torch.Tensor  # mean length of the training features, ()
    first_weight: torch.Tensor  # of stage I, (E, K, D)
    first_bias: torch.Tensor  # of stage I, (E, K)

    def prepare(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Keeps the stage-I classifier and the mean length of the features of all experts together."""
        state = self.stage1_state(stage1)
        self.first_weight, self.first_bias = (state[name].to(features) for name in ("weight", "bias"))
        self.length = features.square().sum((0, -1)).sqrt().mean()

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor:
        """(batch, 3), uniform: whether a sample is to be replaced, which seed it gets, and whether the result stays."""
        return torch.from_numpy(draws.random((batch, 3)))

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch, some of whose samples are translated."""
        assert noise is not None
        of_class = self.context.counts.double()
        counts = of_class.to(features)[labels]
        more = (counts - counts.unsqueeze(-1)).clamp_min(0)  # n_k0 - n_k of seed k0 for sample k, (B, B)
        odds = 1 - self.constants.beta**more
        reached = odds.cumsum(-1)
        seeds = (reached <= noise[:, 1:2] * reached[:, -1:]).sum(-1).clamp_max(len(labels) - 1)
        x = self.translated(state, features[:, seeds], labels[seeds], labels)
        probability = self._first(x).softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        kept = odds.gather(-1, seeds.unsqueeze(-1)).squeeze(-1)
        replaced = (noise[:, 0] < 1 - counts / of_class.max()) & (probability >= self.constants.confidence)
        replaced = replaced & (noise[:, 2] < kept)
        x = torch.where(replaced.unsqueeze(-1), x, features)
        return F.cross_entropy(self.logits(state, x), labels)

    def translated(self, state: State, features: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) of classes `old` (B,) after their steps towards the classes `new` (B,); no gradient."""
        experts, constants = len(features), self.constants
        suppressed = constants.suppress * self.scale * state["weight"].detach()[:, old] / experts
        target = own_class(self._first(features), new).to(features)
        for _ in range(constants.steps):
            apart = self._first(features).softmax(-1) - target
            gradient = self.scale * (apart @ self.first_weight) / experts + suppressed
            length = gradient.square().sum((0, -1)).sqrt().unsqueeze(-1) + 1e-10
            features = (features - constants.step * self.length * gradient / length).clamp_min(0)
        return features

    def _first(self, features: torch.Tensor) -> torch.Tensor:
        """The logits of the stage-I classifier, (B, K)."""
        return self.logits({"weight": self.first_weight, "bias": self.first_bias}, features)
