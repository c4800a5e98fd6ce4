"""Tiers: the same batches and values in each, the hot set and its expected hit rate, the choice by budget."""

import os

import numpy as np
import pytest
import torch
from builders import flip
from pipeline_builders import CPU, make_stage2_cache, silent, taken

from h2t.cache.reader import open_cache
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.residency import Choice, Feed, choose_tier, hot_samples
from h2t.pipeline.networks.classifier import global_average

COUNTS = (40, 12, 5, 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = make_stage2_cache(tmp_path_factory.mktemp("stage2") / "c", counts=COUNTS, views=(1, 1, 2, 3), experts=2)
    with open_cache(folder) as opened:
        yield opened


def make_streams(cache, seeds=(0, 1), donors=("instance", "balanced"), batch_size=8) -> Streams:
    names = cache.spec.provenance["classes"]
    return Streams(cache.rows, names, "balanced", {d: d for d in donors}, list(seeds), batch_size)


def make_feed(cache, tier, *, pooled=False, budget=20_000, say=silent, **streams) -> Feed:
    reader = FeatureReader(cache, global_average if pooled else None)
    return Feed(make_streams(cache, **streams), reader, Choice(tier, "test"), budget, CPU, say)


def contents(feed, *where):
    """(epoch, step, batch arrays, features of every row) of each step."""
    for at in feed.steps(*where):
        batch = at.batch
        yield (
            at.epoch,
            at.step,
            batch.receivers,
            batch.donors,
            taken(at.table, batch.receivers),
            taken(at.table, batch.donors),
        )


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("budget", [1, 3_000, 20_000, 10**9])
def test_streaming_gives_what_memory_gives(cache, pooled, budget):
    memory = make_feed(cache, "memory", pooled=pooled)
    streamed = make_feed(cache, "stream", pooled=pooled, budget=budget)
    steps = 0
    for kept, read in zip(contents(memory, 2), contents(streamed, 2), strict=True):
        assert kept[:2] == read[:2]
        for a, b in zip(kept[2:4], read[2:4], strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(kept[4:], read[4:], strict=True):
            assert torch.equal(a, b)
        steps += 1
    assert steps == 2 * memory.streams.steps


def test_features_are_those_of_the_cache(cache):
    feed = make_feed(cache, "stream", seeds=(3,), donors=("instance",))
    for _, _, receivers, donors, x, y in contents(feed, 1):
        for expert in range(2):
            np.testing.assert_array_equal(x[0, expert], cache.read(receivers[0], expert=expert))
            np.testing.assert_array_equal(y[0, 0, expert], cache.read(donors[0, 0], expert=expert))


@pytest.mark.parametrize("tier", ["memory", "stream"])
def test_any_step_can_be_the_first(cache, tier):
    whole = list(contents(make_feed(cache, tier), 2))
    for first in range(len(whole)):
        epoch, step = whole[first][:2]
        rest = list(contents(make_feed(cache, tier), 2, epoch, step))
        assert [r[:2] for r in rest] == [w[:2] for w in whole[first:]]
        assert torch.equal(rest[0][4], whole[first][4])


def test_a_window_reads_each_chunk_once(cache):
    feed = make_feed(cache, "stream", budget=30_000)
    spec = cache.spec
    stored = spec.row_bytes() + 4
    expected = feed.meter.bytes_read  # the hot set
    assert expected == len(feed._hot_rows) * stored * spec.experts
    seen = set()
    for at in feed.steps(1):
        if id(at.table) not in seen:
            seen.add(id(at.table))
            feed_kept = at.table  # keeps the id from being used again
            seen.add(feed_kept)
            expected += len(at.table.rows) * stored * spec.experts
            assert len(np.unique(at.table.rows)) == len(at.table.rows)
            assert not np.isin(at.table.rows, feed._hot_rows).any()
    assert feed.meter.bytes_read == expected
    assert feed.meter.bytes_used == sum(
        (b.receivers.size + b.donors.size) * spec.row_bytes() * spec.experts
        for b in (feed.streams.batch(0, s) for s in range(feed.streams.steps))
    )


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 16, 17, 30, 68, 1000])
def test_hot_set_holds_the_smallest_classes(cache, rows):
    streams = make_streams(cache)
    hot, share = hot_samples(streams, row_bytes=10, budget=10 * rows + 9)
    assert len(hot) <= rows
    first, views = streams.receivers.first, streams.receivers.views
    labels = streams.receivers.labels
    # An independent account: go through the samples of the rarest classes, take each whole sample that still fits.
    expected, chance = [], 0.0
    for label in (3, 2, 1, 0):
        for i in np.flatnonzero(labels == label):
            if len(expected) + views[i] > rows:
                break
            expected += range(first[i], first[i] + views[i])
            chance += 1 / COUNTS[label] / len(COUNTS)
        else:
            continue
        break
    assert sorted(hot.tolist()) == sorted(expected)
    assert share == pytest.approx(chance)


def test_measured_hit_rate_is_the_expected_one(cache):
    feed = make_feed(cache, "stream", seeds=tuple(range(8)), donors=("instance",), budget=70_000)
    for _ in feed.steps(60):
        pass
    assert 0.2 < feed.expected_hit_rate < 0.9
    assert feed.meter.draws == 60 * 8 * sum(COUNTS)
    assert feed.meter.hit_rate == pytest.approx(feed.expected_hit_rate, abs=0.02)


@pytest.mark.parametrize(
    ("wanted", "need", "budget", "free", "tier"),
    [
        ("auto", 10, 100, 0, "memory"),
        ("auto", 10, 100, 10, "device"),
        ("auto", 11, 100, 10, "memory"),
        ("auto", 101, 100, 0, "stream"),
        ("stream", 1, 100, 100, "stream"),
        ("memory", 101, 100, 0, "memory"),
    ],
)
def test_choice_by_budget(wanted, need, budget, free, tier):
    assert choose_tier(wanted, need, budget, free).tier == tier


def test_the_choice_is_said(cache):
    lines = []
    make_feed(cache, "stream", say=lines.append)
    make_feed(cache, "memory", say=lines.append)
    assert "expected hit rate" in lines[0]
    assert lines[1].startswith("features in memory: ")


def test_a_damaged_row_stops_training_at_its_step(tmp_path):
    folder = make_stage2_cache(tmp_path / "c", counts=COUNTS, dtype="float32")
    with open_cache(folder) as opened:
        feed = make_feed(opened, "stream", budget=1, seeds=(0,), donors=("instance",))
        victim = int(feed.streams.batch(0, 3).receivers[0, 0])
        steps = [s for s in range(feed.streams.steps) if victim in feed.streams.batch(0, s).receivers]
        shard, within = divmod(victim, opened.spec.shard_rows)
        path = folder / opened.spec.shard_file(0, shard)
        offset = int(opened.chunk_ranges(np.array([victim]), 0)[1][0])
        before = path.stat()
        flip(path, offset + 1)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # rot leaves no trace; a write would be `replaced`
        done = []
        with pytest.raises(Exception, match=f"chunk {within} .row {victim}.: crc32c"):
            for at in feed.steps(1):
                done.append(at.step)  # noqa: PERF401
        assert done == list(range(steps[0]))
