from functools import partial

import numpy as np
import pytest
from pipeline_builders import make_index
from scipy.stats import chisquare

from h2t.pipeline.base import plugins
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.heads.batches import law

EPOCHS = 60
NAMES = plugins.names("samplers")
LIKELY = 1e-5  # a fair draw falls below this once in 100,000; seeds are fixed, so a test that passes once always does


def drawn(name, index, epoch=0, step=0, size=8, seed=0):
    return law(name, EPOCHS)(index, partial(stream, seed, name), epoch, step, size)


def epoch_of(name, index, epoch=0, size=8, seed=0):
    """An epoch's draws as `heads.batches` makes them: whole batches, cut where the epoch ends."""
    steps = -(-index.samples // size)
    return np.concatenate([drawn(name, index, epoch, s, size, seed) for s in range(steps)])[: index.samples]


def labels_of(index, positions):
    return np.searchsorted(index.starts, positions, side="right") - 1


def test_there_are_samplers():
    assert {"balanced", "instance", "reverse"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("counts", [(1,), (1, 1), (7,), (5, 3, 1), (100, 10, 1)])
def test_positions_are_in_range_and_int64(name, counts):
    index = make_index(counts)
    found = epoch_of(name, index)
    assert found.dtype == np.int64
    assert found.shape == (index.samples,)
    assert found.min() >= 0
    assert found.max() < index.samples


@pytest.mark.parametrize("name", NAMES)
def test_a_step_needs_no_step_before_it(name):
    index = make_index((40, 20, 3))
    in_order = [drawn(name, index, e, s) for e in range(3) for s in range(7)]
    assert np.array_equal(drawn(name, index, 2, 4), in_order[2 * 7 + 4])
    assert np.array_equal(drawn(name, index, 0, 0), in_order[0])


@pytest.mark.parametrize("name", NAMES)
def test_epochs_steps_and_seeds_differ(name):
    index = make_index((400, 200, 30))
    base = drawn(name, index, size=64)
    for other in ({"epoch": 1}, {"step": 1}, {"seed": 1}):
        assert not np.array_equal(drawn(name, index, size=64, **other), base)


@pytest.mark.parametrize(("counts", "size"), [((1,), 4), ((5, 3, 1), 4), ((5, 3, 1), 3), ((5, 3, 1), 100)])
def test_instance_draws_a_permutation_each_epoch(counts, size):
    index = make_index(counts)
    orders = [epoch_of("instance", index, epoch, size) for epoch in range(5)]
    for order in orders:
        assert sorted(order) == list(range(index.samples))
    if index.samples > 5:
        assert len({tuple(o) for o in orders}) == 5


def test_instance_gives_the_same_order_for_every_batch_size():
    index = make_index((50, 9))
    assert np.array_equal(epoch_of("instance", index, size=7), epoch_of("instance", index, size=32))


def test_balanced_classes_are_uniform_and_samples_uniform_within():
    index = make_index((500, 60, 20, 5, 1))
    positions = np.concatenate([epoch_of("balanced", index, e, 64) for e in range(60)])
    labels = labels_of(index, positions)
    assert chisquare(np.bincount(labels, minlength=5)).pvalue > LIKELY
    for j in range(4):
        inside = positions[labels == j] - index.starts[j]
        assert chisquare(np.bincount(inside, minlength=index.counts[j])).pvalue > LIKELY


def test_balanced_draws_with_replacement_and_without_memory():
    index = make_index((500, 60, 20, 5))
    labels = labels_of(index, np.concatenate([epoch_of("balanced", index, e, 64) for e in range(60)]))
    pairs = np.bincount(labels[:-1] * 4 + labels[1:], minlength=16)  # a class follows each class equally often
    assert chisquare(pairs).pvalue > LIKELY


def looped(index, size, epochs, order):
    """The published loader's way, with iterators: lists that are shuffled anew at their end."""

    def cycle(of, which, count):
        number = 0
        while True:
            yield from order(of, which, number, count)
            number += 1

    classes = cycle("classes", 0, index.classes)
    inside = [cycle("samples", j, int(index.counts[j])) for j in range(index.classes)]

    def positions():
        while True:
            label = next(classes)
            for _ in range(4):
                yield int(index.starts[label] + next(inside[label]))

    flow = positions()
    steps = -(-index.samples // size)
    return [[next(flow) for _ in range(size)] for _ in range(epochs * steps)]


@pytest.mark.parametrize("size", [8, 6, 5, 100])
def test_cyclic_is_the_published_loop_of_shuffled_lists(size):
    index = make_index((40, 20, 7, 3, 1))
    address = partial(stream, 0, "cyclic")
    expected = looped(index, size, 3, lambda *key: address(*key[:3]).permutation(key[3]))
    steps = -(-index.samples // size)
    found = [drawn("cyclic", index, e, s, size).tolist() for e in range(3) for s in range(steps)]
    assert found == expected


def test_cyclic_sees_every_sample_of_a_class_before_it_sees_one_again():
    index = make_index((60, 20, 7, 3))
    positions = np.concatenate([drawn("cyclic", index, e, s, 16) for e in range(8) for s in range(6)])
    labels = labels_of(index, positions)
    assert np.ptp(np.bincount(labels, minlength=4)) <= 4  # classes differ by a visit at most
    for j in range(4):
        seen = np.bincount(positions[labels == j] - index.starts[j], minlength=index.counts[j])
        assert np.ptp(seen) <= 1


def test_reverse_classes_follow_one_over_their_count():
    index = make_index((500, 60, 20, 5))
    positions = np.concatenate([epoch_of("reverse", index, e, 64) for e in range(60)])
    labels = labels_of(index, positions)
    share = (1 / index.counts) / (1 / index.counts).sum()
    assert chisquare(np.bincount(labels, minlength=4), share * len(labels)).pvalue > LIKELY
    inside = positions[labels == 2] - index.starts[2]
    assert chisquare(np.bincount(inside, minlength=20)).pvalue > LIKELY


def test_square_root_classes_follow_the_root_of_their_count():
    index = make_index((400, 100, 25, 4))
    labels = labels_of(index, np.concatenate([epoch_of("square_root", index, e, 64) for e in range(60)]))
    share = np.array([20, 10, 5, 2]) / 37
    assert chisquare(np.bincount(labels, minlength=4), share * len(labels)).pvalue > LIKELY


@pytest.mark.parametrize(("epoch", "balanced"), [(0, 0.0), (15, 15 / 59), (59, 1.0)])
def test_progressive_classes_move_from_their_counts_to_equal_shares(epoch, balanced):
    index = make_index((500, 60, 20, 5))
    seeds = range(40)
    labels = labels_of(index, np.concatenate([epoch_of("progressive", index, epoch, 64, seed) for seed in seeds]))
    share = (1 - balanced) * index.counts / 585 + balanced / 4
    assert chisquare(np.bincount(labels, minlength=4), share * len(labels)).pvalue > LIKELY


@pytest.mark.parametrize("name", ["balanced", "reverse"])
def test_these_checks_refuse_another_law(name):
    """The same chi-square tells instance-wise draws from balanced and reverse ones."""
    index = make_index((500, 60, 20, 5))
    labels = labels_of(index, epoch_of("instance", index))
    share = np.full(4, 0.25) if name == "balanced" else (1 / index.counts) / (1 / index.counts).sum()
    assert chisquare(np.bincount(labels, minlength=4), share * len(labels)).pvalue < LIKELY
