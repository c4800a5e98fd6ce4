"""Class-activation split: a rare sample keeps its class's pixels and takes others from a sample that resembles it.

Source of the idea: Chu et al., "Feature Space Augmentation for Long-Tailed Data", ECCV 2020; formula and constants are
those of a reimplementation by others, not checked against the paper. The activation of class c at a pixel is max(0, w_c
F) with the stage-I weights, scaled to [0, 1] over the map. A receiver's pixels above `specific` are its own; a
partner's below `generic` are common. Each pixel of the new map is, with a probability drawn for each image, the
receiver's if it is specific, else the partner's if it is common, and 0 where neither holds. The partner is a sample of
one of the `confusing` classes: those whose training samples have the highest mean stage-I probability for the
receiver's class. It is chosen among an instance-wise batch; without one, and for classes that are not rare, the
receiver stays as it is. With H2T, channels are fused afterwards: positions here, channels there. The loss is
cross-entropy on class-balanced batches.

Published setting: not verified. The reimplementation takes 16 rare samples, three new ones of each, and as many samples
of large classes into a batch, at a constant rate of 0.0005 for 40 epochs on CIFAR-10. Here batches are class-balanced,
a receiver is changed with probability `share`, and each new sample keeps its own label, where that code gives a batch's
first.
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
    specific: Ratio = 0.8
    """Activation above which a pixel belongs to its class."""
    generic: Ratio = 0.2
    """Activation below which a pixel belongs to no class."""
    confusing: Count = 3
    """Classes that a partner may be of."""
    share: Ratio = 0.75
    """Probability that a receiver of a rare class is changed."""


class Host(CrossEntropyHost):
    """Needs a linear classifier in stage I, and whole maps."""

    only_classifier = "linear"
    linear = True
    partner = "instance"
    reads = "maps"
    weight: torch.Tensor  # of stage I, (E, K, C)
    resembles: torch.Tensor  # whether samples of the second class are partners of the first, bool (K, K)

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.regular = without_tail(context.counts.tolist(), loss.regular_classes)

    def prepare(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Keeps the stage-I weights, and which classes resemble each other to the stage-I classifier."""
        state = {name: tensor.to(features) for name, tensor in self.stage1_state(stage1).items()}
        self.weight = state["weight"]
        said = self.logits(state, features).softmax(-1).split(self.context.counts.tolist())
        scores = torch.stack([part.mean(0) for part in said]).T.clone()  # of the second class's samples for the first
        scores.fill_diagonal_(-1)
        chosen = scores.topk(min(self.constants.confusing, max(len(scores) - 1, 1)), dim=1).indices
        self.resembles = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True) & (scores >= 0)

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor:
        """(batch, 3 + pixels), uniform: whether it is changed, its partner, its probability, and its pixels."""
        return torch.from_numpy(draws.random((batch, 3 + self.context.pixels)))

    def augment(self, batch: TrainingBatch) -> torch.Tensor:
        """The receivers' maps (E, B, C, H, W), those of rare classes put together from two."""
        noise, partners, theirs = batch.noise, batch.partners, batch.partner_labels
        able = self.resembles[batch.labels.unsqueeze(-1), theirs]  # (B, B)
        reached = able.cumsum(-1)
        which = (reached <= noise[:, 1:2] * reached[:, -1:]).sum(-1).clamp_max(len(theirs) - 1)
        shape = batch.features.shape[-2:]
        own = (noise[:, 3:] < noise[:, 2:3]).reshape(1, -1, 1, *shape)
        kept = batch.features * (self._activation(batch.features, batch.labels) > self.constants.specific)
        taken = partners[:, which]
        taken = taken * (self._activation(taken, theirs[which]) < self.constants.generic)
        changed = (batch.labels >= self.regular) & able.any(-1) & (noise[:, 0] < self.constants.share)
        return torch.where(changed.reshape(1, -1, 1, 1, 1), torch.where(own, kept, taken), batch.features)

    def _activation(self, maps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The class activation of each pixel, in [0, 1], (E, B, 1, H, W); 0 where it is flat."""
        found = torch.einsum("ebc,ebchw->ebhw", self.weight[:, labels].to(maps), maps).clamp_min(0).unsqueeze(2)
        low, high = found.amin((-2, -1), keepdim=True), found.amax((-2, -1), keepdim=True)
        return (found - low) / (high - low).clamp_min(1e-12)
