"""Augmented views: a function of (seed, source, view) alone."""

import pytest
import torch
from image_builders import SMALL, write_image

from h2t.pipeline.data.decoding import decode
from h2t.pipeline.data.images import Images, Transform


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
