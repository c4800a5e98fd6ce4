"""Recomputing rows: the same inputs give the same bits; other images, weights or statistics are found."""

import dataclasses

import pyarrow as pa
import pytest
from pipeline_builders import (
    CPU,
    accepted,
    extracted,
    invoke,
    make_backbone_dir,
    make_prepare,
    make_samples,
    pooled_copy,
    refused,
    write_params,
)

from h2t.cache.reader import open_cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.inspection.recompute import TOLERANCE, recompute


def compared(cache, samples, images, backbone, count=40, seed=0):
    with open_cache(cache) as opened:
        return recompute(opened, samples, images, backbone, count, seed, CPU)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_same_inputs_give_the_same_bits(tmp_path, digits, backbone_dir, dtype):
    extracted(tmp_path / "c", *digits, backbone_dir, dtype=dtype, max_views=2, batchnorm=["stage1", "calibrated"])
    found = compared(tmp_path / "c", *digits, backbone_dir)
    assert (found.rows, found.same_bits, found.worst, found.faults) == (40, 40, 0.0, [])
    assert found.tolerance == TOLERANCE[dtype]


def test_rows_are_random_distinct_and_no_more_than_there_are(digits, backbone_dir, digits_cache):
    class Noting:
        def __init__(self, images):
            self.images, self.asked = images, []

        def prepared_for(self, transform):
            self.images = self.images.prepared_for(transform)
            self.transform = transform
            return self

        def pixels(self, samples, keys):
            self.asked.extend(zip(samples, keys, strict=True))
            return self.images.pixels(samples, keys)

    asked = []
    for seed in (0, 0, 1):
        noting = Noting(digits[1])
        compared(digits_cache, digits[0], noting, backbone_dir, 20, seed)
        asked.append(noting.asked)
    assert asked[0] == asked[1] != asked[2]
    assert any(key is not None for _, key in asked[0] + asked[2])  # augmented views, too


def test_maps_that_are_not_this_backbones_are_found(tmp_path, digits, backbone_dir, monkeypatch):
    """As if batch norm had run in train mode during extraction: sound checksums, wrong values."""
    from h2t.pipeline.extraction import forward

    original = forward.guarded_maps
    monkeypatch.setattr(forward, "guarded_maps", lambda *a: [m * 1.01 for m in original(*a)])
    extracted(tmp_path / "c", *digits, backbone_dir)
    found = compared(tmp_path / "c", *digits, backbone_dir, 10)
    assert len(found.faults) == 10
    assert "recomputed values are off by 0.0099" in found.faults[0]


def test_changed_and_missing_images_are_named(digits, backbone_dir, digits_cache):
    samples, images = digits
    table = samples.table
    digests = ["0" * 64, *table["digest"].to_pylist()[1:]]
    changed = table.set_column(table.column_names.index("digest"), "digest", pa.array(digests))
    found = compared(digits_cache, Samples(changed, samples.facts), images, backbone_dir, 10_000)
    named = {fault.split(",")[0].split("(")[1] for fault in found.faults}
    assert named == {f"{table['split'][0]} {table['source'][0]}"}
    assert "its image has changed" in found.faults[0]
    gone = compared(digits_cache, Samples(table.slice(1), samples.facts), images, backbone_dir, 10_000)
    assert len(gone.faults) == len(found.faults)
    assert "not among the samples" in gone.faults[0]


def test_inputs_of_another_cache_are_refused(tmp_path, digits, backbone_dir, digits_cache):
    samples, images = digits
    make_backbone_dir(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another backbone"):
        compared(digits_cache, samples, images, tmp_path / "other")
    facts = {**samples.facts, "transform": {**samples.facts["transform"], "flip": True}}
    with pytest.raises(UserError, match="another transform"):
        compared(digits_cache, dataclasses.replace(samples, facts=facts), images, backbone_dir)
    pooled_copy(tmp_path / "copy", digits_cache)
    with pytest.raises(UserError, match="pooled copy"):
        compared(tmp_path / "copy", samples, images, backbone_dir)


def test_command(tmp_path, backbone_dir):
    samples, images = make_samples(tmp_path / "samples")
    extracted(tmp_path / "c", samples, images, backbone_dir)
    params = write_params(tmp_path / "params.yaml", prepare=make_prepare().model_dump())
    given = ["--samples", str(tmp_path / "samples"), "--params", str(params), "--device", "cpu"]
    ask = ["cache", "verify", str(tmp_path / "c"), "--recompute", "5", *given]
    done = accepted(*ask, "--backbone", backbone_dir)
    assert "recomputed 5 rows: 5 bit for bit equal, 0 faults" in done
    assert invoke(*ask).exit_code == 2
    make_backbone_dir(tmp_path / "other", seed=1)
    line = refused(*ask, "--backbone", str(tmp_path / "other"), code=1)
    assert "another backbone" in line
