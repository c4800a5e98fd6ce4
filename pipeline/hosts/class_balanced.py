"""Class-balanced loss: each class weighted by the inverse of its effective number of samples.

Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, eq. (10): mean_i w_y l_i with
w_j proportional to (1 - beta) / (1 - beta^n_j) and sum K; l is cross-entropy or the focal loss. The mean is over the
batch, not over its weights. The paper chooses beta among 0.9, 0.99, 0.999 and 0.9999. Batches are drawn instance-wise:
class-balanced ones would be weighted twice.

Published setting: the whole network, by this loss from the first epoch, beta chosen for each data set.
"""

from h2t.pipeline.heads.host import WeightedHost
from h2t.pipeline.training.weighted import ClassBalanced

NUMBER = 2026112601  # other results, another number: docs/numbers.md

Loss = ClassBalanced


class Host(WeightedHost):
    """Starts from the stage-I classifier."""
