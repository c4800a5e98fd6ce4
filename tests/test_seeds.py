import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2t.pipeline.base.many_streams import ManyStreams, at_once, generators
from h2t.pipeline.base.seeds import stream, torch_seed, word

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


@given(
    st.integers(0, 2**160),
    KEYS,
    st.lists(
        st.one_of(st.none(), st.integers(1, 1000), st.sampled_from([2**31 + 1, 2**32 - 1])), min_size=1, max_size=12
    ),
)
def test_many_streams_draw_what_each_draws_alone(seed, key, highs):
    """`None` is a float. Numbers above 2^31 make NumPy repeat a draw often; those streams are marked."""
    numbers = [0, 1, 2**32 - 1, 7, 8, 9]
    many = ManyStreams(seed, *key, np.array(numbers, np.uint32), "view")
    alone = [stream(seed, *key, number, "view") for number in numbers]
    for high in highs:
        drawn = many.random() if high is None else many.integers(high)
        for i, one in enumerate(alone):
            wanted = one.random() if high is None else one.integers(high)
            assert many.repeats[i] or drawn[i] == wanted


def test_few_streams_are_marked():
    """Nine of 2^32 draws below nine must be repeated, and below 2^31 + 1 nearly half of them."""
    many = ManyStreams(0, np.arange(1000, dtype=np.uint32))
    many.integers(9)
    assert not many.repeats.any()
    many.integers(2**31 + 1)
    assert 400 < many.repeats.sum() < 600


def test_a_word_of_many_streams_may_differ_from_stream_to_stream():
    names = ["a.jpg", "b.jpg", "ä"]
    many = ManyStreams(3, "view", np.array([word(name) for name in names], np.uint32), 5)
    assert many.integers(10**6).tolist() == [stream(3, "view", name, 5).integers(10**6) for name in names]


SEEDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4, unique=True)
HIGHS = st.sampled_from([1, 1, 2, 5, 1000, 2**31 + 1, 2**32 - 1])


@given(SEEDS, KEYS, st.lists(st.lists(HIGHS, min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_arrays_drawn_at_once_are_those_of_each_stream(numbers, key, highs, shares):
    """Also where NumPy repeats a draw, which it does for nearly half of those below 2^31 + 1."""
    steps = [0, 3, 2**32 - 1, *range(10, 40)]
    of_step = np.broadcast_to(np.array(highs[0]), (len(steps), len(numbers), 3))

    def draw(draws, of):
        first = [draws.choice(4, size=5, p=np.array([0.1, 0.2, 0.3, 0.4]))] if shares else []
        same = [draws.integers(high[0], size=3) for high in highs]
        return np.concatenate([*first, *same, draws.integers(of)], axis=-1)

    drawn = at_once(numbers, key, steps, draw, of_step)
    for i, step in enumerate(steps):
        for j, seed in enumerate(numbers):
            assert drawn[i, j].tolist() == draw(stream(seed, *key, step), of_step[i, j]).tolist()


@given(st.lists(st.integers(0, 2**33), min_size=1, max_size=4, unique=True), KEYS, st.booleans())
def test_generators_of_many_streams_draw_what_each_draws_alone(numbers, key, several):
    steps, experts = [0, 2**32 - 1, *range(10, 40)], range(2 if several else 1)
    every = generators(numbers, key, steps, experts)
    found = [(draws.permutation(9).tolist(), draws.integers(5), draws.random()) for draws in every]
    alone = [stream(seed, *key, step, e) for step in steps for seed in numbers for e in experts]
    assert found == [(draws.permutation(9).tolist(), draws.integers(5), draws.random()) for draws in alone]
