"""LIFT: a cosine classifier that starts from the class means and is trained by the logit-adjusted loss.

Source: Shi et al., "Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts", ICML 2024: the classifier of
their lightweight fine-tuning, on instance-sampled batches, with the scale of the authors' code. The loss is
cross-entropy of z_j + tau log(n_j / N), Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, eq. (10);
test time uses plain z. On CLIP they start from embeddings of the class names; name a file of them in
`hosts.NAME.start`.

Published setting: CLIP with adapters inside the network, trained together with the classifier at rate 0.01, and an
ensemble at test time. Neither is part of it.
"""

from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import PriorHost

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    tau: NonNegative = 1.0
    """Strength of the class prior; 0 is cross-entropy."""


class Host(PriorHost):
    """Needs `classifier: cosine`. `scale` is 25 unless given."""

    only_classifier = "cosine"
    starts_from = "means"
    usual_scale = 25.0
