"""Augmented views: a function of (seed, source, view) alone."""

import numpy as np
import pytest
import torch
from image_builders import SMALL, make_imagenet_lt, write_image
from pipeline_builders import extracted, make_backbone_dir

from h2t.cache.reader import open_cache
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.images import Images, Transform, decode
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.stages import prepare
from h2t.pipeline.stages.extract import views_per_class


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(4):
        write_image(root / f"{i}.jpg", i)
    return root


def make_images(folder, sources, threads=2):
    images = Images(sources, None, lambda s: (folder / s).read_bytes(), decode, Transform(**SMALL))
    images._threads._max_workers = threads
    return images


def test_views_of_the_papers_sets():
    # V_j = min(max_views, ceil(target N / (C n_j)))
    cifar = [500, 100, 25, 5]
    assert views_per_class(cifar, 8, 1.0) == [1, 2, 7, 8]  # mean 157.5
    assert views_per_class(cifar, 1000, 2.0) == [1, 4, 13, 63]


def test_a_view_depends_on_seed_source_and_view_only(folder):
    few, many = make_images(folder, ["2.jpg"]), make_images(folder, ["0.jpg", "3.jpg", "2.jpg", "1.jpg"], threads=1)
    one = few.batch([0], [(0, 1)])
    assert torch.equal(many.batch([0, 2, 1], [(0, 1)] * 3)[1:2], one)
    assert torch.equal(many.batch([2, 2], [(0, 2), (0, 1)])[1:], one)
    for other in ((0, 2), (1, 1), None):
        assert not torch.equal(few.batch([0], [other]), one)


def test_views_differ_from_each_other_and_between_images(folder):
    images = make_images(folder, [f"{i}.jpg" for i in range(4)])
    views = images.batch([0] * 8, [(0, v) for v in range(8)])
    assert len({v.numpy().tobytes() for v in views}) == 8


def values(path):
    """(source, view, statistics) -> the row's maps."""
    with open_cache(path) as cache:
        maps = cache.read(np.arange(cache.spec.rows))
        keys = zip(*(cache.rows[k].to_pylist() for k in ("source", "view", "statistics")), strict=True)
        return {key: maps[i].copy() for i, key in enumerate(keys)}


def test_an_image_more_changes_no_other_row(tmp_path):
    make_backbone_dir(tmp_path / "backbone", classes=3)
    found = []
    for name, counts in (("before", (3, 6, 2)), ("after", (3, 7, 2))):
        section = prepare.Params(dataset="imagenet_lt", options=make_imagenet_lt(tmp_path / name, counts=counts))
        for path in (tmp_path / name).rglob("*.JPEG"):  # the same pixels under the same name
            write_image(path, sum(path.name.encode()))
        prepare.run(section, Run("prepare", tmp_path / f"p-{name}"))
        samples = load_samples(tmp_path / f"p-{name}")
        images = samples.images(section.model_dump())
        out = tmp_path / f"cache-{name}"
        extracted(out, samples, images, tmp_path / "backbone", batchnorm=["stage1"], max_views=3, view_target=2.0)
        found.append(values(out))
    before, after = found
    assert len(after) > len(before)
    for key, maps in before.items():
        assert np.array_equal(after[key], maps), key
