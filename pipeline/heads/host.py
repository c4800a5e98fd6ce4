"""What a stage-II method is: trainable parameters, logits, a loss. Written for one head; `heads.stack` trains many.

Inside `loss`, `logits` and `update` tensors are plain (vmap adds the stack's axis), and nothing may be drawn:
randomness comes in through `noise`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.networks.classifier import expert_logits, logits
from h2t.pipeline.networks.trained import StageOneHead

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Context:
    """What a host may know of its task.

    Training counts per class (K,) in descending order, channels, experts, and how many pixels a map has.
    """

    counts: torch.Tensor
    channels: int
    experts: int
    pixels: int = 1

    @property
    def classes(self) -> int:
        return len(self.counts)


class Host:
    """What all hosts share: a classifier on pooled features (E, B, D), by default `networks.classifier.logits`."""

    #: True for a closed-form fit, False for gradient descent.
    fitted = False
    #: The sampler of the training batches' receivers.
    receiver = "balanced"
    #: Numbers per channel that its features have: 1, or the 2 of pool `moments` as (E, B, D, 2).
    numbers = 1

    def __init__(self, classifier: str, scale: float, context: Context) -> None:
        self.classifier = classifier
        self.scale = scale
        self.context = context

    def stage1_state(self, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """A copy of the stage-I classifier's parameters. Raises UserError if it does not fit this host."""
        if not stage1.state:
            raise UserError(
                "this host starts from the classifier of stage I, and imported features have none; use crt, ncm or "
                "logistic_regression"
            )
        if stage1.classifier != self.classifier:
            raise UserError(
                f"classifier: a {self.classifier} head cannot start from the {stage1.classifier} head of stage I; "
                "choose a backbone trained with that classifier, or the other classifier"
            )
        context = self.context
        wanted = (context.experts, context.classes, context.channels)
        found = tuple(stage1.state["weight"].shape)
        if found != wanted:
            raise UserError(f"stage-I head: (experts, classes, channels) must be {wanted}; got {found}")
        return {name: tensor.clone() for name, tensor in stage1.state.items()}

    def expert_logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits of each expert (E, B, K)."""
        return expert_logits(self.classifier, state, features, self.scale)

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits (B, K), the mean of the experts; without fusion, as at evaluation."""
        return logits(self.classifier, state, features, self.scale)


class GradientHost(Host):
    """Base of hosts that are trained by gradient descent. A host overrides what is its own."""

    #: Factor on the learning rate of single parameters.
    rates: Mapping[str, float] = {}
    #: Parts of the state that the optimiser leaves alone.
    fixed: frozenset[str] = frozenset()

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """Starting state: the stage-I classifier (H2T paper, Algorithm 1). Raises UserError if it does not fit."""
        return self.stage1_state(stage1)

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor | None:
        """The random part of the loss of one batch, or None. Called once per (host, seed, step)."""
        return None

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The scalar loss of a batch: features (E, B, D) after fusion and pooling, the receivers' labels (B,)."""
        raise NotImplementedError

    def update(self, state: State, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """New values of `fixed` parts after a step on `features`, such as running means; by default none."""
        return {}


class FittedHost(Host):
    """Base of hosts that are solved at once, on every training row. They have no donors, hence no H2T."""

    fitted = True
    receiver = "instance"

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """The head's state from features (E, N, D) and labels (N,) of the training samples, ascending by label."""
        raise NotImplementedError
