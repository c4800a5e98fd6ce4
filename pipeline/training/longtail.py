"""Formulas that the losses of both stages share: margins, weights and priors from the class counts.

`counts` (K,): training samples of each class, at least 1. Results are float64.
"""

import torch


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
    own = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)
    return logits - amplitude * noise.abs() * clouds - margin * own.to(logits.dtype)
