"""What a stage-I objective is: the classifier that a backbone is trained with, and its loss."""

import torch
from torch import nn


class Objective(nn.Module):
    """Base of objectives. A plug-in writes `forward`, which runs once a step, and `cost`, once per set of labels."""

    #: How the state gives logits: see `networks.classifier.Classifier`.
    classifier: str
    scale: float

    def forward(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What `cost` needs of the maps, E of (B, C, H, W). Called once a step, so running statistics move once."""
        raise NotImplementedError

    def cost(self, found: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """The mean loss of a batch, a scalar, from the result of `forward` and labels (B,). `epoch` counts from 0."""
        raise NotImplementedError

    def loss(
        self,
        maps: tuple[torch.Tensor, ...],
        labels: torch.Tensor,
        epoch: int,
        partners: torch.Tensor | None = None,
        share: float = 1.0,
    ) -> torch.Tensor:
        """Mean loss of a batch; maps: E of (B, C, H, W), labels (B,).

        With mixup `partners` (B,) are the labels of the images that were mixed in, and the loss is mixed like the
        images: `share` of the cost of `labels` and 1 - `share` of that of `partners` (Zhang et al., ICLR 2018).
        """
        found = self(maps)
        cost = self.cost(found, labels, epoch)
        if partners is None:
            return cost
        return share * cost + (1 - share) * self.cost(found, partners, epoch)
