"""h2t.estimator in scikit-learn: its checks, pipelines and cross-validation."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from h2t.estimator import H2TClassifier
from h2t.pipeline.base.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:ratio 0.3 of:UserWarning", "ignore::sklearn.exceptions.SkipTestWarning")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{getattr(check, 'func', check).__name__}-{number}")
        for number, (_, check) in enumerate(estimator_checks_generator(H2TClassifier(device="cpu"), legacy=True))
    ],
)
def test_scikit_learns_checks(check):
    check(clone(H2TClassifier(device="cpu")))


@pytest.fixture(scope="module")
def digits():
    """(training features, labels, test features, labels): a long tail of digits, ten of the rarest."""
    x, y = load_digits(return_X_y=True)
    keep = np.concatenate([np.flatnonzero(y == k)[: 100 // (k + 1)] for k in range(10)])
    rest = np.setdiff1d(np.arange(len(y)), keep)
    return x[keep] / 16, y[keep], x[rest] / 16, y[rest]


def test_it_works_in_pipelines_and_grids(digits):
    x, y, others, theirs = digits
    steps = make_pipeline(StandardScaler(), H2TClassifier("balanced_softmax", epochs=5, device="cpu"))
    grid = GridSearchCV(steps, {"h2tclassifier__ratio": [0.0, 0.3]}, cv=2).fit(x, y)
    assert grid.score(others, theirs) > 0.7
    assert set(grid.best_params_) == {"h2tclassifier__ratio"}


def test_a_closed_form_method_equals_scikit_learns(digits):
    """With the same objective, a logistic regression of ours and of scikit-learn give the same classes."""
    x, y, others, _ = digits
    ours = H2TClassifier("logistic_regression", device="cpu").fit(x, y)
    theirs = LogisticRegression(C=1 / (1e-3 * len(y)), class_weight="balanced", max_iter=2000, tol=1e-8).fit(x, y)
    assert (ours.predict(others) == theirs.predict(others)).mean() > 0.98


def test_the_same_seed_gives_the_same_probabilities(digits):
    x, y, others, _ = digits
    first, again = (H2TClassifier(epochs=2, device="cpu").fit(x, y).predict_proba(others) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = H2TClassifier(epochs=2, random_state=1, device="cpu").fit(x, y).predict_proba(others)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "dr2"}, "'dr2'"),
        ({"ratio": 2.0}, r"must lie in \[0, 1\]"),
        ({"settings": {"optimiser": {"lrr": 1}}}, "methods.dr.optimiser.lrr: unknown key; did you mean 'lr'"),
        ({"l2": -1.0}, "probe.l2: must be greater than 0"),
        ({"ratio": float("nan")}, r"grid.ratio\[0\]: must"),
        ({"ratio": "a third"}, r"grid.ratio\[0\]: must"),
        ({"settings": [1]}, r"methods.dr: must be keys of an entry of hosts with their values; got \[1\]"),
        ({"settings": {"grid": {"seed": [7, 8]}}}, "methods.dr.grid: must ask for one classifier; got 2"),
        ({"settings": {"grid": {"donor": ["instance", "balanced"]}}}, "must ask for one classifier; got 2"),
        ({"device": "gpu"}, "device: must be auto"),
    ],
)
def test_wrong_settings_are_one_line(digits, given, says):
    with pytest.raises(ValueError, match=says) as caught:
        H2TClassifier(**given).fit(*digits[:2])
    assert "\n" not in str(caught.value)


def test_a_ratio_that_replaces_nothing_is_said(digits):
    x, y = digits[0][:, 20:22], digits[1]
    with pytest.warns(UserWarning, match="ratio 0.3 of 2 features replaces none; trained without H2T"):
        H2TClassifier(epochs=1, device="cpu").fit(x, y)


def test_settings_leave_the_other_arguments_as_they_are(digits):
    x, y, others, _ = digits

    def proba(**given):
        return H2TClassifier(device="cpu", **given).fit(x, y).predict_proba(others)

    usual = proba(epochs=2)
    assert np.array_equal(usual, proba(epochs=2, settings={"optimiser": {"weight_decay": 5e-4}}))
    assert not np.array_equal(usual, proba(epochs=4, settings={"optimiser": {"weight_decay": 5e-4}}))
    assert np.array_equal(usual, proba(epochs=2, settings={"grid": {"donor": ["instance"]}}))
    assert not np.array_equal(usual, proba(epochs=2, ratio=0.6, settings={"grid": {"donor": ["instance"]}}))
    assert np.array_equal(usual, proba(epochs=np.int64(2), ratio=np.float64(0.3), settings={"scale": None}))


@pytest.mark.filterwarnings("error")
def test_arrays_of_any_kind_are_read_without_a_word(digits):
    x, y, _, _ = digits
    x.flags.writeable = False
    H2TClassifier("ncm", device="cpu").fit(x.astype(np.float16), y).predict(x)


def test_what_is_too_large_to_train_on_is_too_large_to_predict(digits):
    x, y, _, _ = digits
    fitted = H2TClassifier("ncm", device="cpu").fit(x, y)
    with pytest.raises(ValueError, match="X: values must fit float32"):
        fitted.predict(x * 1e39)
    with pytest.raises(UserError, match="features: must be finite and not too large; row 1 has no probabilities"):
        fitted.classifier_.predict(np.where(np.arange(len(x))[:, None] == 1, np.nan, x))
