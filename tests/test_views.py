"""Augmented views: a function of (seed, source, view) alone."""

import pytest
import torch
from image_builders import SMALL, write_image

from h2t.pipeline.data.decoding import decode
from h2t.pipeline.data.images import Images, Transform
from h2t.pipeline.data.resident_images import ResidentImages, resident


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


CROPS = {"area": None, "jitter": 0.0, "padding": 4}


def cropped(folder, sources, **change):
    images = make_images(folder, sources)
    return images.prepared_for(images.transform.model_copy(update=CROPS | change))


def test_views_on_a_gpu_are_those_of_the_processor(folder):
    """The arithmetic of ResidentImages, here on the CPU."""
    images = cropped(folder, [f"{i}.jpg" for i in range(4)])
    kept = resident(images, [0, 1, 3], torch.device("cpu"), room=10**6)
    assert isinstance(kept, ResidentImages)
    samples, keys = [3, 0, 1, 3, 1, 0] * 4, [(0, "stage1", i) for i in range(24)]
    assert torch.equal(kept.batch(samples, keys), images.batch(samples, keys))
    assert not kept._crops  # drawn for these samples alone, not for all rows
    for view in [(0, "stage1", 5)] * 2 + [(1, "stage1", 6)]:
        assert torch.equal(kept.batch(samples, [view] * 24), images.batch(samples, [view] * 24))


def test_images_that_a_gpu_cannot_crop_stay_with_the_processor(folder, tmp_path):
    sources = [f"{i}.jpg" for i in range(4)]
    write_image(tmp_path / "wide.jpg", size=(40, 60))
    write_image(tmp_path / "square.jpg", size=(40, 40))
    for images, room in (
        (cropped(folder, sources), 1000),
        (cropped(folder, sources).turned(10), 10**6),
        (cropped(folder, sources, jitter=0.4), 10**6),
        (cropped(folder, sources, area=[0.5, 1.0]), 10**6),
        (cropped(tmp_path, ["square.jpg", "wide.jpg"]), 10**6),
    ):
        assert resident(images, [0, 1], torch.device("cpu"), room) is images
