"""Balanced softmax: cross-entropy of z_j + tau log n_j on instance-sampled batches; plain logits z at test time.

Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. (3). With tau other
than 1 it is the logit-adjusted loss of Menon et al., ICLR 2021, eq. (10). The prior corrects for the class imbalance of
the batches, so receivers are drawn instance-wise: class-balanced batches would be corrected twice.

Published setting: the whole network, by this loss. In the authors' code for a frozen backbone, 2,000 steps at rate 0.1
on a cosine. The paper's meta sampler, which learns how often classes are drawn, is not part of it.
"""

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import PriorHost

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    tau: NonNegative = 1.0
    """Strength of the class prior; 1 is balanced softmax, 0 cross-entropy."""


class Host(PriorHost):
    """Starts from the stage-I classifier."""
