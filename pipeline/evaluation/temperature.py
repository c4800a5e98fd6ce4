"""Temperature scaling: logits are divided by one number, so that confidence comes closer to accuracy.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2. The temperature minimises the
cross-entropy of held-out samples. The predicted classes do not change.
"""

import numpy as np
import torch

LEAST, LARGEST = 0.05, 20.0
MOST = 2**26  # most logits that are kept for fitting; of more samples, evenly spaced ones are used


def fit(logits: torch.Tensor, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The temperature within [LEAST, LARGEST] that minimises the mean cross-entropy of logits / temperature.

    `logits` (n, K); `labels` int (n,); `weights` of the samples, (n,), by default equal.
    """
    from scipy.optimize import minimize_scalar  # takes half a second to import

    x = logits.double() - logits.double().amax(1, keepdim=True)
    own = x.gather(1, torch.from_numpy(labels.astype(np.int64))[:, None])[:, 0]
    share = torch.ones(len(x), dtype=torch.float64) if weights is None else torch.from_numpy(weights).double()
    share = share / share.sum()

    def loss(logarithm: float) -> float:
        inverse = float(np.exp(-logarithm))
        return float(share @ ((x * inverse).logsumexp(1) - own * inverse))

    found = minimize_scalar(loss, bounds=(np.log(LEAST), np.log(LARGEST)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def spread(places: np.ndarray, each: int) -> np.ndarray:
    """`places` (n,), or evenly spaced ones of them, if logits of all, `each` numbers a sample, are more than `MOST`."""
    most = max(1, MOST // each)
    return places[np.linspace(0, len(places) - 1, min(len(places), most)).round().astype(np.int64)]
