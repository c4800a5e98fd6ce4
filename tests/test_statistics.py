"""Paired differences: against SciPy's own paired test, and the cases that have no interval."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from h2t.pipeline.reporting.intervals import paired


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8))
def test_interval_is_that_of_the_paired_t_test(pairs):
    after, before = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    each = np.array(list(after.values())) - np.array(list(before.values()))
    found = paired(after, before)
    assert found.seeds == len(pairs)
    assert found.mean == pytest.approx(each.mean(), abs=1e-9)
    assert found.std == pytest.approx(each.std(ddof=1), abs=1e-9)
    if found.std > 1e-6:
        interval = ttest_rel(list(after.values()), list(before.values())).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ({0: 1.0, 1: 1.1, 2: 0.9}, "higher"),
        ({0: -1.0, 1: -1.1, 2: -0.9}, "lower"),
        ({0: 1.0, 1: -1.1, 2: 0.2}, "too close to tell"),
        ({0: 0.0, 1: 0.0}, "too close to tell"),
        ({0: 5.0}, "one seed: unknown"),
    ],
)
def test_verdict(after, verdict):
    assert paired(after, dict.fromkeys(range(3), 0.0)).verdict == verdict


def test_pairs_are_seeds_that_both_have():
    assert paired({0: 3.0, 1: 5.0, 7: 100.0}, {1: 4.0, 0: 2.0, 9: 0.0}).mean == 1.0
    assert paired({0: 3.0}, {1: 3.0}) is None


def test_pairing_finds_what_the_spread_of_seeds_hides():
    seeds = np.random.default_rng(0).normal(70, 10, 5)
    after, before = dict(enumerate(seeds + 0.5)), dict(enumerate(seeds))
    after[0] += 0.01
    assert paired(after, before).verdict == "higher"
