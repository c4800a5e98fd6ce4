"""Stage II, evaluation and pooling where memory is short, batches larger than the data, rows that are not finite."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pipeline_builders import CPU, evaluated, fitted, make_backbone_dir, make_host, make_stage2_cache, run_host

from h2t.cache.reader import open_cache
from h2t.cache.tools import pooled
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.evaluation import scoring
from h2t.pipeline.evaluation.metrics import Answers
from h2t.pipeline.evaluation.scoring import Scores, score_heads, score_stage1
from h2t.pipeline.evaluation.tables import Scored, write_predictions
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.heads import residency, task
from h2t.pipeline.heads.batches import MOST_DRAWN, Streams
from h2t.pipeline.heads.fusion import Selection
from h2t.pipeline.heads.parts import part_sizes, parts_of
from h2t.pipeline.heads.residency import Residency, find_room
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.heads.step_size import StepSize
from h2t.pipeline.heads.stored import load_heads
from h2t.pipeline.networks.trained import load_head
from h2t.pipeline.stages import evaluate, pool

COUNTS = (30, 12, 6)
SHAPE = (64, 4, 4)
GRID = {"ratio": [0.0, 0.3], "seed": list(range(6))}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "b"
    return folder, make_backbone_dir(folder, classes=len(COUNTS))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, backbone):
    return make_stage2_cache(tmp_path_factory.mktemp("small") / "c", counts=COUNTS, shape=SHAPE, backbone=backbone[1])


def spoilt(folder, backbone, value=np.nan, **where):
    """A cache with one value of the first row of `where` (column = value) replaced."""

    def change(maps, rows):
        at = np.all([np.array(rows[k]) == v for k, v in where.items()], 0)
        maps[0][np.flatnonzero(at)[0], 3, 1, 1] = value

    return make_stage2_cache(folder, counts=COUNTS, shape=SHAPE, backbone=backbone, change=change)


@pytest.fixture
def memory(monkeypatch):
    """Sets what is available, in bytes beyond the reserve."""
    monkeypatch.setattr(residency, "return_freed_arrays", lambda: None)

    def available(size):
        monkeypatch.setattr(residency, "available_memory", lambda: size + residency.RESERVE)

    return available


def test_a_stack_shrinks_to_the_memory_there_is_and_gives_the_same_heads(tmp_path, cache, backbone, memory):
    whole = fitted(tmp_path / "whole", cache, backbone[0], pooled=False, grid=GRID)
    memory(4_000_000)
    said = []
    parts = fitted(tmp_path / "parts", cache, backbone[0], pooled=False, grid=GRID, say=said.append)
    assert any("12 classifiers in " in line and " parts, to stay below 1 MB per step" in line for line in said), said
    for key, tensor in whole.items():
        assert float((tensor - parts[key]).abs().max() / tensor.abs().max()) <= 1e-5


def test_windows_shrink_to_the_part_that_trains(tmp_path, cache, backbone, memory):
    """A streamed step of all seeds would exceed the budget for a window; that of a part does not."""
    memory(3_000_000)
    said = []
    streamed = {"residency": "stream"}
    parts = fitted(tmp_path / "p", cache, backbone[0], pooled=False, grid=GRID, say=said.append, residency=streamed)
    assert any("parts" in line for line in said)
    assert any("features streamed" in line for line in said)
    whole = fitted(tmp_path / "whole", cache, backbone[0], pooled=False, grid=GRID, residency={"stack_bytes": 2**30})
    for key, tensor in whole.items():
        assert float((tensor - parts[key]).abs().max() / tensor.abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("available", "grid", "text"),
    [
        (
            200_000,
            {"ratio": [0.0]},
            r"hosts\.dr: training a single classifier needs .*optimiser\.batch_size \(16",
        ),
        (
            500_000,
            {"seed": list(range(2000))},
            r"hosts\.dr\.grid: the weights of 4,000 classifiers need .*grid smaller",
        ),
    ],
)
def test_what_cannot_fit_is_one_line_before_the_first_step(tmp_path, cache, backbone, memory, available, grid, text):
    memory(available)
    with pytest.raises(UserError, match=text):
        fitted(tmp_path / "h", cache, backbone[0], pooled=False, grid=grid)
    assert not (tmp_path / "h").exists()


def test_a_tier_that_was_asked_for_and_cannot_fit_is_one_line(tmp_path, cache, backbone, memory):
    memory(300_000)
    with pytest.raises(UserError, match=r"train_classifier\.residency: memory needs .* set it to auto or stream"):
        fitted(tmp_path / "h", cache, backbone[0], pooled=False, residency={"residency": "memory"})


def test_a_fitted_host_that_cannot_fit_is_one_line(tmp_path, cache, backbone, monkeypatch):
    monkeypatch.setattr(task, "available_memory", lambda: 10_000)
    with pytest.raises(UserError, match="a closed-form fit on 48 samples needs"):
        run_host(tmp_path / "h", cache, backbone[0], host="ncm")


def test_budgets_are_shares_of_what_is_available(memory):
    memory(8_000_000_000)
    room = find_room(Residency(), CPU)
    assert (room.features, room.step) == (4_000_000_000, 2_000_000_000)
    memory(10**12)
    assert find_room(Residency(), CPU).step == 2 * 1024**3
    memory(1_000_000_000)
    room = find_room(Residency(memory_bytes=10**12, stack_bytes=10**12), CPU)
    assert (room.features, room.step) == (750_000_000, 1_000_000_000)


def test_training_resumes_in_the_parts_it_was_begun_in(tmp_path, cache, backbone, memory, monkeypatch):
    """Killed in parts, then continued with more memory: the steps that were saved are not done again."""
    from h2t.pipeline.training import resume as checkpoint

    monkeypatch.setattr(checkpoint.Checkpoint.__init__, "__defaults__", (0.0, 0))
    memory(4_000_000)
    expected = fitted(tmp_path / "whole", cache, backbone[0], pooled=False, grid=GRID)
    offer, saved = checkpoint.Checkpoint.offer, []

    def die(self, steps, *rest):
        offer(self, steps, *rest)
        saved.append(steps)
        if len(saved) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "offer", die)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "h", cache, backbone[0], pooled=False, grid=GRID)
    monkeypatch.setattr(checkpoint.Checkpoint, "offer", offer)
    memory(5_500_000)
    section = make_host(grid=GRID).model_dump(exclude_unset=True)
    summary = run_host(tmp_path / "h", cache, backbone[0], residency={"pooled": False}, **section)
    assert summary.resumed_steps == 10
    found = load_heads(tmp_path / "h").state
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)


def test_parts_cover_all_heads_in_order():
    heads = [HeadSetting(0.1, "instance", "random", s) for s in range(13)]
    assert part_sizes(13) == [13, 7, 5, 4, 3, 2, 1]
    for size in part_sizes(13):
        parts = parts_of(heads, size)
        assert [h for part in parts for h in part] == heads
        assert len({len(p) for p in parts[:-1]}) <= 1
        assert len(parts) == -(-13 // size)


@pytest.mark.parametrize("selection", ["random", "mixup", "shuffled"])
def test_a_step_of_more_heads_seeds_or_donors_needs_more(selection: Selection):
    size = StepSize(batch=8, numbers=100, kept=2, logits=80, parameters=30)
    one = [HeadSetting(0.1, "instance", selection, 0)]
    more = [*one, HeadSetting(0.2, "instance", selection, 0)]
    seeds = [*one, HeadSetting(0.1, "instance", selection, 1)]
    assert size.of(one) < size.of(more) < size.of(seeds)
    assert (size.window(one), size.window(more), size.window(seeds)) == (3200, 3200, 6400)


def test_a_batch_larger_than_the_data_is_not_drawn(cache):
    with open_cache(cache) as opened:
        names = opened.spec.provenance["classes"]

        def batch(size):
            streams = Streams(
                opened.rows, names, "balanced", {"balanced": "balanced", "instance": "instance"}, [0], size
            )
            assert streams.steps == 1
            assert streams.batch_size == sum(COUNTS)
            return streams.batch(0, 0)

        huge, large, plain = batch(10**9), batch(MOST_DRAWN), batch(128)
    for a, b in zip((huge.receivers, huge.donors), (large.receivers, large.donors), strict=True):
        assert np.array_equal(a, b)
    assert plain.receivers.shape == huge.receivers.shape == (1, sum(COUNTS))


def test_training_with_a_huge_batch_ends(tmp_path, cache, backbone):
    fitted(tmp_path / "h", cache, backbone[0], optimiser={"batch_size": 10**9})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"pooled": True}, {"pooled": False}, {"residency": {"residency": "stream"}}])
def test_a_row_that_is_not_finite_is_named_by_training(tmp_path, backbone, value, options):
    folder = spoilt(tmp_path / "c", backbone[1], value, split="train", label=2, statistics="balanced")
    with open_cache(folder) as opened:
        rows = opened.rows
        at = np.flatnonzero((np.array(rows["label"]) == 2) & (np.array(rows["statistics"]) == "balanced"))
        row = next(r for r in at.tolist() if rows["split"][r].as_py() == "train")
        source = rows["source"][row].as_py()
    with pytest.raises(UserError, match=rf"row {row} \({source}\) holds NaN or infinity, and hosts\.dr trains on it"):
        fitted(tmp_path / "h", folder, backbone[0], **options)
    assert not (tmp_path / "h").exists()
    assert not (tmp_path / ".h.training").exists()


def test_a_fitted_host_names_the_row_too(tmp_path, backbone):
    folder = spoilt(tmp_path / "c", backbone[1], split="train", label=2, statistics="instance")
    with pytest.raises(UserError, match=r"row \d+ \(\d+\.png\) holds NaN"):
        run_host(tmp_path / "h", folder, backbone[0], host="ncm")


def test_without_such_a_row_the_learning_rate_is_named(tmp_path, cache, backbone):
    with pytest.raises(UserError, match=r"training diverged.*lower hosts\.dr\.optimiser\.lr"):
        fitted(tmp_path / "h", cache, backbone[0], optimiser={"lr": 1e6, "weight_decay": 1e6, "epochs": 9})


@pytest.mark.parametrize("statistics", ["mixture", "stage1"])
def test_a_row_that_is_not_finite_is_named_by_evaluation(tmp_path, cache, backbone, statistics):
    fitted(tmp_path / "h", cache, backbone[0])
    folder = spoilt(tmp_path / "c", backbone[1], split="test", statistics=statistics)
    with pytest.raises(UserError, match=r"row \d+ \(\d+\.png\) holds NaN or infinity"):
        evaluated(tmp_path / "e", folder, tmp_path / "h", backbone[0])


def test_statistics_that_are_not_finite_are_named():
    data = batchnorm.to_bytes({"balanced": {"bn1.running_mean": torch.tensor([0.0, float("nan")])}})
    with pytest.raises(UserError, match=r"balanced/bn1\.running_mean holds NaN or infinity"):
        batchnorm.from_bytes(data)


@pytest.mark.parametrize("gem", [{}, {"pool": "gem", "pool_options": {"trained": True}}])
def test_evaluation_in_blocks_says_the_same(tmp_path, cache, backbone, monkeypatch, gem):
    fitted(tmp_path / "h", cache, backbone[0], pooled=False, **gem)
    heads, head = load_heads(tmp_path / "h"), load_head(backbone[0])
    with open_cache(cache) as opened:
        whole = score_heads(opened, heads, "test", "mixture", CPU), score_stage1(opened, head, "test", CPU)
        read = []
        monkeypatch.setattr(scoring, "available_memory", lambda: 16_000)
        monkeypatch.setattr(
            opened, "read", lambda rows, *a, _read=opened.read, **k: read.append(len(rows)) or _read(rows, *a, **k)
        )
        parts = score_heads(opened, heads, "test", "mixture", CPU), score_stage1(opened, head, "test", CPU)
    assert max(read) < 9
    for a, b in zip(whole, parts, strict=True):
        for x, y in zip(a.said, b.said, strict=True):
            assert np.array_equal(x.guesses, y.guesses)
            assert np.allclose(x.confidence, y.confidence, atol=1e-6)


def test_evaluation_refuses_before_it_reads_what_would_not_fit(tmp_path, cache, backbone, monkeypatch):
    fitted(tmp_path / "h", cache, backbone[0])
    monkeypatch.setattr(evaluate, "available_memory", lambda: 200 * 10**6)
    with open_cache(cache) as opened:
        monkeypatch.setattr(opened, "read", lambda *_, **__: pytest.fail("read"))
        with pytest.raises(
            UserError, match=r"dr: \d+ classifiers and their predictions for .* rows need 2\d\d MB .* 200 MB are free"
        ):
            evaluate.run(evaluate.Params(), Run("dr", tmp_path / "e"), opened, tmp_path / "h", backbone[0])
    assert not (tmp_path / "e").exists()


def test_evaluation_counts_the_weights_that_every_block_of_rows_needs(tmp_path, cache, backbone, monkeypatch):
    state = fitted(tmp_path / "h", cache, backbone[0])
    with open_cache(cache) as opened:
        scored = [part for part in opened.index.parts if part.split != "train" and part.statistics != "stage1"]
        rows = sum(part.stop - part.start for part in scored)
        need = 24 * rows * len(state["weight"]) + sum(t.nbytes for t in state.values()) + evaluate.ROOM
        monkeypatch.setattr(evaluate, "return_freed_arrays", lambda: None)
        monkeypatch.setattr(evaluate, "available_memory", lambda: need - 1)
        with pytest.raises(UserError, match="need"):
            evaluate.run(evaluate.Params(), Run("dr", tmp_path / "e"), opened, tmp_path / "h", backbone[0])
        monkeypatch.setattr(evaluate, "available_memory", lambda: need)
        evaluate.run(evaluate.Params(), Run("dr", tmp_path / "e"), opened, tmp_path / "h", backbone[0])


def test_predictions_are_written_head_by_head(tmp_path):
    rng = np.random.default_rng(0)
    said = [Answers(rng.integers(0, 9, 20_000).astype(np.int32), rng.random(20_000)) for _ in range(60)]
    result = Scores("mixture", rng.integers(0, 9, 20_000), np.arange(20_000), said)
    scored = Scored([{"number": n} for n in range(60)], {("test", "mixture"): result}, {})
    usual = pa.default_memory_pool()
    arrow = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(arrow)
    try:
        write_predictions(tmp_path, [scored], "mixture", range(60))
    finally:
        pa.set_memory_pool(usual)
    assert arrow.max_memory() < 8e6  # one column of all heads is 9.6 MB
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table["number"].to_pylist() == np.repeat(np.arange(60), 20_000).tolist()
    assert np.array_equal(table["predicted"].to_numpy(), np.concatenate([a.guesses for a in said]))


def test_a_pooled_copy_is_the_same_with_little_memory(tmp_path, cache, monkeypatch):
    with open_cache(cache) as opened:
        pool.run(pool.Params(), Run("b", tmp_path / "a"), opened)
        monkeypatch.setattr(pooled, "available_memory", lambda: 1)
        pool.run(pool.Params(), Run("b", tmp_path / "b"), opened)
    with open_cache(tmp_path / "a") as a, open_cache(tmp_path / "b") as b:
        assert a.commit.files == b.commit.files
