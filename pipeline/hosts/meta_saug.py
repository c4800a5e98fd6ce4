"""MetaSAug: ISDA whose class covariances are corrected in each step by what helps a class-balanced batch.

Source: Li et al., "MetaSAug: Meta Semantic Augmentation for Long-Tailed Visual Recognition", CVPR 2021, section 3. In
each step: (1) the gradient of the weighted ISDA loss gives a virtual step of the classifier; (2) cross-entropy of that
classifier on a balanced batch has a gradient in the covariances S; (3) S' = S - meta_rate times it; (4) the loss is the
weighted ISDA loss with S'. S' is used once. Class weights are those of the effective number with beta 0.9999 (Cui et
al., CVPR 2019); r = strength * epoch / epochs. meta_rate 0.1 and diagonal S as in the authors' stage II on ImageNet-LT.

Published setting: on ImageNet-LT a frozen backbone as here, 20 epochs, rate 0.0003, batches of 256; on CIFAR the whole
network in the last 40 of 200 epochs, with whole covariances. The authors' balanced batch is of extra images, ten of a
class; here it is drawn from the training samples. Their covariances are estimated over the steps; here they are
computed once.
"""

from typing import Literal

import torch
from torch.func import grad
from torch.nn import functional as F

from h2t.pipeline.base.params import Beta, NonNegative, Positive, Section
from h2t.pipeline.heads.covariances import CovarianceHost
from h2t.pipeline.heads.host import Context, State, TrainingBatch
from h2t.pipeline.training.longtail import effective_weights

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    strength: NonNegative = 0.25
    """The r of the last epoch; it grows linearly from 0."""
    covariance: Literal["full", "diagonal"] = "diagonal"
    """Whole covariances take K D^2 numbers per expert, and as many again for each classifier of a stack."""
    beta: Beta = 0.9999
    """Of the class weights."""
    meta_rate: NonNegative = 0.1
    """Step of the covariances."""
    virtual_rate: Positive = 0.02
    """Step of the virtual classifier; `optimiser.lr` in the authors' code."""


class Host(CovarianceHost):
    """Needs a linear classifier: the bound does not hold for cosines."""

    partner = "balanced"
    products = 12

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.weights = effective_weights(context.counts, loss.beta)

    def batch_loss(self, state: State, batch: TrainingBatch) -> torch.Tensor:
        """The weighted ISDA loss with the corrected covariances."""
        partners, partner_labels, rate = batch.partners, batch.partner_labels, self.constants.virtual_rate
        constant = {name: tensor.detach() for name, tensor in state.items()}

        def on_balanced(covariances: torch.Tensor) -> torch.Tensor:
            step = grad(self._augmented)(constant, covariances, batch)
            moved = {name: tensor - rate * step[name] for name, tensor in constant.items()}
            return F.cross_entropy(self.logits(moved, partners), partner_labels)

        corrected = self.covariances - self.constants.meta_rate * grad(on_balanced)(self.covariances)
        return self._augmented(state, corrected.detach(), batch)

    def _augmented(self, state: State, covariances: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """The ISDA loss with class weights, averaged over the batch."""
        losses = F.cross_entropy(self.spread_logits(state, covariances, batch), batch.labels, reduction="none")
        return (self.weights.to(losses)[batch.labels] * losses).mean()
