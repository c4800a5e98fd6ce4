"""NCM: the class with the nearest mean feature, by squared distance (linear) or by angle (cosine).

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1.
Half the negated squared distance, f m - |m|^2 / 2 up to a term without class, is a linear classifier.
"""

import torch
from torch.nn import functional as F

from pipeline.host import Context, FittedHost
from pipeline.network import StageOneHead
from pipeline.params import Section

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Nothing to choose: `classifier` decides the distance."""


class Host(FittedHost):
    """Stage I's classifier is not used."""

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(classifier, scale, context)

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """Class means as weights, of features scaled to length 1 for the cosine."""
        if self.classifier == "cosine":
            features = F.normalize(features, dim=-1)
        # Sums over runs of sorted samples: a matrix of members would take 80 GB for 100,000 classes of one sample.
        order = labels.argsort(stable=True)
        counts = labels.bincount(minlength=self.context.classes)
        values = features[:, order].movedim(0, 1).to(torch.float64).contiguous()  # (n, E, D)
        sums = torch.segment_reduce(values, "sum", lengths=counts)
        means = (sums / counts[:, None, None]).movedim(1, 0).to(features.dtype).contiguous()  # (E, K, D)
        if self.classifier == "cosine":
            return {"weight": means}
        return {"weight": means, "bias": -means.square().sum(-1) / 2}
