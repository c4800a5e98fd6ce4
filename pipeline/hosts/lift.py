"""LIFT: a cosine classifier that starts from the class means and is trained by the logit-adjusted loss.

Source: Shi et al., "Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts", ICML 2024: the classifier of
their lightweight fine-tuning, on instance-sampled batches, with the scale of the authors' code. The loss is
cross-entropy of z_j + tau log(n_j / N), Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, eq. (10);
test time uses plain z. Their adapters inside the backbone and their test-time ensemble are not part of it. On CLIP they
start from embeddings of the class names; name a file of them in `hosts.NAME.start`.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import NonNegative, Section
from h2t.pipeline.heads.host import Context, GradientHost, State
from h2t.pipeline.training.longtail import log_prior

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Loss(Section):
    """Keys of `hosts.NAME.loss`."""

    tau: NonNegative = 1.0
    """Strength of the class prior; 0 is cross-entropy."""


class Host(GradientHost):
    """Needs `classifier: cosine`. `scale` is 25 unless given."""

    linear = True
    receiver = "instance"
    starts_from = "means"
    usual_scale = 25.0

    def __init__(self, loss: Loss, classifier: str, scale: float, context: Context) -> None:
        if classifier != "cosine":
            raise UserError(f"classifier: host lift needs a cosine classifier; got {classifier!r}; set it to cosine")
        super().__init__(classifier, scale, context)
        self.prior = loss.tau * log_prior(context.counts)

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch, with the prior added to the logits."""
        logits = self.logits(state, features)
        return F.cross_entropy(logits + self.prior.to(logits), labels)
