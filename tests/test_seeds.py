import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2t.pipeline.base.seeds import stream, torch_seed

PINNED = ([135, 14, 937, 257], [464, 179, 545, 647], 3866525415616801780)

KEYS = st.lists(st.one_of(st.integers(0, 2**32 - 1), st.text(max_size=20)), max_size=5).map(tuple)


def draws(seed, *key):
    return stream(seed, *key).integers(2**63, size=8).tolist()


@given(st.integers(0, 2**32 - 1), KEYS)
def test_an_address_always_gives_the_same_draws(seed, key):
    assert draws(seed, *key) == draws(seed, *key)


@given(st.integers(0, 2**32 - 1), KEYS, KEYS)
def test_other_addresses_give_other_draws(seed, one, other):
    if one != other:
        assert draws(seed, *one) != draws(seed, *other)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0,), (0, 0)), ((0, 0), (0, 0, 0)), ((0, 1), (1, 0)), ((1,), (0, 1)), ((0, "a"), (0, "b")), ((0,), (1,))],
)
def test_trailing_zeros_and_order_count(one, other):
    assert draws(*one) != draws(*other)


def test_draws_are_pinned():
    """Batches of published results hang on these; a change here changes every cached and trained number."""
    assert stream(0).integers(1000, size=4).tolist() == PINNED[0]
    assert stream(7, "receiver", "balanced", 3, 5).integers(1000, size=4).tolist() == PINNED[1]
    assert torch_seed(0, "stage1", "initial") == PINNED[2]


def test_the_global_generators_are_left_alone():
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    stream(0, "x").random(10)
    assert np.array_equal(np.random.get_state()[1], state)


def test_torch_seeds_fit_torch():
    import torch

    for k in range(20):
        torch.Generator().manual_seed(torch_seed(k, "x"))
