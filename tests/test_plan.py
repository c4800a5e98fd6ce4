"""`h2t plan`: what is measured on a few images is scaled to many, and what breaks first is told."""

import json
from dataclasses import replace

import pytest
import torch
from pipeline_builders import refused, write_params

from h2t.cache.format.spec import MAX_RECORD_BYTES, CacheSpec
from h2t.pipeline.command_line.plan import _entry
from h2t.pipeline.project import rehearsal
from h2t.pipeline.project.plan import Machine, limits, plan, shown
from h2t.pipeline.project.rehearsal import Cost, Rehearsal, line, rehearse
from h2t.pipeline.stages import extract
from h2t.pipeline.stages.train_backbone import Params as Entry


def spec_of(images, channels, side, dtype, shard_rows):
    return CacheSpec(
        rows=2 * images,
        maps=((channels, side, side),),
        dtype=dtype,
        codec="none",
        chunk_rows=1,
        shard_rows=shard_rows,
        fingerprint_inputs={},
    )


COSTS = {"extract": Cost(5, 0.01), "verify": Cost(1, 0.001), "pool": Cost(2, 0.002), "step": Cost(0, 0.004)}
KNOWN = Rehearsal(
    100, spec_of(100, 2048, 7, "float16", 668), spec_of(100, 2048, 1, "float32", 8192), 41.0, COSTS, extract.Params()
)
HERE = Machine(memory=8 * 10**9, disk=10**12)


def test_a_plan_scales_what_was_measured():
    found = plan(1_000_000, 4, KNOWN, HERE)
    assert found["rows"] == 2_000_000
    assert found["bytes"]["maps"] == 2_000_000 * 2048 * 49 * 2
    assert found["bytes"]["pooled"] == 2_000_000 * 2048 * 4
    assert found["files"]["maps"] == -(-2_000_000 // 668) + 6
    assert found["seconds"] == {"extract": 5 + 2500, "verify": 1 + 250, "pool": 2 + 500}
    assert found["epoch"]["steps"] == -(-900_000 // 128)
    assert found["epoch"]["seconds"] == pytest.approx(found["epoch"]["steps"] * 0.004)
    assert found["epoch"]["bytes_maps"] == 2 * 900_000 * 2048 * 49 * 2


def test_shards_that_are_left_to_us_grow_with_the_cache_and_others_stay():
    def files(images, **settings):
        return plan(images, 1, replace(KNOWN, params=extract.Params(**settings)), HERE)["files"]["maps"]

    assert files(10**6) == files(10**6, shard_bytes=2**27) == -(-2 * 10**6 // 668) + 6
    assert files(10**7) == -(-2 * 10**7 // 2674) + 6  # 512 MiB, 4.0 TB
    assert files(10**7, shard_bytes=2**27) == -(-2 * 10**7 // 668) + 6


def test_limits_come_in_their_order_and_hold_at_their_number():
    found = {limit.what: limit.images for limit in limits(KNOWN, HERE)}
    assert list(found.values()) == sorted(found.values())
    assert found["the disk is full"] == 10**12 // (2 * 2048 * 49 * 2)
    at = next(images for what, images in found.items() if "cache.json" in what)
    record = plan(at, 1, KNOWN, HERE)["bytes"]["record"]
    assert record == pytest.approx(MAX_RECORD_BYTES, rel=0.01)
    text = "\n".join(shown(plan(10**7, 4, KNOWN, HERE)))
    assert "breaks       from 2.49 million images: the disk is full" in text
    assert text.count("breaks next") == 1


def test_the_line_through_two_times():
    assert line((10, 30), (3.0, 5.0)) == Cost(2.0, 0.1)
    assert line((10, 30), (0.5, 3.0)) == Cost(0.0, 0.1)  # noise: no cost is negative, so each image counts in full
    assert line((10, 30), (4.0, 3.0)) == Cost(0.0, 0.1)


@pytest.mark.timeout(300)
def test_a_rehearsal_measures_each_stage(tmp_path):
    params = extract.Params(batchnorm=["stage1"], batch_size=8)
    known = rehearse(tmp_path, Entry(arch="resnet20"), params, torch.device("cpu"), seconds=0.01, filled=2**20)
    assert set(known.costs) == {"extract", "verify", "pool", "step"}
    assert all(cost.each > 0 and cost.once >= 0 for cost in known.costs.values())
    assert known.spec.rows == known.images
    assert known.spec.maps == ((64, 8, 8),)
    assert known.pooled.maps == ((64, 1, 1),)
    twice = plan(2 * known.images, 1, known, HERE)
    assert twice["bytes"]["maps"] == replace(known.spec, rows=2 * known.images).value_bytes
    assert json.loads(json.dumps(twice)) == twice


def test_small_maps_are_not_repeated_without_end(tmp_path, monkeypatch):
    """A row of one pixel has 256 bytes: to fill what larger maps fill would take minutes."""
    monkeypatch.setattr(rehearsal, "MOST_FILLED", 2_000)
    params, entry = extract.Params(batchnorm=["stage1"], batch_size=8), Entry(arch="resnet20", input={"size": 1})
    known = rehearse(tmp_path, entry, params, torch.device("cpu"), seconds=0.01, filled=2**20)
    assert known.spec.maps == ((64, 1, 1),)
    sizes = {int(path.name.split("-")[1]) for path in tmp_path.glob("filled-*")}
    assert sizes == {250, 2_000}


def test_the_network_gets_images_of_the_size_of_its_dataset(tmp_path):
    params = write_params(tmp_path / "params.yaml")
    assert _entry("ce_mixup", params, None)[0].input.size == 8  # digits
    assert _entry("ce_mixup", params, 64)[0].input.size == 64
    assert _entry("resnet50", params, None)[0].input.size == 224  # a plug-in that no entry names
    assert _entry("resnet50", tmp_path / "none.yaml", 320)[0].input.size == 320


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images", "0", "--backbone", "resnet20"], "0 is not in the range x>=1"),
        (["--images", "9", "--backbone", "resnet21"], "--backbone: must be an entry of params.yaml or a plug-in"),
        (["--images", "9", "--backbone", "resnet20", "--size", "16385"], "16385 is not in the range 1<=x<=16384"),
        (["--images", "9", "--backbone", "resnet20", "--place", "nowhere"], "--place: must be a folder; got nowhere"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused("plan", *arguments)


@pytest.mark.timeout(900)
def test_benchmarks_of_plans_and_of_row_tables(tmp_path, capsys, starts_warm):
    from benchmarks import bench_plan, bench_rows

    for module, promise in ((bench_plan, "largest_difference"), (bench_rows, "peak_bytes")):
        module.main(["--tiny", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "result.json")])
        text = (tmp_path / "result.json").read_text()
        assert promise in json.loads(text)["promises"]
        assert str(tmp_path) not in text
    assert list((tmp_path / "data").iterdir()) == []
    assert "| verify" in capsys.readouterr().out
