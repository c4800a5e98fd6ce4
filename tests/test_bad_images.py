"""Images that cannot be used: refused by default, or left out and recorded; and what the odd modes become."""

import io
import os
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_builders import encoded, make_imagenet_lt, write_image
from PIL import Image

from h2t.features import as_file
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data import images
from h2t.pipeline.data.decoding import decode, properties
from h2t.pipeline.data.images import BadImage
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.stages import prepare


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])  # a tail of the pixels; a cut header is `text`


def bomb(path):
    """A PNG that says it has 60,000 x 60,000 pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


FAULTS = {
    "truncated": (truncate, "cannot be decoded (image file is truncated"),
    "empty": (lambda p: p.write_bytes(b""), "is empty, 0 bytes"),
    "text": (lambda p: p.write_text("<html>404</html>"), "is in no known image format"),
    "missing": (lambda p: p.unlink(), "is missing"),
    "huge": (bomb, "has more than 89478485 pixels"),
    "pipe": (pipe, "cannot be read (not a plain file)"),
    "floats": (lambda p: p.write_bytes(encoded(Image.new("F", (40, 40)), "TIFF")), "has floating-point"),
    "strip": (lambda p: p.write_bytes(encoded(Image.new("L", (99999, 1)), "PNG")), "99999x1 pixels are too long"),
}
VICTIM = "train/n01443537/n01443537_2.JPEG"


@pytest.fixture
def broken(tmp_path, request):
    """(dataset options, the reason expected) of a miniature ImageNet-LT with one bad training image."""
    options = make_imagenet_lt(tmp_path / "images")
    damage, reason = FAULTS[request.param]
    damage(tmp_path / "images" / VICTIM)
    return options, reason


def params(options: dict, **more) -> prepare.Params:
    return prepare.Params(dataset="imagenet_lt", options=options, **more)


@pytest.mark.parametrize("broken", FAULTS, indirect=True)
@pytest.mark.timeout(60)
def test_a_bad_image_is_refused_in_one_line(broken, tmp_path):
    options, reason = broken
    with pytest.raises(UserError) as caught:
        prepare.run(params(options), Run("prepare", tmp_path / "p"))
    text = str(caught.value)
    assert text.startswith(f"image '{VICTIM}': {reason}"), text
    assert text.endswith("or leave out bad images with prepare.bad_images=skip")
    assert "\n" not in text
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("broken", FAULTS, indirect=True)
@pytest.mark.timeout(60)
def test_a_bad_image_is_skipped_and_recorded(broken, tmp_path):
    options, reason = broken
    said = []
    prepare.run(params(options, bad_images="skip"), Run("prepare", tmp_path / "p", say=said.append))
    samples = load_samples(tmp_path / "p")
    sources = samples.table["source"].to_pylist()
    assert VICTIM not in sources
    assert len(sources) == 11 + 3 + 6 - 1
    assert samples.table["sample"].to_pylist() == list(range(len(sources)))  # no holes
    assert samples.counts == [5, 3, 2]
    (skipped,) = pq.read_table(tmp_path / "p/skipped.parquet").to_pylist()
    assert (skipped["split"], skipped["source"]) == ("train", VICTIM)
    assert skipped["reason"].startswith(reason)
    assert " at 0x" not in skipped["reason"]  # no address in memory: the file is a function of the input
    assert sum("1 bad image left out" in line for line in said) == 1


def test_skipping_nothing_changes_no_sample(tmp_path):
    options = make_imagenet_lt(tmp_path / "images")
    for policy in ("refuse", "skip"):
        prepare.run(params(options, bad_images=policy), Run("prepare", tmp_path / policy))
    for name in ("samples.parquet", "classes.json"):
        assert (tmp_path / "refuse" / name).read_bytes() == (tmp_path / "skip" / name).read_bytes()
    assert len(pq.read_table(tmp_path / "skip/skipped.parquet")) == 0
    assert not (tmp_path / "refuse/skipped.parquet").exists()


def test_a_class_left_without_training_images_is_an_error(tmp_path):
    options = make_imagenet_lt(tmp_path / "images")
    for path in (tmp_path / "images/train/n01484850").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"class n01484850: must have at least one usable training image"):
        prepare.run(params(options, bad_images="skip"), Run("prepare", tmp_path / "p"))


def test_skipping_can_change_the_order_of_classes(tmp_path):
    options = make_imagenet_lt(tmp_path / "images", counts=(3, 4))
    for i in range(2):
        (tmp_path / f"images/train/n01443537/n01443537_{i}.JPEG").write_bytes(b"")
    prepare.run(params(options, bad_images="skip"), Run("prepare", tmp_path / "p"))
    samples = load_samples(tmp_path / "p")
    assert (samples.counts, samples.facts["order"]) == ([3, 2], [0, 1])


def test_an_image_that_turns_bad_later_stops_the_run_in_one_line(tmp_path):
    options = make_imagenet_lt(tmp_path / "images")
    section = params(options)
    prepare.run(section, Run("prepare", tmp_path / "p"))
    samples = load_samples(tmp_path / "p")
    truncate(tmp_path / "images" / VICTIM)
    found = samples.images(section.model_dump())
    number = samples.table["source"].to_pylist().index(VICTIM)
    with pytest.raises(UserError, match=f"image '{VICTIM}': has changed since it was prepared"):
        found.batch([0, number], [None, None])


def test_an_image_smaller_than_the_crop_needs_resize(tmp_path):
    path = write_image(tmp_path / "a.jpg", size=(20, 40))
    transform = images.Transform(size=32, mean=[0.5] * 3, std=[0.5] * 3)
    held = images.Images(["a"], None, lambda _: path.read_bytes(), decode, transform)
    with pytest.raises(BadImage, match=r"20x40 pixels are less than transform\.size 32"):
        held.array(0)


# --- rules of decoding


def test_16_bits_keep_the_high_byte():
    ramp = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    for data in (encoded(Image.fromarray(ramp), "PNG"), encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF")):
        assert decode(data)[..., 0].tolist() == [[0, 0, 1], [128, 254, 255]]
        assert (decode(data) == decode(data)[..., :1]).all()


def test_whole_numbers_beyond_16_bits_are_refused():
    deep = Image.fromarray(np.array([[-5, 300, 70000]], np.int32))
    with pytest.raises(ValueError, match=r"values from -5 to 70000, not 0 to 65535; set prepare\.options\.transform"):
        decode(encoded(deep, "TIFF"))
    assert decode(encoded(deep, "TIFF"), levels=[0, 70000])[0, :, 0].tolist() == [0, 1, 255]


def test_an_image_of_pillow_is_decoded_as_its_file_is():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("TIFF", "PNG", "JPEG"):
        data = encoded(Image.fromarray(pixels), kind, exif=exif)
        held = as_file(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode(held, exif=True), decode(data, exif=True))
    for mode, through in (("HSV", "RGB"), ("RGBa", "RGBA"), ("La", "LA")):  # modes that no file holds
        picture = Image.fromarray(pixels).convert(through).convert(mode)
        expected = np.asarray(picture.convert(through).convert("RGB"))
        np.testing.assert_array_equal(decode(as_file(picture), exif=True), expected, err_msg=mode)


def test_grey_and_binary_are_repeated():
    grey = Image.fromarray(np.array([[0, 100, 200]], np.uint8))
    assert decode(encoded(grey, "PNG")).tolist() == [[[0] * 3, [100] * 3, [200] * 3]]
    assert decode(encoded(grey.point(lambda v: v > 50, "1"), "PNG")).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]


def test_a_palette_is_looked_up():
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 8, 7, 200, 100, 50])
    picture.putdata([1, 0])
    assert decode(encoded(picture, "PNG")).tolist() == [[[200, 100, 50], [9, 8, 7]]]
    assert decode(encoded(picture, "PNG", transparency=b"\x00\xff")).tolist() == [[[200, 100, 50], [9, 8, 7]]]


def test_transparency_is_dropped():
    assert decode(encoded(Image.new("RGBA", (1, 1), (10, 20, 30, 0)), "PNG")).tolist() == [[[10, 20, 30]]]
    assert decode(encoded(Image.new("LA", (1, 1), (10, 0)), "PNG")).tolist() == [[[10, 10, 10]]]


def test_cmyk_is_converted_without_a_profile():
    picture = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # cyan
    red, green, blue = decode(encoded(picture, "JPEG", quality=100))[4, 4]
    assert red < 8
    assert green > 247
    assert blue > 247


def test_the_first_frame_counts_and_orientation_is_not_applied():
    frames = [Image.new("L", (4, 2), v) for v in (7, 200)]
    assert (decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 7).all()
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=turned)).shape == (2, 4, 3)


@pytest.mark.parametrize("levels", [None, (0, 2**32)])
@pytest.mark.parametrize("exif", [True, False])
def test_unsigned_values_of_32_bits_are_never_taken_for_negative_ones(exif, levels):
    """Pillow reads those beyond 31 bits as negative: with a range they were black."""
    data = bytearray(encoded(Image.fromarray(np.array([[5, -1]], np.int32)), "TIFF"))
    entry = data.find(bytes([0x53, 0x01, 3, 0]))  # SampleFormat, which Pillow writes as 2, signed
    data[entry + 8] = 1
    with pytest.raises(ValueError, match="has unsigned values beyond 2147483647; convert it to 16 bits"):
        decode(bytes(data), exif=exif, levels=levels)


def test_a_turned_tiff_is_seen_before_pillow_turns_it():
    data = encoded(Image.new("L", (40, 30)), "TIFF", tiffinfo={274: 6})
    assert [properties(data, headers=headers).turned for headers in (True, False)] == [True, True]
    assert decode(data, exif=True).shape == decode(data, exif=False).shape == (40, 30, 3)
