"""Feature transfer: a sample of a large class lends its deviation from its class mean to a rare class.

Source of the idea: Yin et al., "Feature Transfer Learning for Face Recognition with Under-Represented Data", CVPR 2019.
The formula and the constants here are ours and were not checked against the paper: h' = c_t + Q Q^T (g - c_j), with c
the class means, g a sample of a regular class j, t the rare class and Q the principal directions of the deviations of
regular classes. Each receiver of a rare class is replaced with probability `share`; g is its partner, drawn
instance-wise. If the partner is of a rare class itself, the receiver stays as it is. The result is cut at 0, as
features after a ReLU are (`clamp`). With H2T, features are transferred first and fused then. The loss is cross-entropy
on class-balanced batches.

Published setting: faces, not long-tailed benchmarks; more was not verified.
"""

import numpy as np
import torch

from h2t.pipeline.base.params import Count, Ratio, Section
from h2t.pipeline.heads.host import Context, CrossEntropyHost, TrainingBatch
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.longtail import without_tail

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    regular_classes: Count | None = None
    """Number of largest classes that are not rare; null is all but the tail classes of `paper_index`."""
    energy: Ratio = 0.95
    """Share of the variance of regular classes that the directions Q keep."""
    share: Ratio = 0.5
    """Probability that a receiver of a rare class is replaced."""
    clamp: bool = True
    """Cut transferred features at 0."""


class Host(CrossEntropyHost):
    """Starts from the stage-I classifier."""

    linear = True
    partner = "instance"
    reads = "features"
    centres: torch.Tensor  # (E, K, D)
    projections: torch.Tensor  # Q Q^T, (E, D, D)

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.regular = without_tail(context.counts.tolist(), loss.regular_classes)

    def prepare(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Keeps the class means and the projection on the principal directions of regular classes."""
        parts = features.double().split(self.context.counts.tolist(), dim=1)
        self.centres = torch.stack([part.mean(1) for part in parts], 1).to(features)
        apart = torch.cat([part - part.mean(1, keepdim=True) for part in parts[: self.regular]], 1)
        variances, directions = torch.linalg.eigh(apart.mT @ apart)  # ascending
        beyond = variances.flip(-1).cumsum(-1) - variances.flip(-1)  # variance of the directions before each one
        kept = beyond < self.constants.energy * variances.sum(-1, keepdim=True)
        chosen = directions.flip(-1) * kept.unsqueeze(-2)
        self.projections = (chosen @ chosen.mT).to(features)

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor:
        """Uniform, (batch,): whether a receiver of a rare class is replaced."""
        return torch.from_numpy(draws.random(batch))

    def augment(self, batch: TrainingBatch) -> torch.Tensor:
        """The receivers (E, B, D), some of those of rare classes replaced."""
        apart = batch.partners - self.centres[:, batch.partner_labels]
        moved = self.centres[:, batch.labels] + apart @ self.projections
        if self.constants.clamp:
            moved = moved.clamp_min(0)
        lends = (batch.labels >= self.regular) & (batch.partner_labels < self.regular)
        chosen = lends & (batch.noise < self.constants.share)
        return torch.where(chosen.unsqueeze(-1), moved, batch.features)
