"""The base class of stage-I objectives: the classifier that a backbone is trained with, and its loss."""

import torch
from torch import nn
from torch.nn import functional as F

from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.classifier import fresh_linear, global_average, logits


class Objective(nn.Module):
    """Classifier and loss. A plug-in's class writes `__init__(loss, channels, experts, counts)`, `forward` and `cost`.

    Arguments of `__init__`: the plug-in's section `Loss`; C and E of the backbone's maps; `counts` (K,), int64, the
    training images of each class. The state dict is the stage-I classifier, as in `networks.classifier`.
    """

    #: The keys under backbones.<name>.loss of a plug-in file without a class `Loss`: none.
    Loss: type[Section] = Section
    #: Kind of classifier: linear, cosine or branches (`networks.classifier.Classifier`).
    classifier: str
    #: Factor of the logits (`networks.classifier.logits`).
    scale: float

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The outputs that `cost` needs, such as logits (B, K), from E maps (B, C, H, W), float32 or float64.

        Called once per part of a batch, even with mixup, so running statistics are updated once.
        """
        raise NotImplementedError

    def cost(self, outputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Mean loss, a scalar, from the result of `forward` and labels (B,), int64. `epoch` counts from 0.

        Called once, or twice with mixup: once for each set of labels.
        """
        raise NotImplementedError

    def first_branch_share(self, progress: float) -> float | None:
        """With two branches that train on a batch each: the share of the first, from 0 to 1; by default None.

        `progress`: share of the epochs that are done, from 0. None means that all branches train on the same images.
        Otherwise the second branch gets images of a reverse sampler, and the loop multiplies the maps by twice their
        branch's share before it calls `loss`, with the second batch's labels as `partners`.
        """
        return None

    def loss(
        self,
        maps: tuple[torch.Tensor, ...],
        labels: torch.Tensor,
        epoch: int,
        partners: torch.Tensor | None = None,
        share: float = 1.0,
    ) -> torch.Tensor:
        """Mean loss, a scalar, from E maps (B, C, H, W) and labels (B,), int64.

        With mixup `partners` (B,) are the labels of the images that were mixed in, or those of a second batch, and the
        loss is mixed alike: `share` x cost(`labels`) + (1 - `share`) x cost(`partners`) (Zhang et al., ICLR 2018).
        """
        outputs = self(maps)
        cost = self.cost(outputs, labels, epoch)
        if partners is None:
            return cost
        return share * cost + (1 - share) * self.cost(outputs, partners, epoch)


class LinearObjective(Objective):
    """A linear classifier; `cost` gets the mean of the experts' logits, (B, K). Initial weights: `fresh_linear`."""

    classifier = "linear"
    scale = 1.0

    def __init__(self, loss: Section, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, fresh_linear(experts, len(counts), channels))

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits (B, K), the mean over experts."""
        features = torch.stack([global_average(m) for m in maps])
        return logits("linear", dict(self.named_parameters()), features)


class CosineObjective(Objective):
    """A cosine classifier with logits of factor `scale`; `cost` gets the mean of the experts' cosines, (B, K).

    Initial weights: uniform in [-1, 1], then normalised to length 1.
    """

    classifier = "cosine"

    def __init__(self, scale: float, channels: int, experts: int, counts: torch.Tensor) -> None:
        super().__init__()
        self.scale = scale
        weight = torch.empty(experts, len(counts), channels).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(weight, dim=-1))

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Cosines (B, K), the mean over experts."""
        features = torch.stack([global_average(m) for m in maps])
        return logits("cosine", {"weight": self.weight}, features)
