"""NCM: the class with the nearest mean feature, by squared distance (linear) or by angle (cosine).

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1. By
default as in the authors' code: less the mean of all training features, scaled to length 1, by squared distance. Half
the negated squared distance, f m - |m|^2 / 2 up to a term without class, is a linear classifier.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.heads.host import Context, FittedHost, State
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112602  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`."""

    features: Literal["centred_l2", "l2", "raw"] = "centred_l2"
    """Features of each expert as they are, scaled to length 1, or centred and then scaled."""


class Host(FittedHost):
    """Stage I's classifier is not used; `classifier` decides the distance."""

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)
        self.features = loss.features

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """Means of the classes as weights (E, K, D), and for `centred_l2` the `centre` (E, D)."""
        centre = {"centre": features.double().mean(1).to(features)} if self.features == "centred_l2" else {}
        # Sums over runs of sorted samples: a matrix of members would take 80 GB for 100,000 classes of one sample.
        order = labels.argsort(stable=True)
        counts = labels.bincount(minlength=self.context.classes)
        values = self._placed(centre, features)[:, order].movedim(0, 1).to(torch.float64).contiguous()  # (n, E, D)
        sums = torch.segment_reduce(values, "sum", lengths=counts)
        means = (sums / counts[:, None, None]).movedim(1, 0).to(features.dtype).contiguous()  # (E, K, D)
        if self.classifier == "cosine":
            return {**centre, "weight": means}
        return {**centre, "weight": means, "bias": -means.square().sum(-1) / 2}

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """(E, B, D) -> (B, K)."""
        return super().logits(state, self._placed(state, features))

    def _placed(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) as they are compared with the means."""
        if self.features == "raw" or (self.features == "centred_l2" and "centre" not in state):
            return features  # heads fitted before `features` was a choice have no centre
        if self.features == "centred_l2":
            features = features - state["centre"].unsqueeze(-2)
        return F.normalize(features, dim=-1)
