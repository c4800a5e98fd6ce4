"""A head: everything between the maps of a backbone and the logits."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from h2t.pipeline.heads.host import FittedHost, GradientHost, Host, State, TrainingBatch
from h2t.pipeline.networks.pool import Pool
from h2t.pipeline.networks.trained import StageOneHead

POOL = "pool."  # prefix of the pool's parameters in a head's state
MAP_AXES = 5  # (E, B, C, H, W); pooled features have fewer


@dataclass(frozen=True)
class Head:
    """Pool, an optional frozen part, then the host's classifier.

    A head's state is one mapping, name -> tensor: the host's parameters under their own names, the pool's with the
    prefix `pool.`. Inputs are maps (E, B, C, H, W), or features that were pooled as they were read, (E, B, C) or
    (E, B, C, M). `frozen` is what lies between pool and classifier (norms, hidden layers): features -> features
    (E, B, D), without trained parameters. It is applied after fusion and pooling.
    """

    host: Host
    pool: Pool
    frozen: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def linear(self) -> bool:
        """True if the training loss depends on the pooled features only through linear or cosine logits."""
        return self.host.linear and self.frozen is None

    @property
    def gradient_host(self) -> GradientHost:
        """The host. Raises TypeError if it is not trained by gradient descent."""
        if not isinstance(self.host, GradientHost):
            raise TypeError(f"{type(self.host).__name__} has a closed-form fit and is not trained")
        return self.host

    def prepare(self, x: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Shows the host maps or pooled features of all training samples, in ascending order of `labels` (N,)."""
        with torch.no_grad():
            self.gradient_host.prepare(self.features(self.pool_state(x.device), x), labels, stage1)

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """The state before the first step. Raises UserError if the stage-I classifier does not fit the host."""
        return {**self.gradient_host.initial(stage1, draws), **self.pool_state(torch.device("cpu"))}

    def features(self, state: State, x: torch.Tensor) -> torch.Tensor:
        """The classifier's input, (E, B, D) or (E, B, D, M): `x`, pooled if it holds maps, after the frozen part."""
        if x.dim() == MAP_AXES:
            x = self.pool({k.removeprefix(POOL): t for k, t in state.items() if k.startswith(POOL)}, x)
        return x if self.frozen is None else self.frozen(x)

    def logits(self, state: State, x: torch.Tensor) -> torch.Tensor:
        """Maps or pooled features -> logits (B, K)."""
        return self.host.logits(_of_host(state), self.features(state, x))

    def batch_loss(self, state: State, batch: TrainingBatch) -> torch.Tensor:
        """The training loss, a scalar; `features` (after fusion) and `partners` are maps or pooled features."""
        partners = None if batch.partners is None else self.features(state, batch.partners)
        features = self.features(state, batch.features)
        return self.gradient_host.batch_loss(_of_host(state), batch._replace(features=features, partners=partners))

    def update(self, state: State, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """New values of the host's `fixed` parameters after a step on the fused input `x`."""
        return self.gradient_host.update(_of_host(state), self.features(state, x), labels)

    def fit(self, x: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """The state of a closed-form fit on maps or pooled features of all training samples, in ascending label order.

        Raises TypeError if the host is trained by gradient descent, and UserError if the stage-I classifier does not
        fit.
        """
        if not isinstance(self.host, FittedHost):
            raise TypeError(f"{type(self.host).__name__} is trained by gradient descent and has no closed-form fit")
        pool = self.pool_state(x.device)
        return {**self.host.fit(self.features(pool, x), labels, stage1), **pool}

    def pool_state(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The initial parameters of the pool on `device`, as they stand in a head's state."""
        return {POOL + name: t.to(device) for name, t in self.pool.initial().items()}


def _of_host(state: State) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.items() if not name.startswith(POOL)}
