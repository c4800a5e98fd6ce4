from itertools import pairwise

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from h2t.cache.read.plan import coalesce, plan_rows, portions, units

gathers = st.tuples(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 7))


@given(gathers)
def test_every_wanted_row_and_every_chunk_once(gather):
    """Against the obvious: a dictionary of chunks."""
    rows, chunk_rows = np.array(gather[0], np.int64), gather[1]
    expected: dict[int, list[int]] = {}
    for position, row in enumerate(gather[0]):
        expected.setdefault(row // chunk_rows, []).append(position)
    plan = plan_rows(rows, chunk_rows)
    assert plan.chunks.tolist() == sorted(expected)
    served = [plan.order[a:b].tolist() for a, b in zip(plan.bounds[:-1], plan.bounds[1:], strict=True)]
    assert served == [expected[chunk] for chunk in sorted(expected)]
    assert (plan.chunks[plan.which] * chunk_rows + plan.within).tolist() == gather[0]


@given(gathers)
@example(([0, 1, 1, 1], 1))
def test_leads_and_repeats_of_any_part(gather):
    """A chunk's first wanted row gets the chunk's bytes; each later one is named with it, as numbers of Python."""
    plan = plan_rows(np.array(gather[0], np.int64), gather[1])
    served = [plan.order[a:b].tolist() for a, b in pairwise(plan.bounds)]
    assert plan.leads().tolist() == [rows[0] for rows in served]
    count = len(served)
    for first, last in [(0, count), (count // 3, count - count // 4), (count, count), *pairwise(range(count + 1))]:
        assert plan.repeats(first, last) == [(row, rows[0]) for rows in served[first:last] for row in rows[1:]]


def test_one_row_and_no_row():
    plan = plan_rows(np.array([5]), 1)
    assert (plan.chunks.tolist(), plan.order.tolist(), plan.bounds.tolist(), plan.within.tolist()) == (
        [5],
        [0],
        [0, 1],
        [0],
    )
    assert plan_rows(np.zeros(0, np.int64), 3).chunks.tolist() == []


def test_row_numbers_of_the_largest_caches():
    rows = np.array([10**12, 3, 10**12, 10**12 - 1])
    plan = plan_rows(rows, 1)
    assert plan.chunks.tolist() == [3, 10**12 - 1, 10**12]
    assert plan.order.tolist() == [1, 3, 0, 2]


@st.composite
def chunks_in_shards(draw):
    """Shard, offset and size of chunks, sorted, with gaps; now and then an offset that goes backwards."""
    shards, offsets, sizes = [], [], []
    for shard in range(draw(st.integers(1, 3))):
        at = 36
        for _ in range(draw(st.integers(0, 12))):
            at = max(0, at + draw(st.sampled_from([0, 0, 0, 1, 9, 10, 11, 500, -20])))
            size = draw(st.integers(5, 40))
            shards.append(shard)
            offsets.append(at)
            sizes.append(size)
            at += size
    return tuple(np.array(column, np.int64) for column in (shards, offsets, sizes))


def naive_runs(shards, offsets, sizes, max_gap):
    runs: list[list[int]] = []
    for i in range(len(shards)):
        joined = False
        if runs and shards[runs[-1][-1]] == shards[i]:
            gap = offsets[i] - offsets[runs[-1][-1]] - sizes[runs[-1][-1]]
            joined = 0 <= gap <= max_gap
        if joined:
            runs[-1].append(i)
        else:
            runs.append([i])
    return [(r[0], r[-1] + 1, offsets[r[0]], offsets[r[-1]] + sizes[r[-1]]) for r in runs]


@given(chunks_in_shards(), st.sampled_from([0, 10, 1000]))
def test_runs_against_a_naive_evaluator(chunks, max_gap):
    assert [tuple(run) for run in coalesce(*chunks, max_gap=max_gap)] == naive_runs(*chunks, max_gap)


@given(chunks_in_shards(), st.sampled_from([1, 60, 10**6]), st.sampled_from([0, 10, 1000]))
def test_units_hold_every_chunk_once_and_stay_in_their_shard(chunks, unit_bytes, max_gap):
    shards, offsets, sizes = chunks
    if not len(shards):
        return
    seen = []
    for unit in units(shards, offsets, sizes, unit_bytes=unit_bytes, max_gap=max_gap):
        assert [run.first for run in unit.runs] + [unit.last] == [unit.first] + [run.last for run in unit.runs]
        assert sizes[unit.first + 1 : unit.last].sum() < unit_bytes
        for before, after in pairwise(unit.runs):  # apart by more than the gap that is bridged, or out of order
            assert not 0 <= after.start - before.stop <= max_gap
        for run in unit.runs:
            assert set(shards[run.first : run.last]) == {unit.shard}
            gaps = offsets[run.first + 1 : run.last] - (offsets + sizes)[run.first : run.last - 1]
            assert ((gaps >= 0) & (gaps <= max_gap)).all()
            for j in range(run.first, run.last):
                assert run.start <= offsets[j]
                assert offsets[j] + sizes[j] <= run.stop
                seen.append(j)
    assert seen == list(range(len(shards)))


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    steps=st.data(),
    portion_bytes=st.integers(1, 200),
    max_shards=st.integers(1, 5),
)
def test_portions_hold_every_chunk_once_and_keep_their_bounds(sizes, steps, portion_bytes, max_shards):
    moves = steps.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    shards = np.cumsum(moves)
    found = portions(shards, np.array(sizes), portion_bytes=portion_bytes, max_shards=max_shards)
    assert [i for first, last in found for i in range(first, last)] == list(range(len(sizes)))
    for first, last in found:
        assert len(set(shards[first:last])) <= max_shards
        assert sum(sizes[first + 1 : last]) < portion_bytes  # all but one chunk fit
    # No smaller than the bounds ask for.
    assert len(found) <= 1 + sum(sizes) // portion_bytes + (len(set(shards)) - 1) // max_shards


def test_portions_are_alike():
    """Not a full one and a crumb, for which another thread would be woken."""
    one_shard = np.zeros(129, np.int64)
    assert portions(one_shard, one_shard + 8, portion_bytes=1024, max_shards=1) == [(0, 64), (64, 129)]
    assert portions(one_shard[:128], one_shard[:128] + 8, portion_bytes=1024, max_shards=1) == [(0, 128)]


def test_no_portions_of_nothing():
    none = np.empty(0, np.int64)
    assert portions(none, none, portion_bytes=1, max_shards=1) == []
