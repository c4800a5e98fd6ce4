import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from h2t.pipeline.data.classes import GROUPS, groups
from h2t.pipeline.evaluation.metrics import (
    BINS,
    answers,
    calibration_gaps,
    confusion,
    expected_calibration_error,
    group_accuracy,
    over_seeds,
    per_class_accuracy,
    precision_and_f1,
    summaries,
)


@given(
    st.integers(1, 7).flatmap(
        lambda k: hnp.arrays(np.int64, st.tuples(st.just(2), st.integers(1, 60)), elements=st.integers(0, k - 1))
    )
)
def test_agrees_with_scikit_learn(drawn):
    labels, guesses = drawn
    classes = 8
    true, predicted, count = confusion(labels, guesses, classes)
    expected = confusion_matrix(labels, guesses, labels=range(classes))
    assert [true.tolist(), predicted.tolist()] == [places.tolist() for places in np.nonzero(expected)]
    assert count.tolist() == expected[true, predicted].tolist()
    logits = np.eye(classes)[guesses]
    (found,) = summaries([answers(logits, labels)], labels, ["head"] * classes)
    assert found["top1"] == pytest.approx(100 * accuracy_score(labels, guesses))
    recall = recall_score(labels, guesses, labels=range(classes), average=None, zero_division=np.nan)
    assert np.allclose(per_class_accuracy(labels, guesses, classes), 100 * recall, equal_nan=True)
    assert found["head"] == pytest.approx(100 * np.nanmean(recall))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100, 365, 1000, 8142])
def test_figures_of_each_number_of_classes_agree_with_scikit_learn(classes):
    """Random logits with ties, labels that leave classes out: top-1, groups and ECE from independent code."""
    rng = np.random.default_rng(classes)
    logits = rng.integers(-3, 4, (300, classes)).astype(np.float32)
    labels = rng.integers(0, max(1, classes // 2), 300)  # the later half of the classes is absent
    group_of = groups([1] * classes)["paper_index"]
    (found,) = summaries([answers(logits, labels)], labels, group_of)
    guesses = np.array([row.index(max(row)) for row in logits.tolist()])  # the first of the largest
    assert found["top1"] == pytest.approx(100 * accuracy_score(labels, guesses))
    present = np.unique(labels)
    recall = recall_score(labels, guesses, labels=present, average=None, zero_division=0)
    for group in GROUPS:
        members = [r for r, label in zip(recall, present, strict=True) if group_of[label] == group]
        assert found[group] == (pytest.approx(100 * np.mean(members)) if members else None)
    confidence = softmax(logits.astype(np.float64), axis=1).max(1)
    bins: dict[int, list[tuple[float, float]]] = {}
    for c, r in zip(confidence, guesses == labels, strict=True):
        bins.setdefault(next(b for b in range(1, BINS + 1) if c <= b / BINS or b == BINS), []).append((c, r))
    gaps = [len(b) / 300 * abs(np.mean([r for _, r in b]) - np.mean([c for c, _ in b])) for b in bins.values()]
    assert found["ece"] == pytest.approx(100 * sum(gaps), abs=1e-6)


def test_further_figures_agree_with_scikit_learn():
    """Without ties, which scikit-learn ranks the other way; some classes without samples, some never predicted."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (400, 30))
    logits[:, 25:] -= 100
    labels = rng.integers(0, 20, 400)
    (found,) = summaries([answers(logits, labels)], labels, groups([1] * 30)["paper_index"])
    guesses, share = logits.argmax(1), softmax(logits, axis=1)
    recalls = recall_score(labels, guesses, labels=np.unique(labels), average="macro")
    assert found["balanced_accuracy"] == pytest.approx(100 * recalls)
    assert found["macro_f1"] == pytest.approx(100 * f1_score(labels, guesses, average="macro"))
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=range(30)))
    assert found["nll"] == pytest.approx(log_loss(labels, share, labels=range(30)))
    (precision,), (f1,) = precision_and_f1(labels, [guesses], 30)
    assert np.isnan(precision[25:]).all()
    assert np.isnan(f1[25:]).all()
    assert not np.isnan(f1[:20]).any()
    seen = np.unique(guesses)
    expected = precision_score(labels, guesses, labels=seen, average=None, zero_division=0)
    assert np.allclose(precision[seen], 100 * expected)


def test_precision_and_f1_of_several_classifiers_are_those_of_each_alone():
    """Exactly those of scikit-learn; class 6 does not occur, class 5 is never predicted."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 1000)
    every = [np.where(rng.random(len(labels)) < share, labels, 0) % 5 for share in (0.9, 0.5, 0.1)]
    precision, f1 = precision_and_f1(labels, every, 7)
    for guesses, of_one, f1_of_one in zip(every, precision, f1, strict=True):
        expected = precision_recall_fscore_support(labels, guesses, labels=range(7), zero_division=np.nan)
        assert np.array_equal(of_one, 100 * expected[0], equal_nan=True)
        assert np.array_equal(f1_of_one, 100 * expected[2], equal_nan=True)


@pytest.mark.parametrize("classes", [1, 2, 7, 100, 1001])
def test_answers_of_several_classifiers_are_those_of_each_alone(classes):
    """To the last bit, as evaluate grades as many at once as fit into the processor's cache."""
    rng = np.random.default_rng(classes)
    logits, labels = rng.normal(0, 3, (5, 9, classes)).astype(np.float32).round(1), rng.integers(0, classes, 9)
    temperatures = np.array([1.0, 0.3, 1.7, 2.0, 9.0])
    found = vars(answers(logits, labels, temperatures[:, None, None]))
    for number, temperature in enumerate(temperatures):
        for name, alone in vars(answers(logits[number], labels, temperature)).items():
            assert alone is found[name] is None or np.array_equal(found[name][number], alone), name


def test_ranks_put_the_first_of_equal_logits_first():
    logits = np.array([[1.0, 2.0, 2.0, 0.0]] * 4)
    assert answers(logits, np.arange(4)).rank.tolist() == [2, 0, 1, 3]
    assert answers(logits, np.arange(4)).guesses.tolist() == [1] * 4


@given(st.integers(0, 2**31), st.integers(1, 200))
def test_the_gaps_add_up_to_the_calibration_error(seed, samples):
    rng = np.random.default_rng(seed)
    said, labels = answers(rng.normal(0, 2, (samples, 4)), rng.integers(0, 4, samples)), rng.integers(0, 4, samples)
    right = (said.guesses == labels).astype(float)
    error = expected_calibration_error(said.confidence, right)
    assert 100 * calibration_gaps(said, labels).mean() == pytest.approx(error, abs=1e-9)


def test_one_sample_of_one_class():
    (found,) = summaries([answers(np.array([[3.0]]), np.array([0]))], np.array([0]), ["tail"])
    assert found == {
        **{"top1": 100.0, "head": None, "medium": None, "tail": 100.0, "ece": 0.0},
        **{"balanced_accuracy": 100.0, "macro_f1": 100.0, "top5": 100.0, "nll": 0.0},
    }


def test_a_group_is_the_mean_over_its_classes_that_have_samples():
    accuracy = np.array([100.0, 50.0, np.nan, 0.0])
    assert group_accuracy(accuracy, ["head", "head", "head", "tail"]) == {"head": 75.0, "medium": None, "tail": 0.0}
    assert group_accuracy(accuracy, ["head", "head", "tail", None])["tail"] is None


def test_of_tied_logits_the_first_class_wins():
    (found,) = summaries([answers(np.zeros((2, 3)), np.array([0, 1]))], np.array([0, 1]), ["head", "medium", "tail"])
    assert (found["top1"], found["head"], found["medium"], found["tail"]) == (50.0, 100.0, 0.0, None)


@pytest.mark.parametrize(
    ("confidence", "right", "expected"),
    [
        ([1.0], [1], 0.0),
        ([1.0], [0], 100.0),
        ([0.8], [1], 20.0),
        # one bin: |mean right - mean confidence|
        ([0.81, 0.83, 0.85, 0.82], [1, 1, 0, 0], 100 * abs(0.5 - 0.8275)),
        # two bins of one: gaps add up weighted, they do not cancel
        ([0.95, 0.5], [1, 0], 100 * (0.05 + 0.5) / 2),
        # 0.6 = 9/15 closes bin 9, just above it opens bin 10: opposite gaps stay apart ...
        ([0.6, 0.6001], [1, 0], 100 * (0.4 + 0.6001) / 2),
        # ... and would cancel within one bin
        ([0.6001, 0.6002], [1, 0], 100 * abs(0.5 - 0.60015)),
        ([0.0], [1], 100.0),
    ],
)
def test_calibration_error_by_hand(confidence, right, expected):
    found = expected_calibration_error(np.array(confidence), np.array(right, float))
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("edge", range(1, BINS + 1))
def test_every_edge_belongs_to_the_bin_it_closes(edge):
    """A sample at edge b/15 shares a bin with one just below it, and with none just above."""
    at, below, above = edge / BINS, edge / BINS - 1e-4, edge / BINS + 1e-4
    together = expected_calibration_error(np.array([at, below]), np.array([1.0, 0.0]))
    assert together == pytest.approx(100 * abs(0.5 - (at + below) / 2), abs=1e-9)
    if edge < BINS:
        apart = expected_calibration_error(np.array([at, above]), np.array([1.0, 0.0]))
        assert apart == pytest.approx(100 * (1 - at + above) / 2, abs=1e-9)


@given(hnp.arrays(np.float64, st.integers(1, 80), elements=st.floats(1e-6, 1)), st.integers(0, 2**31))
def test_calibration_error_agrees_with_digitize(confidence, seed):
    """The reference codes: `np.digitize(confidence, edges, right=True)`. Points at an edge are the tests above."""
    confidence = confidence[np.abs(confidence * BINS - np.round(confidence * BINS)) > 1e-9]
    if not len(confidence):
        return
    right = np.random.default_rng(seed).integers(0, 2, len(confidence)).astype(float)
    place = np.digitize(confidence, np.linspace(0, 1, BINS + 1), right=True)
    expected = sum(
        (place == b).mean() * abs(right[place == b].mean() - confidence[place == b].mean()) for b in set(place)
    )
    assert expected_calibration_error(confidence, right) == pytest.approx(100 * expected, abs=1e-9)


def test_confidence_of_huge_and_equal_logits():
    found = answers(np.array([[1e30, -1e30], [0.0, 0.0], [-1e4, -1e4 - np.log(3)]]), np.array([0, 1, 1]))
    assert np.allclose(found.confidence, [1.0, 0.5, 0.75])
    assert np.allclose(found.loss, [0.0, np.log(2), np.log(4)])
    assert found.rank.tolist() == [0, 1, 1]


def test_one_seed_has_no_deviation():
    assert over_seeds([{"top1": 50.0}]) == {"top1": 50.0, "top1_std": None}


def test_mean_and_sample_deviation_over_seeds():
    found = over_seeds([{"top1": 1.0, "tail": None}, {"top1": 3.0, "tail": None}])
    assert found == {"top1": 2.0, "top1_std": pytest.approx(2**0.5), "tail": None, "tail_std": None}
