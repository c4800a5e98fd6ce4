"""NCM: predicts the class with the nearest mean feature, by squared distance (linear) or by angle (cosine).

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1. The
default is that of the authors' code: the mean of all training features is subtracted, features are scaled to length 1,
and distances are squared. As -|f - m|^2 / 2 is f m - |m|^2 / 2 plus a term that is equal for all classes, the
classifier is linear.

Published setting: as here.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.heads.host import FittedHost, State
from h2t.pipeline.networks.probe import class_means
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112602  # other results, another number: docs/numbers.md


class Loss(Section):
    features: Literal["centred_l2", "l2", "raw"] = "centred_l2"
    """Features of each expert as they are, scaled to length 1, or centred and then scaled."""


class Host(FittedHost):
    """Does not use the stage-I classifier. `classifier` selects the distance."""

    starts_from = "own"

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """The class means as `weight` (E, K, D), `bias` (E, K) if linear, and `centre` (E, D) for `centred_l2`."""
        centre = {"centre": features.double().mean(1).to(features)} if self.constants.features == "centred_l2" else {}
        means = class_means(self._scaled(centre, features), labels, self.context.classes)
        if self.classifier == "cosine":
            return {**centre, "weight": means}
        return {**centre, "weight": means, "bias": -means.square().sum(-1) / 2}

    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits (B, K)."""
        return super().logits(state, self._scaled(state, features))

    def _scaled(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D), centred and scaled as the class means are."""
        if self.constants.features == "raw" or (self.constants.features == "centred_l2" and "centre" not in state):
            return features  # classifiers fitted before the option `features` existed have no centre
        if self.constants.features == "centred_l2":
            features = features - state["centre"].unsqueeze(-2)
        return F.normalize(features, dim=-1)
