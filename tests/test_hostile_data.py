"""Hostile images, lists, tables and features by the commands that read them: one line, and nothing is left.

Small random ones are in tests/fuzz; here is one example of each kind. Caches and parameters have files of their own.
"""

import os
import resource
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from image_builders import SMALL, encoded, labelled, make_image_folder, make_imagenet_lt
from PIL import Image
from pipeline_builders import accepted, make_params, refused, write_params

from h2t.cache.reader import open_cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data import decoding
from h2t.pipeline.stages.prepare import Imbalance, _long_tail


def prepare(folder, dataset, options, check=refused, **section):
    """What `h2t prepare` says of a dataset."""
    values = make_params(prepare={"dataset": dataset, "options": options, **section})
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    more = {"leaves": folder / "out"} if check is refused else {}
    return check("prepare", folder / "out", "--params", folder / "params.yaml", **more)


# List files.


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("circle/x 0", "'circle/x': cannot be "),
        ("x" * 5000 + " 0", "cannot be opened"),
        ("a/" * 3000 + "b 0", "cannot be opened"),
        ("train/\x1b[2J\u202e.png 0", "is missing"),
    ],
    ids=lambda value: value[:20],
)
def test_lines_of_a_list_file_that_are_none(tmp_path, line, says):
    """Other wrong lines are in test_wrong_data.py and test_datasets_files.py."""
    given = make_imagenet_lt(tmp_path / "images")
    (tmp_path / "images/circle").symlink_to(tmp_path / "images/circle")
    with (tmp_path / "images/ImageNet_LT_train.txt").open("a") as file:
        file.write(f"{line}\n")
    assert says in prepare(tmp_path, "imagenet_lt", given)


# Images.


def image_folder(tmp_path, name: str, data: bytes, **section):
    options = make_image_folder(tmp_path / "images")
    victim = next(p for p in sorted((tmp_path / "images").rglob("*")) if p.is_file() and "train" in str(p))
    victim.unlink()
    victim.with_name(name).write_bytes(data)
    return prepare(tmp_path, "image_folder", options, **section)


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of one grey plane whose compressed rows are `data`."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", data) + part(b"IEND", b"")


def part(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_images_that_are_bombs():
    header = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    at = header.index(b"\xff\xc0") + 5
    header[at : at + 4] = b"\xff\xff\xff\xff"  # 65,535 x 65,535 pixels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (png(2**31 - 1, 2**31 - 1, b""), png(60000, 60000, zlib.compress(bytes(2**24))), bytes(header)):
        with pytest.raises(ValueError, match=r"pixels|cannot be decoded"):
            decoding.decode(data)
    text = png(8, 8, zlib.compress(bytes(72)))[:33] + part(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**27)))
    with pytest.raises(ValueError, match=r"cannot be decoded|too large"):
        decoding.decode(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_an_image_never_starts_another_program(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert "is in no known image format" in image_folder(tmp_path, "x.jpg", encoded(Image.new("RGB", (9, 9)), "EPS"))
    assert not (tmp_path / "ran").exists()


# Tables of images.


def tables(tmp_path, table: pa.Table, **section):
    pq.write_table(table, tmp_path / "train.parquet")
    options = {"train": [str(tmp_path / "train.parquet")], "transform": {**SMALL, "size": 8, "resize": None}}
    return prepare(tmp_path, "parquet", options, **section)


def pictures(count: int = 6, labels=None) -> pa.Table:
    images = [Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(count)]
    found = [{"bytes": encoded(image, "PNG"), "path": f"{i}.png"} for i, image in enumerate(images)]
    return pa.table({"image": found, "label": [i % 2 for i in range(count)] if labels is None else labels})


def test_a_table_of_few_bytes_and_a_billion_rows(tmp_path):
    """Rows that cost no bytes hold no images: refused before a label is read."""
    label = pa.array([0]).take(pa.array(np.zeros(2**24, np.int8)))
    table = pa.table({"image": pa.nulls(2**24, pa.binary()), "label": label})
    assert "hold no images" in tables(tmp_path, table, test_per_class=1)
    assert (tmp_path / "train.parquet").stat().st_size < 2**20


def test_a_damaged_table(tmp_path):
    pq.write_table(pictures(60), tmp_path / "x.parquet", compression="zstd")
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[100:3000] = os.urandom(2900)
    (tmp_path / "x.parquet").write_bytes(data)
    prepare(tmp_path, "parquet", {"train": [str(tmp_path / "x.parquet")]}, test_per_class=1)


def test_one_class_is_refused_in_one_line(tmp_path):
    pq.write_table(pictures(labels=[0] * 6), tmp_path / "train.parquet")
    options = {"train": [str(tmp_path / "train.parquet")], "transform": {**SMALL, "size": 8, "resize": None}}
    assert "must have two or more classes; got one, '0'" in prepare(tmp_path, "parquet", options, test_per_class=1)


def test_100000_classes_are_cut_in_a_second():
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(100_000), 2))
    kept = _long_tail(labelled(label), Imbalance(profile="step", ratio=2.0))
    assert len(kept) == 150_000
    assert np.bincount(label[kept], minlength=100_000).tolist() == [2] * 50_000 + [1] * 50_000


# Features.


def test_100000_classes_from_import_to_metrics(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(100_000)
    np.savez(tmp_path / "train.npz", x=rng.random((100_000, 2), np.float32), y=labels)
    np.savez(tmp_path / "test.npz", x=rng.random((40, 2), np.float32), y=labels[:40])
    cache = tmp_path / "c"
    accepted("cache", "import", cache, "--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz")
    with open_cache(cache) as opened:
        assert len(opened.spec.provenance["classes"]) == 100_000
    file = write_params(tmp_path / "p.yaml", hosts__ncm={"host": "ncm", "backbone": "ce_mixup", "batchnorm": "stage1"})
    common = ["--params", file, "--device", "cpu"]
    accepted("train-classifier", "ncm", cache, "none", tmp_path / "h", *common)
    accepted("evaluate", "ncm", cache, tmp_path / "h", "none", tmp_path / "e", *common)
    table = pq.read_table(tmp_path / "e" / "confusion.parquet").to_pydict()
    assert sum(table["count"]) == 40
    assert set(table["true"]) == set(range(40))


def save(path, x, y):
    np.savez(path, x=np.asarray(x), y=np.asarray(y))


def test_negative_labels_are_names_like_others(tmp_path):
    """People's labels are names here; those of a cache count from 0."""
    save(tmp_path / "x.npz", np.eye(3, dtype=np.float32), [-5, -5, 2**62])
    accepted("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npz")
    with open_cache(tmp_path / "c") as cache:
        assert cache.spec.provenance["classes"] == ["-5", str(2**62)]
        assert cache.rows["label"].to_pylist() == [0, 0, 1]


@pytest.mark.parametrize("content", [b"\xff\xfe\n", None], ids=["not utf-8", "a folder"])
def test_class_names_that_are_none(tmp_path, content):
    save(tmp_path / "x.npz", np.eye(2, dtype=np.float32), [0, 1])
    names = tmp_path / "names.txt"
    names.mkdir() if content is None else names.write_bytes(content)
    said = refused("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npz", "--classes", names)
    assert "not a readable list of class names" in said


def test_two_classes_of_one_name_are_refused(tmp_path):
    save(tmp_path / "x.npz", np.eye(2, dtype=np.float32), [0, 1])
    (tmp_path / "names.txt").write_text("owl\nowl\n")
    command = ("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npz", "--classes", tmp_path / "names.txt")
    assert "class names must differ; got 'owl' twice; rename one" in refused(*command)


def test_sources_that_stand_twice_are_not_taken_for_names(tmp_path):
    table = pa.table({"embedding": [[1.0], [2.0]], "label": [0, 1], "path": ["same", "same"]})
    pq.write_table(table, tmp_path / "x.parquet")
    accepted("cache", "import", tmp_path / "c", "--train", tmp_path / "x.parquet")
    with open_cache(tmp_path / "c") as cache:
        assert cache.rows["source"].to_pylist() == ["x.parquet/000000000", "x.parquet/000000001"]


def test_a_refusal_is_one_line_whatever_the_names_hold():
    with pytest.raises(UserError) as error:
        raise UserError("a\nb\x1b[2J\u2028" + "x" * 10**6 + " https://ann:secret@host/x?token=secret end")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2100
    assert "secret" not in str(error.value)
    assert str(error.value).startswith("a\\nb\\x1b[2J\\u2028")
    assert str(error.value).endswith(" end")
