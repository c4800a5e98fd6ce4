import itertools
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import raises, tree
from kills import finish, kill_and_restart
from pipeline_builders import environment, extracted, make_backbone_dir, make_extract, make_samples, write_params

from h2t.cache.errors import CacheError
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.extraction.batchnorm import from_bytes, use
from h2t.pipeline.networks.trained import load_backbone
from h2t.pipeline.networks.weights import load_weights, save_weights
from h2t.pipeline.stages import extract
from h2t.pipeline.stages.extract import planned_rows, views_per_class

pytestmark = pytest.mark.slow
ENDS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def values_of(path: Path) -> dict[tuple, bytes]:
    """(split, statistics, source, view) -> the row's bytes."""
    with open_cache(path) as cache:
        maps = cache.read(np.arange(cache.spec.rows))
        keys = zip(*(cache.rows[k].to_pylist() for k in ("split", "statistics", "source", "view")), strict=True)
        return {key: maps[i].tobytes() for i, key in enumerate(keys)}


# --- what is stored


@pytest.mark.parametrize(
    ("counts", "most", "target", "expected"),
    [
        ([1], 8, 1.0, [1]),
        ([10, 10], 8, 1.0, [1, 1]),
        ([100, 10, 1], 8, 1.0, [1, 4, 8]),  # mean 37: ceil(0.37), ceil(3.7), min(8, 37)
        ([100, 10, 1], 1, 1.0, [1, 1, 1]),
        ([100, 10, 1], 100, 0.1, [1, 1, 4]),
        ([100, 10, 1], 100, 3.0, [2, 12, 100]),
    ],
)
def test_views_per_class(counts, most, target, expected):
    assert views_per_class(counts, most, target) == expected


def test_rows_are_those_of_the_recipes_and_evaluation_rows_have_view_0(digits):
    samples, _ = digits
    table = planned_rows(make_extract(batchnorm=["branchwise"], max_views=3), samples).table().to_pylist()
    views = views_per_class(samples.counts, 3, 1.0)
    for split, statistics in (
        ("train", ["balanced", "instance"]),
        ("val", ["balanced", "mixture", "stage1"]),
        ("test", ["balanced", "mixture", "stage1"]),
    ):
        part = [r for r in table if r["split"] == split]
        for sample in samples.of(split):
            label = int(samples.labels[sample])
            wanted = [(s, v) for s in statistics for v in range(views[label] if split == "train" else 1)]
            found = sorted((r["statistics"], r["view"]) for r in part if r["sample"] == sample)
            assert found == sorted(wanted)
    assert max(views) > 1


def test_stored_maps_are_the_backbones_under_each_rows_statistics(digits, backbone_dir, digits_cache):
    """One image at a time, padded like extraction pads: the same bits."""
    _, images = digits
    backbone = load_backbone(backbone_dir)[0]
    with open_cache(digits_cache) as cache, torch.no_grad():
        statistics = from_bytes(cache.statistics)
        rows = cache.rows.to_pylist()
        for row in range(0, len(rows), 37):
            entry = rows[row]
            key = None if entry["view"] == 0 else (0, entry["view"])
            x = images.batch([entry["sample"]], [key]).expand(32, -1, -1, -1)
            use(backbone, statistics[entry["statistics"]])
            assert np.array_equal(cache.read([row])[0], backbone(x)[0][0].numpy())
            assert entry["digest"] == _digest(images, entry["source"])


def _digest(images, source):
    import hashlib

    return hashlib.sha256(images._read(source)).hexdigest()


def test_a_network_that_changes_its_weights_while_it_runs_is_refused(digits, backbone_dir, tmp_path):
    samples, images = digits

    def drift(module, given, result):
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.mul_(1.001)

    hook = torch.nn.modules.module.register_module_forward_hook(drift)
    try:
        with pytest.raises(UserError, match="the backbone's weights must not change during extraction"):
            extract.run(make_extract(), Run("b", tmp_path / "c"), samples, images, backbone_dir)
    finally:
        hook.remove()
    assert not (tmp_path / "c").exists()


def test_views_differ_and_view_0_is_the_evaluation_transform(digits_cache):
    values = values_of(digits_cache)
    second = [k for k in values if k[3] == 1]
    assert len(second) > 20
    # a shift by up to one pixel is no shift once in nine
    assert np.mean([values[k] != values[(*k[:3], 0)] for k in second]) > 0.7


def test_a_row_hangs_on_no_neighbour_and_no_shard_size(tmp_path, digits, backbone_dir, digits_cache):
    expected = values_of(digits_cache)
    for number, layout in enumerate(({"shard_bytes": 30_000, "chunk_rows": 3}, {"shard_bytes": 500_000})):
        extracted(tmp_path / str(number), *digits, backbone_dir, max_views=2, **layout)
        assert values_of(tmp_path / str(number)) == expected


def test_a_row_hangs_on_no_other_image(tmp_path, backbone_dir):
    """Half of the images gone: every row that is left has the same bytes."""
    many = make_samples(tmp_path / "many", validation_per_class=0)
    few = make_samples(tmp_path / "few", validation_per_class=0, imbalance={"profile": "exponential", "ratio": 60.0})
    options = {"batchnorm": ["stage1"], "max_views": 3, "view_target": 100.0}
    extracted(tmp_path / "a", *many, backbone_dir, **options)
    extracted(tmp_path / "b", *few, backbone_dir, **options)
    large, small = values_of(tmp_path / "a"), values_of(tmp_path / "b")
    assert len(small) < len(large)
    assert all(large[key] == value for key, value in small.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_dtypes_are_the_rounded_maps(tmp_path, digits, backbone_dir, digits_cache, dtype):
    extracted(tmp_path / "c", *digits, backbone_dir, max_views=2, dtype=dtype)
    with open_cache(digits_cache) as exact, open_cache(tmp_path / "c") as rounded:
        at = np.arange(exact.spec.rows)
        expected = torch.from_numpy(exact.read(at)).to(getattr(torch, dtype))
        found = rounded.read(at)
        bits = expected.view(torch.uint16).numpy() if dtype == "bfloat16" else expected.numpy()
        assert np.array_equal(found, bits)


def test_every_expert_has_its_own_array(tmp_path, digits):
    make_backbone_dir(tmp_path / "b", experts=3)
    extracted(tmp_path / "c", *digits, tmp_path / "b", batchnorm=["stage1"])
    with open_cache(tmp_path / "c") as cache:
        assert cache.experts == 3
        maps = [cache.read([5], expert=e) for e in range(3)]
    assert not np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[1], maps[2])


def test_an_extraction_repeats_to_the_byte_and_says_nothing_of_time_or_place(
    tmp_path, digits, backbone_dir, plain_cache
):
    extracted(tmp_path / "c", *digits, backbone_dir)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    again = tree(tmp_path / "c")
    assert again == tree(plain_cache)
    assert str(tmp_path).encode() not in b"".join(again.values())


def test_the_written_cache_is_sound(digits_cache):
    assert verify(str(digits_cache)) == []


def test_batches_span_shards(tmp_path, digits, backbone_dir):
    """Only the last batch of rows with the same statistics is filled up, however few rows a shard has."""
    few = extracted(tmp_path / "few", *digits, backbone_dir, chunk_rows=1, shard_bytes=16384)
    many = extracted(tmp_path / "many", *digits, backbone_dir)
    assert few.shards > 20 * many.shards
    with open_cache(tmp_path / "few") as cache:
        names = cache.rows["statistics"].to_pylist()
    batches = sum(-(-len(list(part)) // 32) for _, part in itertools.groupby(names))
    assert few.forward_images == many.forward_images == 32 * batches
    assert values_of(tmp_path / "few") == values_of(tmp_path / "many")


# --- what is there already


def test_the_same_cache_is_not_written_again(tmp_path, digits, backbone_dir):
    out, said = tmp_path / "c", []
    first = extracted(out, *digits, backbone_dir)
    assert first.forward_images >= first.forwarded == first.rows  # batches are filled up
    assert first.forward_images % make_extract().batch_size == 0
    assert first.forward_seconds > 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    summary = extracted(out, *digits, backbone_dir, say=said.append)
    assert summary.forwarded == summary.forward_images == 0
    assert summary.fingerprint == first.fingerprint
    assert "nothing to do" in said[0]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


OTHERS = {
    "dtype": {"dtype": "float16"},
    "codec": {"codec": "zstd"},
    "chunks": {"chunk_rows": 5},
    "views": {"max_views": 2},
    "recipes": {"batchnorm": ["stage1", "calibrated"]},
}


STAGE1 = {"batchnorm": ["stage1"]}


@pytest.fixture(scope="module")
def stage1_cache(tmp_path_factory, few_digits, backbone_dir):
    out = tmp_path_factory.mktemp("stage1") / "c"
    extracted(out, *few_digits, backbone_dir, **STAGE1)
    return out


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_cache_is_refused_and_left_alone_unless_replaced(
    tmp_path, few_digits, backbone_dir, stage1_cache, change
):
    out, given = Path(shutil.copytree(stage1_cache, tmp_path / "c")), {**STAGE1, **change}
    with raises("exists") as error:
        extracted(out, *few_digits, backbone_dir, **given)
    assert "--replace" in str(error.value)
    assert tree(out) == tree(stage1_cache)
    extracted(out, *few_digits, backbone_dir, replace=True, **given)
    extracted(tmp_path / "fresh", *few_digits, backbone_dir, **given)
    assert tree(out) == tree(tmp_path / "fresh")


def test_another_backbone_or_another_image_is_another_cache(tmp_path, digits, backbone_dir, plain_cache):
    out = Path(shutil.copytree(plain_cache, tmp_path / "c"))
    make_backbone_dir(tmp_path / "other", seed=1)
    with pytest.raises(CacheError, match="another cache"):
        extracted(out, *digits, tmp_path / "other")
    fewer = make_samples(tmp_path / "samples", test_per_class=49)
    with pytest.raises(CacheError, match="another cache"):
        extracted(out, *fewer, backbone_dir)


def test_a_full_disk_is_seen_beforehand(tmp_path, monkeypatch, digits, backbone_dir):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with raises("full") as error:
        extracted(tmp_path / "c", *digits, backbone_dir)
    assert " more, or use a codec" in str(error.value)
    assert not (tmp_path / "c").exists()


# --- bad networks


def spoilt_backbone(folder: Path, change) -> Path:
    make_backbone_dir(folder)
    state, about = load_weights(folder / "backbone.safetensors")
    change(state)
    save_weights(folder / "backbone.safetensors", state, about)
    return folder


def nothing_published(folder: Path) -> bool:
    return not (folder / "c").exists()


def test_nan_weights_are_refused(tmp_path, digits):
    backbone = spoilt_backbone(tmp_path / "b", lambda s: s["conv1.weight"].view(-1).__setitem__(0, float("nan")))
    with pytest.raises(UserError, match=r"conv1\.weight holds NaN or infinity; use other weights$"):
        extracted(tmp_path / "c", *digits, backbone)
    assert nothing_published(tmp_path)


def test_maps_that_are_not_finite_are_refused(tmp_path, digits):
    backbone = spoilt_backbone(tmp_path / "b", lambda s: s["layer3.2.bn2.weight"].fill_(3e38))
    with pytest.raises(UserError, match=r"^extract: maps must be finite; got NaN or infinity"):
        extracted(tmp_path / "c", *digits, backbone, batchnorm=["stage1"])
    assert nothing_published(tmp_path)


def test_what_float16_cannot_hold_is_refused_and_float32_takes_it(tmp_path, digits):
    backbone = spoilt_backbone(tmp_path / "b", lambda s: s["layer3.2.bn2.weight"].fill_(1e5))
    with pytest.raises(UserError, match=r"^extract\.dtype: float16 holds values up to 65504; got \d+; use bfloat16"):
        extracted(tmp_path / "c", *digits, backbone, batchnorm=["stage1"], dtype="float16")
    assert nothing_published(tmp_path)
    extracted(tmp_path / "c", *digits, backbone, batchnorm=["stage1"], dtype="float32")
    with open_cache(tmp_path / "c") as cache:
        assert cache.read(np.arange(cache.spec.rows)).max() > 65504


# --- kills


@pytest.mark.timeout(900)
def test_an_extraction_that_is_ended_resumes_to_the_same_bytes(tmp_path, warm_h2t):
    """By SIGKILL, Ctrl-C or SIGTERM; where it can still speak, without a traceback: Ctrl-C is no error of ours."""
    make_samples(tmp_path / "samples", test_per_class=40, validation_per_class=14)
    make_backbone_dir(tmp_path / "backbone")
    options = {"extract__batchnorm_passes": 2, "extract__chunk_rows": 32, "extract__shard_bytes": 16384}
    params = write_params(tmp_path / "params.yaml", **options)
    whole, out, env = tmp_path / "whole/b", tmp_path / "killed/b", environment()
    command = [
        warm_h2t,
        "extract",
        "b",
        tmp_path / "samples",
        tmp_path / "backbone",
        "--params",
        params,
        "--device",
        "cpu",
    ]
    finish([*command, whole], env, tmp_path)
    with open_cache(whole) as cache:
        shards = cache.spec.shards
    assert shards >= 12
    kill_and_restart([*command, out], env, tmp_path, out, kills=6, shards=shards, seed=0, how=ENDS)
    assert tree(out) == tree(whole)
    assert [p.name for p in out.parent.iterdir()] == ["b"]
