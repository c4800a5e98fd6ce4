"""DR: the stage-I classifier, trained further by cross-entropy on class-balanced batches.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1
(cRT), but starting from the stage-I classifier, as in Algorithm 1 of the H2T paper.

Published setting: that of the H2T code for CIFAR-100-LT is the default here: rate 0.02, 10 epochs, batches of 128,
weight decay 0.0005. It has batch norm in train mode, which recipe `branchwise` comes near to.
"""

from h2t.pipeline.heads.host import CrossEntropyHost

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Host(CrossEntropyHost):
    """Cross-entropy of the mean of the experts' logits."""

    linear = True
