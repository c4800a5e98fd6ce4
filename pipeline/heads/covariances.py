"""The covariances of each class's features, and hosts that train as if features were drawn by them."""

import torch

from h2t.pipeline.heads.host import GradientHost, State, TrainingBatch
from h2t.pipeline.networks.trained import StageOneHead


def class_covariances(features: torch.Tensor, counts: list[int], *, full: bool) -> torch.Tensor:
    """Covariance of the features of each class, divided by its count: (E, K, D, D), or the diagonals (E, K, D).

    From features (E, N, D), sorted by class, `counts` of each. 0 for a class of one sample.
    """
    found = []
    for own in features.split(counts, dim=1):
        apart = own.double() - own.double().mean(1, keepdim=True)
        covariance = apart.mT @ apart if full else apart.square().sum(1)
        found.append((covariance / own.shape[1]).to(features.dtype))
    return torch.stack(found, 1)


def spread(weight: torch.Tensor, covariances: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """d^T S_y d with d = w_k - w_y, the mean over experts, (B, K): the variance of z_k - z_y if features have S_y.

    `weight` (E, K, D), `covariances` (E, K, D, D) or diagonals (E, K, D), `labels` (B,). One product per class rather
    than per sample.
    """
    if covariances.dim() == weight.dim():
        own = covariances[:, labels]  # (E, B, D)
        squares = own @ weight.square().mT  # w_k^T S w_k, (E, B, K)
        crossed = (own * weight[:, labels]) @ weight.mT  # w_k^T S w_y
    else:
        products = weight.unsqueeze(1) @ covariances  # of class c: W S_c, (E, C, K, D)
        by_class = (products * weight.unsqueeze(1)).sum(-1)  # (E, C, K)
        to_own = (products * weight.unsqueeze(2)).sum(-1)  # w_k^T S_c w_c
        squares, crossed = by_class[:, labels], to_own[:, labels]
    own_squares = crossed.gather(-1, labels.expand(len(weight), -1).unsqueeze(-1))
    return (squares - 2 * crossed + own_squares).mean(0)


class CovarianceHost(GradientHost):
    """Base of hosts with a class's covariance S_y in its logits: z_k + (r / 2) d^T S_y d with d = w_k - w_y.

    Their constants are `strength`, the r of the last epoch, and `covariance`, full or diagonal. The plug-in `isda` has
    the source.
    """

    only_classifier = "linear"
    receiver = "instance"
    covariances: torch.Tensor
    #: Products of all classes' weights with whole covariances that the loss holds at once, with gradients.
    products: int

    def prepare(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Keeps the covariances (E, K, D, D), or their diagonals (E, K, D)."""
        counts, full = self.context.counts.tolist(), self.constants.covariance == "full"
        self.covariances = class_covariances(features, counts, full=full)

    def loss_numbers(self) -> int:
        """Numbers in the products with whole covariances."""
        context = self.context
        each = context.experts * context.classes**2 * context.channels
        return self.products * each if self.constants.covariance == "full" else 0

    def spread_logits(self, state: State, covariances: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """The logits with the terms of the `covariances`, (B, K); r = strength * epoch / epochs, epochs from 0."""
        strength = self.constants.strength * batch.progress
        terms = spread(self.scale * state["weight"], covariances, batch.labels)
        return self.logits(state, batch.features) + strength / 2 * terms
