"""A classifier for scikit-learn: a method of stage II with H2T on features.

    from h2t.estimator import H2TClassifier

    H2TClassifier("dr", ratio=0.3).fit(features, labels).score(others, their_labels)

It passes scikit-learn's `check_estimator` without expected failures. As its tags say, it takes no sparse matrices, no
sample weights and no several outputs.
"""

import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from h2t.api import Classifier, trained
from h2t.pipeline.base import device as devices
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import FLOAT32_MAX
from h2t.pipeline.heads.fusion import replaced_channels


class H2TClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A method of stage II on features X (n, D), trained by the stage train-classifier from a logistic regression.

    `method`: a host (h2t list hosts). `ratio`: share of the features that H2T replaces by those of donors; 0 is the
    method alone. `settings`: other keys of an entry of `hosts` in params.yaml, such as `{"optimiser": {"lr": 0.1}}`,
    for one classifier; a method with a closed-form fit takes neither ratio nor epochs. `epochs`: None means 10, or as
    many as make 500 steps. `l2`: penalty of the logistic regression. With so few features that the ratio replaces none,
    `fit` warns and trains the method alone. It raises ValueError with one line for what does not fit; features beyond
    float32 are refused, in `predict` too.

    Attributes: `classes_` (K,), in ascending order; `classifier_`, which h2t.api can save; `n_features_in_`.
    """

    def __init__(
        self,
        method: str = "dr",
        *,
        ratio: float = 0.3,
        epochs: int | None = None,
        l2: float = 1e-3,
        settings: Mapping[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "auto",
    ) -> None:
        self.method = method
        self.ratio = ratio
        self.epochs = epochs
        self.l2 = l2
        self.settings = settings
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> "H2TClassifier":
        """Trains on features X (n, D) and labels y (n,), numbers or texts. Raises ValueError."""
        _check_labels(y)
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        _check_size(X)
        self.classes_, label = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y: must have at least two classes; got one class, {self.classes_[:1].tolist()[0]!r}")
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31)
        try:
            with TemporaryDirectory(prefix="h2t-") as folder:
                self.classifier_: Classifier = trained(
                    X.astype(np.float32, copy=False),
                    [str(k) for k in label],
                    self.method,
                    {} if self.settings is None else self.settings,
                    ratio=self._ratio(X.shape[1]),
                    epochs=self.epochs,
                    l2=self.l2,
                    seed=int(seed),
                    device=devices.choose(self.device),
                    folder=Path(folder),
                )
        except UserError as error:
            raise ValueError(str(error)) from None
        # Classifiers number classes by descending count.
        self._columns = np.argsort([int(name) for name in self.classifier_.classes])
        return self

    def _ratio(self, features: int) -> float:
        known = isinstance(self.ratio, Real) and 0 < self.ratio <= 1  # anything else is refused later
        if known and not replaced_channels(float(self.ratio), features):
            warnings.warn(
                f"ratio {self.ratio:g} of {features} features replaces none; trained without H2T", stacklevel=3
            )
            return 0.0
        return self.ratio

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities float64 (n, K), columns in the order of `classes_`."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        _check_size(X)
        return self.classifier_.predict_proba(X.astype(np.float64, copy=False))[:, self._columns]

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, (n,)."""
        best = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[best])


def _check_labels(y: Any) -> None:
    """Raises ValueError for a missing label, which scikit-learn makes the class "nan", or leaves below its mask."""
    missing = np.ma.getmaskarray(y) if np.ma.isMaskedArray(y) else pd.isna(np.asarray(y, object))
    if np.ndim(missing) and missing.any():
        row = int(np.flatnonzero(missing.reshape(len(missing), -1).any(1))[0])
        raise ValueError(f"y: must have a label for each row, which NaN is not; row {row} has none; leave it out")


def _check_size(X: np.ndarray) -> None:
    if X.dtype.kind not in "fiub":
        raise ValueError(f"X: must be numbers; got {X.dtype}")
    if float(np.abs(X).max()) > FLOAT32_MAX:
        raise ValueError("X: values must fit float32; scale the features")
