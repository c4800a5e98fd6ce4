from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_builders import make_stack, make_stage2_cache, taken

from h2t.pipeline.heads.fusion import channel_ranks, donor_orders, fixed_channels, fuse, mix, replaced_channels, shuffle

# ratio, channels, floor, round: section 1.1 of the reference facts
COUNTS = [
    (0.25, 64, 16, 16),
    (0.3, 64, 19, 19),
    (0.4, 64, 25, 26),
    (0.2, 64, 12, 13),
    (0.2, 48, 9, 10),
    (0.35, 48, 16, 17),
    (0.3, 512, 153, 154),
    (0.3, 1536, 460, 461),
    (0.2, 2048, 409, 410),
    (0.25, 2048, 512, 512),
    (0.3, 2048, 614, 614),
    (0.35, 2048, 716, 717),
    (0.0, 64, 0, 0),
    (1.0, 64, 64, 64),
    (0.5, 1, 0, 1),
    (1.0, 1, 1, 1),
]


@pytest.mark.parametrize(("ratio", "channels", "floor", "rounded"), COUNTS)
def test_the_replaced_channels_of_the_reference(ratio, channels, floor, rounded):
    assert replaced_channels(ratio, channels) == floor
    assert replaced_channels(ratio, channels, "round") == rounded


def test_the_product_is_the_floating_point_one():
    assert replaced_channels(0.29, 100) == 28  # 0.29 * 100 is 28.999...96


def slow_fusion(receiver, donor, channels):
    """The paper's Listing 1, one value at a time."""
    fused = receiver.clone()
    for sample in range(receiver.shape[0]):
        for channel in channels:
            for y in range(receiver.shape[2]):
                for x in range(receiver.shape[3]):
                    fused[sample, channel, y, x] = donor[sample, channel, y, x]
    return fused


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 1, 1), (3, 8, 2, 3)])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.3, 0.5, 1.0])
def test_agrees_with_a_slow_reference_and_leaves_its_inputs(shape, ratio):
    draws = torch.Generator().manual_seed(0)
    receiver, donor = torch.randn(shape, generator=draws), torch.randn(shape, generator=draws)
    before = receiver.clone(), donor.clone()
    ranks = channel_ranks([0], 0, [0], [0], shape[1])[0, 0, 0]
    count = replaced_channels(ratio, shape[1])
    mask = torch.from_numpy(ranks < count)
    fused = fuse(receiver, donor, mask[:, None, None])
    assert torch.equal(fused, slow_fusion(receiver, donor, np.flatnonzero(ranks < count)))
    assert torch.equal(receiver, before[0])
    assert torch.equal(donor, before[1])
    assert fused.data_ptr() not in (receiver.data_ptr(), donor.data_ptr())
    changed = (fused != receiver).flatten(2).any(2)  # (samples, channels)
    assert (changed.sum(1) == count).all()
    assert (changed == changed[0]).all()  # one set for the whole batch


def test_what_is_not_replaced_may_be_anything():
    receiver = torch.ones(2, 4)
    donor = torch.full((2, 4), float("nan"))
    assert torch.equal(fuse(receiver, donor, torch.zeros(4, dtype=torch.bool)), receiver)


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_mixup_is_the_mean_of_fusion_over_all_sets(count):
    draws = torch.Generator().manual_seed(0)
    receiver, donor = (torch.randn(3, 4, 2, 2, generator=draws, dtype=torch.float64) for _ in "ab")
    masks = [torch.isin(torch.arange(4), torch.tensor(chosen)) for chosen in combinations(range(4), count)]
    mean = torch.stack([fuse(receiver, donor, mask[:, None, None]) for mask in masks]).mean(0)
    mixed = mix(receiver, donor, torch.tensor(count / 4, dtype=torch.float64))
    torch.testing.assert_close(mixed, mean)
    assert torch.equal(mixed, receiver) == (count == 0)


@given(
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 300),
    step=st.integers(0, 10**6),
    channels=st.integers(1, 300),
    ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_sets_are_permutations_and_nested(seed, epoch, step, channels, ratios):
    ranks = channel_ranks([seed], epoch, [step], [0], channels)[0, 0, 0]
    assert sorted(ranks) == list(range(channels))
    small, large = (set(np.flatnonzero(ranks < replaced_channels(r, channels))) for r in sorted(ratios))
    assert small <= large


def test_sets_differ_by_seed_epoch_step_and_expert_and_repeat_for_the_same():
    def ranks_of(seed, epoch, step, expert):
        return tuple(channel_ranks([seed], epoch, [step], [expert], 64)[0, 0, 0])

    base = (0, 0, 0, 0)
    found = {ranks_of(*base)}
    for place in range(4):
        other = list(base)
        other[place] = 1
        found.add(ranks_of(*other))
    assert len(found) == 5
    assert ranks_of(*base) == ranks_of(*base)


def test_the_draws_of_published_heads():
    """What seed 0 draws today it draws tomorrow: whoever trains again gets the heads of the results."""
    ranks, orders = channel_ranks([0], 1, [2], [3], 8)[0, 0, 0], donor_orders([0], 1, [2], [3], 3, 4)[0, 0, 0]
    assert (ranks.dtype, orders.dtype) == (np.int32, np.int64)
    assert ranks.tolist() == [7, 2, 3, 1, 0, 5, 4, 6]
    assert orders.tolist() == [[1, 1, 2, 0], [2, 0, 1, 1], [0, 2, 0, 2]]


def test_every_channel_is_replaced_equally_often():
    """Chi-square over 2,000 batches: k of C without replacement, each channel with probability k / C."""
    batches, channels, count = 2000, 16, 4
    hits = (channel_ranks([0], 0, range(batches), [0], channels) < count).sum((0, 1, 2))
    expected = batches * count / channels
    # Each hit is Bernoulli; sampling without replacement shrinks the statistic by (C - k) / (C - 1).
    statistic = ((hits - expected) ** 2 / expected).sum() * (channels - 1) / (channels - count)
    assert statistic < 55  # chi-square with 15 degrees of freedom exceeds 55 with probability 2e-6


@pytest.mark.parametrize(("selection", "expected"), [("first", [0, 1, 2]), ("middle", [3, 4, 5]), ("last", [7, 8, 9])])
def test_fixed_sets(selection, expected):
    mask = fixed_channels(selection, 3, 10)
    assert mask.dtype == bool
    assert np.flatnonzero(mask).tolist() == expected
    assert fixed_channels(selection, 0, 10).sum() == 0
    assert fixed_channels(selection, 10, 10).all()


def test_masks_of_a_stack(tmp_path):
    """One set per batch and expert for each seed, nested over ratios, redrawn every batch; fixed sets stay."""
    ratios = [0.0, 0.2, 0.5, 1.0]
    heads = [{"ratio": r, "seed": s} for s in (0, 1) for r in ratios]
    heads += [{"ratio": 0.5, "selection": s} for s in ("first", "middle", "last")]
    cache = make_stage2_cache(tmp_path / "c", shape=(32, 1, 1), experts=2)
    stack = make_stack(cache, heads)

    def masks_of(epoch, step):
        ranks = channel_ranks(stack.streams.seeds, epoch, [step], range(2), 32)[0]
        return stack.masks(torch.from_numpy(ranks)).numpy()

    masks = masks_of(0, 0)
    assert masks.shape == (len(heads), 2, 32)
    for k, head in enumerate(stack.heads):
        assert (masks[k].sum(1) == replaced_channels(head.ratio, 32)).all()
    for first in (0, 4):
        for k in range(first, first + 3):
            assert (masks[k] <= masks[k + 1]).all()
    assert (masks[2, 0] != masks[2, 1]).any()  # experts
    assert (masks[2] != masks[6]).any()  # seeds
    later = masks_of(0, 1)
    assert (masks[2] != later[2]).any()
    assert (masks_of(1, 0)[2] != masks[2]).any()
    assert np.array_equal(later[8:], masks[8:])
    assert np.array_equal(masks_of(0, 0), masks)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_stacks_input_is_the_slow_fusion_and_the_cache_stays(tmp_path, pooled):
    heads = [{"ratio": r, "seed": s} for s in (0, 1) for r in (0.0, 0.4, 1.0)]
    stack = make_stack(make_stage2_cache(tmp_path / "c", experts=2), heads, pooled=pooled, at_once=False)
    at = next(stack.feed.steps(1, 0, 1, stack.draw))
    batch, table = at.batch, at.table
    rows = stack.streams.rows
    before = taken(table, rows).clone()
    masks = stack.masks(at.draws.ranks)
    given, donors = stack.given(at)
    fused = stack.fused(at.draws, given.features, donors)
    for k, head in enumerate(stack.heads):
        place = stack.streams.seeds.index(head.seed)
        receiver = taken(table, batch.receivers[place])
        donor = taken(table, batch.donors[place, 0])
        for expert in range(2):
            r, d = (t[expert].reshape(*t[expert].shape[:2], -1, 1) for t in (receiver, donor))
            slow = slow_fusion(r, d, np.flatnonzero(masks[k, expert].numpy()))
            assert torch.equal(fused[k, expert].reshape(slow.shape), slow)
    fused.zero_()
    assert torch.equal(taken(table, rows), before)


def orders_of(seed, epoch, step, expert, batch, channels):
    return donor_orders([seed], epoch, [step], [expert], batch, channels)[0, 0, 0]


@pytest.mark.parametrize("inner", [(), (2, 3)])
def test_shuffled_donors_keep_each_channel_and_lose_what_joins_channels(inner):
    donor = torch.arange(6 * 5, dtype=torch.float32).reshape(6, 5, *(1,) * len(inner)).expand(6, 5, *inner)
    orders = orders_of(0, 1, 2, 0, 6, 5)
    found = shuffle(donor, torch.from_numpy(orders))
    for sample in range(6):
        for channel in range(5):
            assert torch.equal(found[sample, channel], donor[orders[sample, channel], channel])
    assert np.array_equal(np.sort(orders, axis=0), np.repeat(np.arange(6)[:, None], 5, axis=1))
    assert len({tuple(order) for order in orders.T}) > 1
    assert np.array_equal(orders_of(0, 1, 2, 0, 6, 5), orders)
    for other in ((1, 1, 2, 0), (0, 2, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1)):
        assert not np.array_equal(orders_of(*other, 6, 5), orders)


@pytest.mark.parametrize("pooled", [True, False])
def test_shuffled_heads_of_a_stack(tmp_path, pooled):
    """Same channels as `random`; what is replaced comes from the batch's donors, channel by channel; others unmoved."""
    heads = [
        {"ratio": r, "selection": s, "seed": seed}
        for r in (0.4, 1.0)
        for s in ("random", "shuffled")
        for seed in (0, 1)
    ]
    stack = make_stack(make_stage2_cache(tmp_path / "c", experts=2), heads, pooled=pooled)
    at = next(stack.feed.steps(1, 0, 0, stack.draw))
    batch, table, orders = at.batch, at.table, at.draws.orders
    masks = stack.masks(at.draws.ranks)
    given, all_donors = stack.given(at)
    fused, plain = (
        stack.fused(draws, given.features, all_donors) for draws in (at.draws, at.draws._replace(orders=None))
    )
    for k, head in enumerate(heads):
        seed = stack.streams.seeds.index(head["seed"])
        if head["selection"] != "shuffled":
            assert torch.equal(fused[k], plain[k])
            continue
        assert torch.equal(masks[k], masks[k - 2])
        receiver, donor = taken(table, batch.receivers[seed]), taken(table, batch.donors[seed, 0])
        for expert in range(2):
            order = orders[seed, expert]
            assert torch.equal(order, torch.from_numpy(orders_of(head["seed"], 0, 0, expert, 4, 6)))
            for channel in range(6):
                shuffled = donor[expert, order[:, channel], channel]
                expected = shuffled if masks[k, expert, channel] else receiver[expert, :, channel]
                assert torch.equal(fused[k, expert, :, channel], expected)
