"""SMOTE on features: samples of rarer classes are moved towards a neighbour of their own class, then DR.

Source: Chawla et al., "SMOTE: Synthetic Minority Over-sampling Technique", JAIR 2002, section 4.2: h' = h_i + v (h_n -
h_i), v uniform in [0, 1], n one of the k nearest neighbours of the same class. A class of n_c samples gets n_max - n_c
synthetic ones; so of its class-balanced draws here, a share of 1 - n_c / n_max is synthetic. Neighbours are sought
once, among view 0 of the training samples, by Euclidean distance over all experts. A class of n_c <= k samples has n_c
- 1 neighbours, a class of one sample none. With H2T, receivers are moved first and fused then. The loss is
cross-entropy.

Published setting: synthetic samples are made once, before training, from data of few features. Here each draw makes a
new one, of features.
"""

import numpy as np
import torch

from h2t.pipeline.base.params import Count, Section
from h2t.pipeline.heads.host import CrossEntropyHost, TrainingBatch
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112601  # other results, another number: docs/numbers.md

BLOCK = 1024  # samples whose distances to their class are computed at once


class Loss(Section):
    neighbours: Count = 5
    """Nearest neighbours of the same class that a sample may be moved towards."""


class Host(CrossEntropyHost):
    """Starts from the stage-I classifier."""

    linear = True
    reads = "features"
    features: torch.Tensor  # of all training samples, (E, N, D)
    neighbours: torch.Tensor  # of each sample, nearest first, int64 (N, most neighbours); -1 where there are no more

    def prepare(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Keeps the features (E, N, D) and the table of neighbours (N, k)."""
        self.features = features
        most = self.constants.neighbours
        self.neighbours = labels.new_full((len(labels), most), -1)
        start = 0
        for count in self.context.counts.tolist():
            own = features[:, start : start + count].movedim(0, 1).flatten(1)  # (n, E D)
            for first in range(0, count, BLOCK):
                apart = torch.cdist(own[first : first + BLOCK], own, compute_mode="donot_use_mm_for_euclid_dist")
                here = torch.arange(len(apart), device=apart.device)
                apart[here, first + here] = torch.inf
                nearest = apart.topk(min(most, count - 1), largest=False).indices
                self.neighbours[start + first + here, : nearest.shape[1]] = start + nearest
            start += count

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor:
        """(batch, 3), uniform: whether a draw is synthetic, which neighbour it takes, and v."""
        return torch.from_numpy(draws.random((batch, 3)))

    def augment(self, batch: TrainingBatch) -> torch.Tensor:
        """The receivers (E, B, D), those of rarer classes moved towards a neighbour."""
        counts = self.context.counts.to(batch.labels.device)
        kept = counts[batch.labels] / counts.max()
        found = self.neighbours[batch.samples]
        available = (found >= 0).sum(-1)
        which = (batch.noise[:, 1] * available).long().clamp_max(available - 1).clamp_min(0)
        neighbour = self.features[:, found.gather(-1, which.unsqueeze(-1)).squeeze(-1)]
        synthetic = (batch.noise[:, 0] >= kept) & (available > 0)
        share = torch.where(synthetic, batch.noise[:, 2], 0.0).unsqueeze(-1)
        return torch.lerp(batch.features, neighbour.to(batch.features), share.to(batch.features))
