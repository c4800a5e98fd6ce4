"""Settings of stage I's training, and its learning rate in each epoch."""

import math
from typing import Annotated, Literal

import pydantic

from h2t.pipeline.base.params import Count, Epochs, Index, NonNegative, Positive, Rate, Ratio, Section, at_most, within
from h2t.pipeline.base.precision import Precision


class Training(Section):
    """How a backbone is trained in stage I."""

    frozen: bool = False
    """Train only the classifier, on the backbone in eval mode."""
    epochs: Epochs = 200
    """Passes over the training images."""
    batch_size: Count = 128
    """Images in a batch."""
    lr: Rate = 0.1
    """Learning rate after the warm-up."""
    momentum: Ratio = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov's momentum."""
    weight_decay: NonNegative = 2e-4
    """Weight decay of SGD."""
    warmup_epochs: Index = 5
    """Epochs in which the learning rate rises linearly to `lr`."""
    warmup_from: Ratio = 0.0
    """Share of `lr` that the warm-up starts from."""
    schedule: Literal["cosine", "step"] = "step"
    """After the warm-up: half a cosine down to 0, or steps at the milestones."""
    milestones: list[Index] = [160, 180]
    """With `schedule: step`: epochs, counted from 0, from which the learning rate is multiplied by `gamma`."""
    gamma: Annotated[Positive, at_most(1)] = 0.1
    """With `schedule: step`: factor of each step."""
    mixup: NonNegative = 0.0
    """Parameter alpha of mixup's Beta distribution; 0 is no mixup."""
    cmo: Ratio = 0.0
    """Probability that a batch gets a rectangle of images from a second sampler (CMO); 0.5 as published, 0 is none. Not
    in the first four epochs and the last three, and not together with mixup."""
    cmo_power: NonNegative = 1.0
    """Exponent a of that sampler: an image is drawn in proportion to n^-a, n the images of its class; 1 makes classes
    equally frequent, 2 draws them in proportion to 1 / n."""
    rotation: Annotated[float, within(0, 180)] = 0.0
    """Training images are turned by up to so many degrees, in stage I only, not in the views of the cache."""
    drop_last: bool = False
    """Leave out the last batch of an epoch if it is smaller."""
    accumulate: Count = 1
    """Parts a batch is cut into, each with batch-norm statistics of its own; gradients are added up."""
    precision: Precision = "float32"
    """Number format of the forward pass."""
    channels_last: bool = False
    """Memory layout of images and weights that is faster on GPUs."""
    compile: bool = False
    """Compile the backbone with `torch.compile`."""

    @pydantic.model_validator(mode="after")
    def _nesterov(self) -> "Training":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    @pydantic.model_validator(mode="after")
    def _one_mixture(self) -> "Training":
        if self.cmo and self.mixup:
            raise ValueError("cmo and mixup both mix images and labels; set one of them to 0")
        return self


def learning_rate(params: Training, epoch: int) -> float:
    """Learning rate of `epoch`, from 0: linear warm-up, then cosine decay to 0, or a step at each milestone."""
    if epoch < params.warmup_epochs:
        warm = params.lr * (epoch + 1) / params.warmup_epochs
        return warm + params.warmup_from * (params.lr - warm)
    if params.schedule == "cosine":
        return params.lr * 0.5 * (1 + math.cos(math.pi * epoch / params.epochs))
    return params.lr * params.gamma ** sum(epoch >= m for m in params.milestones)
