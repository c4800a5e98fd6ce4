"""Formulas that the losses of both stages share: margins, weights and priors from the class counts.

`counts` (K,): training samples of each class, at least 1. Results are float64.
"""

import torch
from torch.nn import functional as F

from h2t.pipeline.data.classes import groups

LEAST = 1e-12  # smallest base of a power, whose gradient may be infinite at 0


def own_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether a column of `logits` (..., B, K) is that of the sample's own class, bool (..., B, K).

    Unlike torch's `one_hot` it works under vmap.
    """
    return labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)


def ldam_margins(counts: torch.Tensor, largest: float = 0.5) -> torch.Tensor:
    """m_j = largest n_j^(-1/4) / max_l n_l^(-1/4), (K,) (Cao et al., "LDAM", NeurIPS 2019, section 3.2)."""
    margins = counts.double() ** -0.25
    return largest * margins / margins.max()


def effective_weights(counts: torch.Tensor, beta: float) -> torch.Tensor:
    """Weights proportional to (1 - beta) / (1 - beta^n_j), scaled to mean 1, (K,) (Cui et al., CVPR 2019)."""
    weights = (1 - beta) / (1 - beta ** counts.double())
    return weights * len(counts) / weights.sum()


def log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods of the labels, log softmax(z)_y (..., B), from logits (..., B, K) and labels (..., B), int64."""
    # Softmax over an inner axis is computed for many samples at once, so classes come before samples.
    return logits.mT.log_softmax(-2).gather(-2, labels.unsqueeze(-2)).squeeze(-2)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each batch, (...), from logits (..., B, K) and labels (..., B), int64."""
    return -log_likelihoods(logits, labels).mean(-1)


def cross_entropy_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`cross_entropy` of each batch, (...), and its gradient, (softmax(z) - one-hot(y)) / B, (..., B, K)."""
    log_p, places = logits.mT.log_softmax(-2), labels.unsqueeze(-2)
    losses = -log_p.gather(-2, places).squeeze(-2).mean(-1)
    of_log_p = torch.zeros_like(log_p).scatter_(-2, places, -1 / labels.shape[-1])
    # Autograd calls this too, so both give the same bits.
    return losses, torch._log_softmax_backward_data(of_log_p, log_p, -2, log_p.dtype).mT


def without_tail(counts: list[int], given: int | None) -> int:
    """How many of the largest classes are not rare: `given`, or all but the tail classes of `paper_index`."""
    return given or len(counts) - groups(counts)["paper_index"].count("tail")


def focal_losses(logits: torch.Tensor, labels: torch.Tensor, gamma: float, *, detach: bool = False) -> torch.Tensor:
    """The focal loss of each sample, (1 - p_y)^gamma (-log p_y) with p the softmax, (..., B), from logits (..., B, K).

    With `detach` no gradient flows through the weight. Source: Lin et al., ICCV 2017, eq. (4), for the softmax.
    """
    log_p = log_likelihoods(logits, labels)
    weight = (-log_p.expm1()).clamp_min(LEAST) ** gamma
    return -(weight.detach() if detach else weight) * log_p


def sigmoid_focal_losses(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """The focal loss of each sample (..., B), from logits (..., B, K): a binary loss per class, summed over them.

    With s_j the sigmoid and p_j = s_j for the true class, 1 - s_j for others: sum_j (1 - p_j)^gamma (-log p_j). Source:
    Lin et al., ICCV 2017, eq. (4); Cui et al., CVPR 2019, eq. (14).
    """
    own = own_class(logits, labels)
    signed = torch.where(own, logits, -logits)  # p_j = sigmoid(signed_j)
    return (-(gamma * F.logsigmoid(-signed)).exp() * F.logsigmoid(signed)).sum(-1)


def log_prior(counts: torch.Tensor) -> torch.Tensor:
    """Log of the class frequencies, log(n_j / N), (K,)."""
    return (counts.double() / counts.sum()).log()


def cloud_sizes(counts: torch.Tensor) -> torch.Tensor:
    """GCL's noise scale: delta_j = (log n_max - log n_j) / (log n_max - log n_min) in [0, 1], (K,).

    0 for all if the counts are equal. Source: as of `clouded`.
    """
    logs = counts.double().log()
    return (logs.max() - logs) / (logs.max() - logs.min()).clamp_min(1e-12)


def clouded(
    logits: torch.Tensor,
    labels: torch.Tensor,
    noise: torch.Tensor,
    clouds: torch.Tensor,
    amplitude: float,
    margin: float,
) -> torch.Tensor:
    """GCL's adjusted cosines (B, K): cos_ij - amplitude |e_ij| delta_j, less `margin` for the true class.

    `logits` (B, K) are the cosines, `clouds` (K,) the delta. `noise` e (B, K): normal with standard deviation 1/3,
    clamped to [-1, 1]. Source: Li et al., "Long-tailed Visual Recognition via Gaussian Clouded Logit Adjustment",
    CVPR 2022, section 3.
    """
    own = own_class(logits, labels)
    return logits - amplitude * noise.abs() * clouds - margin * own.to(logits.dtype)


def mixed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """Mean of share CE(z, `labels`) + (1 - share) CE(z, `others`), a scalar, from logits (B, K) and the rest (B,)."""
    losses = -logits.log_softmax(-1)
    own, other = (losses.gather(-1, y.unsqueeze(-1)).squeeze(-1) for y in (labels, others))
    return torch.lerp(other, own, share).mean()
