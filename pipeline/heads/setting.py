"""What distinguishes the classifiers of a host: the setting of each, and the optimiser that all of them share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from h2t.pipeline.base.params import Count, Epochs, NonNegative, Rate, Ratio, Section
from h2t.pipeline.heads.descent import PerHead
from h2t.pipeline.heads.fusion import Rounding, Selection, replaced_channels

PER_HEAD = ("lr", "weight_decay")  # constants in which heads of one stack may differ


@dataclass(frozen=True)
class HeadSetting:
    """What distinguishes one head of a stack from the others; `rounding` is the same for all.

    `constants`: (name, value) of the constants in which it differs from the host's own settings: `lr`, `weight_decay`,
    `scale`, and `loss.KEY` for a constant of the loss. Heads of one stack have equal `kind`s.
    """

    ratio: float
    donor: str
    selection: Selection
    seed: int
    rounding: Rounding = "floor"
    constants: tuple[tuple[str, Any], ...] = ()

    @property
    def kind(self) -> tuple[tuple[str, Any], ...]:
        """The constants that heads of one stack share: all but those of the optimiser."""
        return tuple((name, value) for name, value in self.constants if name not in PER_HEAD)

    def replaced(self, channels: int) -> int:
        """How many of `channels` are replaced."""
        return replaced_channels(self.ratio, channels, self.rounding)


#: After fewer, classifiers that do not start from a trained one are still far from done: docs/log.md.
FEWEST_STEPS = 500


class Optimiser(Section):
    """Section `hosts.NAME.optimiser`: SGD whose learning rate follows half a cosine over the epochs."""

    epochs: Epochs = 10
    """Passes over the training samples."""
    batch_size: Count = 128
    """Receivers in a batch."""
    lr: Rate = 0.02
    """Learning rate at the start; it follows half a cosine down to 0."""
    momentum: Ratio = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of SGD."""

    @classmethod
    def enough_epochs(cls, samples: int, batch: int | None = None) -> int:
        """The usual number of epochs, or more where few `samples` would make them fewer than `FEWEST_STEPS` steps.

        `batch`: None is the usual size.
        """
        usual, size = cls.model_fields["epochs"].default, batch or cls.model_fields["batch_size"].default
        return max(usual, -(-FEWEST_STEPS // -(-samples // size)))

    def rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, counted from 0; it is constant within an epoch and never reaches 0."""
        return 0.5 * self.lr * (1 + math.cos(math.pi * epoch / self.epochs))

    def of(self, head: HeadSetting) -> "Optimiser":
        """The settings that `head` is trained with."""
        return self.model_copy(update={name: value for name, value in head.constants if name in PER_HEAD})

    def per_head(self, heads: Sequence[HeadSetting]) -> PerHead | None:
        """The constants of each of `heads`; None if all of them have these settings."""
        own = [self.of(head) for head in heads]
        if all(settings == self for settings in own):
            return None
        return PerHead([settings.lr / self.lr for settings in own], [settings.weight_decay for settings in own])
