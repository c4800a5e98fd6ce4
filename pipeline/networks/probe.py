"""The head of a frozen backbone: multinomial logistic regression on pooled features, solved by L-BFGS.

Source: Liu and Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", Mathematical Programming
1989, as in SciPy. The linear probe minimises the mean cross-entropy over the training samples + l2 / 2 |W|^2; the bias
is not penalised. This is scikit-learn's LogisticRegression with C = 1 / (l2 n).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from h2t.pipeline.base.params import Epochs, Positive, Section
from h2t.pipeline.base.run import Say, silent
from h2t.pipeline.base.text import counted

GRADIENT = 1e-5  # the solver stops where no entry of the gradient is larger, for features scaled to mean square 1
AT_THE_LIMIT = 1  # SciPy's status of L-BFGS-B that reached its limit of iterations or evaluations
CORRECTIONS = 10  # pairs of steps and gradients that L-BFGS keeps


class Probe(Section):
    """Keys of `backbones.NAME.probe`."""

    l2: Positive = 1e-3
    """Weight of the squared norm of the weights, halved, in the loss of the linear probe."""
    scale: Positive = 25.0
    """Factor of the cosines in the probe that hosts with `classifier: cosine` start from."""
    iterations: Epochs = 1000
    """Most iterations of L-BFGS."""


def fit(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    settings: Probe,
    classifier: Literal["linear", "cosine"],
    say: Say = silent,
) -> dict[str, torch.Tensor]:
    """The classifier of one expert at the minimum: `weight` float32 (1, K, D) and, if linear, `bias` (1, K).

    `features` float32 (N, D) and `labels` int64 (N,) lie on one device. They are only read. Matrix products are in
    float32, sums over samples in float64. `say` is told if the solver stopped before the minimum.
    """
    solver = _linear if classifier == "linear" else _cosine
    state, stopped = solver(features, labels, classes, settings)
    if stopped:
        say(
            f"note: the {classifier} probe stopped after {counted(settings.iterations, 'iteration')}, before its "
            "minimum; raise probe.iterations, or for the linear one probe.l2"
        )
    return {name: t.to(torch.float32)[None] for name, t in state.items()}


def _linear(
    features: torch.Tensor, labels: torch.Tensor, classes: int, settings: Probe
) -> tuple[dict[str, torch.Tensor], bool]:
    """Weight (K, D) and bias (K,), float64; and whether the solver stopped too early."""
    # Centring changes the bias alone, as it is not penalised; scaling is undone in weights and penalty. Both make the
    # problem better conditioned, so that it takes fewer iterations.
    centre = features.mean(0, dtype=torch.float64)
    x = features - centre.to(features)
    scale = max(float(x.square().mean().sqrt()), torch.finfo(torch.float32).tiny)
    x /= scale
    penalty, width = settings.l2 / scale**2, x.shape[1]

    def loss(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = given[:, :width], given[:, width]
        value, slope = _cross_entropy(torch.addmm(bias.to(x), x, weight.to(x).T), labels)
        gradient = torch.cat([(slope.T @ x).double() + penalty * weight, slope.sum(0, dtype=torch.float64)[:, None]], 1)
        return value + penalty / 2 * weight.square().sum(), gradient

    found, stopped = _minimum(loss, x.new_zeros(classes, width + 1, dtype=torch.float64), settings.iterations)
    weight = found[:, :width] / scale
    return {"weight": weight, "bias": found[:, width] - weight @ centre}, stopped


def _cosine(
    features: torch.Tensor, labels: torch.Tensor, classes: int, settings: Probe
) -> tuple[dict[str, torch.Tensor], bool]:
    """Weight (K, D), float64, rows of length 1; and whether the solver stopped too early.

    Minimises the mean cross-entropy of scale x cosine, from the class means on. Lengths of the weights do not change
    cosines, so there is no penalty; the scale bounds the logits.
    """
    x = F.normalize(features, dim=-1)

    def loss(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = given.norm(dim=1, keepdim=True)
        unit = given / length
        value, slope = _cross_entropy(settings.scale * (x @ unit.to(x).T), labels)
        gradient = settings.scale * (slope.T @ x).double()
        return value, (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / length

    start = F.normalize(class_means(x[None], labels, classes)[0].double(), dim=-1)
    found, stopped = _minimum(loss, start, settings.iterations)
    return {"weight": F.normalize(found, dim=-1)}, stopped


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross-entropy, float64, and its gradient by the logits (N, K), which takes their memory."""
    own = labels[:, None]
    total = logits.logsumexp(1, keepdim=True)
    value = (total - logits.gather(1, own)).mean(dtype=torch.float64)
    slope = logits.sub_(total).exp_()
    slope.scatter_add_(1, own, slope.new_full(own.shape, -1))
    return value, slope.div_(len(labels))


def _minimum(
    loss: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, bool]:
    """Where `loss`, a function of float64 (K, D) that gives value and gradient, is smallest.

    Also whether the solver had to stop before, at its limit of iterations.
    """
    from scipy.optimize import minimize  # takes half a second to import

    def flat(given: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(torch.from_numpy(given).view(start.shape).to(start.device))
        return float(value), gradient.flatten().cpu().numpy()

    with torch.no_grad():
        found = minimize(
            flat,
            start.flatten().cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "maxfun": 2 * iterations, "gtol": GRADIENT, "maxcor": CORRECTIONS},
        )
    return torch.from_numpy(found.x).view(start.shape).to(start.device), found.status == AT_THE_LIMIT


def class_means(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Mean of the features of each class, (E, K, D), from (E, N, D) and labels (N,); sums are in float64.

    A class without samples gets NaN.
    """
    # Sums over runs of sorted samples: a one-hot matrix would take 80 GB for 100,000 classes of one sample.
    order = labels.argsort(stable=True)
    counts = labels.bincount(minlength=classes)
    values = features[:, order].movedim(0, 1).to(torch.float64).contiguous()  # (N, E, D)
    sums = torch.segment_reduce(values, "sum", lengths=counts)
    return (sums / counts[:, None, None]).movedim(1, 0).to(features.dtype).contiguous()
