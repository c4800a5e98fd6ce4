"""Temperature scaling: logits are divided by one number, so that confidence comes closer to accuracy.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2. The temperature minimises the
cross-entropy of held-out samples. The predicted classes do not change.
"""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

LEAST, LARGEST = 0.05, 20.0
BLOCK = 2**20  # logits that are in memory as float64 at a time
MOST = 2**26  # most logits that are kept for fitting; of more samples, evenly spaced ones are used


def fit(logits: torch.Tensor, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The temperature within [LEAST, LARGEST] that minimises the mean cross-entropy of logits / temperature.

    `logits` (n, K); `labels` int (n,); `weights` of the samples, (n,), by default equal.
    """
    from scipy.optimize import minimize_scalar  # takes half a second to import

    share = torch.ones(len(logits), dtype=torch.float64) if weights is None else torch.from_numpy(weights).double()
    samples = max(1, BLOCK // logits.shape[1])
    columns = (logits, torch.from_numpy(labels.astype(np.int64)), share / share.sum())
    blocks = list(zip(*(column.split(samples) for column in columns), strict=True))

    def loss(logarithm: float) -> float:
        inverse = float(np.exp(-logarithm))
        each = (share @ cross_entropy(x.double() * inverse, own, reduction="none") for x, own, share in blocks)
        return float(sum(each))

    found = minimize_scalar(loss, bounds=(np.log(LEAST), np.log(LARGEST)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def spread(places: np.ndarray, each: int) -> np.ndarray:
    """`places` (n,), or evenly spaced ones of them, if logits of all, `each` numbers a sample, are more than `MOST`."""
    most = max(1, MOST // each)
    return places[np.linspace(0, len(places) - 1, min(len(places), most)).round().astype(np.int64)]
