"""LWS: the stage-I classifier stays fixed, and one scale per class is trained by cross-entropy.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.1.

Published setting: 5 epochs in the authors' code, batches of 512, rate 0.2, sampler `cyclic`. Here 10 epochs, batches of
128, rate 0.02 and sampler `balanced`, unless set otherwise.
"""

from h2t.pipeline.heads.host import ClassScaleHost, CrossEntropyHost

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Host(ClassScaleHost, CrossEntropyHost):
    """Trains `class_scale` (E, K) only."""

    fixed = frozenset({"weight", "bias"})
