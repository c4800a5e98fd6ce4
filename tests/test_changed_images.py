"""Images that change after `prepare`: whatever decodes them stops in one line, and goes on once they are back."""

import hashlib
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import tree
from image_builders import encoded, make_image_folder, write_image
from PIL import Image
from pipeline_builders import environment, extracted, make_backbone_dir, prepared, refused, torchrun, write_params

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data import images as images_module
from h2t.pipeline.data.samples import Samples, load_samples
from h2t.pipeline.stages import train_backbone
from h2t.pipeline.training.resume import Checkpoint

VICTIM, OTHER = "train/cat/1.png", "train/dog/1.png"
TRANSFORM = {"size": 8, "resize": 8, "padding": 1, "flip": True, "mean": [0.5] * 3, "std": [0.25] * 3}
#: A shard for each row, so that an extraction stops between finished shards.
EXTRACT = {
    "batchnorm": ["stage1"],
    "max_views": 2,
    "chunk_rows": 1,
    "shard_bytes": 1,
    "batch_size": 2,
    "batchnorm_passes": 2,
}
TRAINING = {"arch": "resnet20", "epochs": 3, "warmup_epochs": 0, "batch_size": 4, "accumulate": 2}


def section_of(place: Path) -> dict:
    options = {"root": str(place / "images"), "test": "test", "transform": TRANSFORM}
    return {"dataset": "image_folder", "options": options}


def opened(place: Path):
    """(Samples, Images) as `prepare` left them."""
    samples = load_samples(place / "samples")
    return samples, samples.images(section_of(place))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Images of two classes, their `samples`, a `backbone`, and the `cache` of them."""
    place = tmp_path_factory.mktemp("origin")
    make_image_folder(place / "images")
    found = prepared(section_of(place), place / "samples")
    make_backbone_dir(place / "backbone", classes=2)
    extracted(place / "cache", *found, place / "backbone", **EXTRACT)
    return place


@pytest.fixture
def place(origin, tmp_path):
    """The same in a folder of its own, with `params.yaml`."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    write_params(
        tmp_path / "params.yaml",
        prepare=section_of(tmp_path),
        backbones={"ce_mixup": TRAINING},
        extract={**EXTRACT, "dtype": "float32"},
        hosts__dr__batchnorm="stage1",
    )
    return tmp_path


def overwrite(place: Path, source=VICTIM) -> str:
    """Puts an image of another class in the place of `source`; returns what must be said of it."""
    at, other = place / "images" / source, place / "images" / OTHER
    old, new = (hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (at, other))
    shutil.copyfile(other, at)
    return (
        f"image {source!r}: has changed since it was prepared: its sha256 must be {old}; got {new}; "
        "restore the image or prepare again (dvc repro or h2t prepare)"
    )


def arguments(place: Path, command: str) -> list:
    given = ["--params", place / "params.yaml", "--device", "cpu"]
    extract = ["extract", "ce_mixup", place / "samples", place / "backbone", place / "out", *given]
    return {
        "train-backbone": ["train-backbone", "ce_mixup", place / "samples", place / "out", *given],
        "extract": extract,
        "batch norm": [*extract, "--set", "extract.batchnorm=[stage1,calibrated]"],
        "workers": [*extract, "--set", "run={cluster: local:1}"],
        "incremental": [*extract, "--set", f"extract.statistics_from={place / 'cache'}"],
        "verify": [
            *("cache", "verify", place / "cache", "--recompute", 99),
            *("--samples", place / "samples", "--backbone", place / "backbone", *given),
        ],
    }[command]


@pytest.mark.parametrize("command", ["train-backbone", "extract", "batch norm", "verify"])
def test_an_image_that_became_another_is_one_line(place, command):
    said = overwrite(place)
    assert refused(*arguments(place, command), leaves=place / "out") == f"error: {said}\n"


def test_images_that_all_became_others_are_refused_before_a_row_is_stored(place):
    for number, path in enumerate(sorted((place / "images").rglob("*.[pj]*g"))):
        write_image(path, 100 + number)
    said = refused(*arguments(place, "extract"), leaves=place / "out")
    assert "has changed since it was prepared" in said
    assert not [p for p in place.rglob("c.*.0.0.0") if "cache" not in p.parts]


def test_a_previous_cache_gives_rows_of_the_images_that_were_prepared_and_others_are_checked(place):
    """A row is taken by the digest of the image it was computed from, so the file's bytes do not matter for it."""
    new = "train/cat/2.png"
    write_image(place / "images" / new, 98)
    found = prepared(section_of(place), place / "samples")
    overwrite(place)
    summary = extracted(place / "taken", *found, place / "backbone", previous=place / "cache", **EXTRACT)
    assert summary.taken > summary.forwarded > 0
    said = overwrite(place, new)
    assert refused(*arguments(place, "incremental"), leaves=place / "out") == f"error: {said}\n"


@pytest.mark.parametrize("command", ["extract", "workers"])
def test_an_extraction_goes_on_to_the_same_bytes_once_the_image_is_back(place, command, warm_h2t):
    last = "train/dog/more/deep.jpg"
    old = (place / "images" / last).read_bytes()
    said = overwrite(place, last)
    typed = [str(word) for word in (warm_h2t, *arguments(place, command))]
    done = subprocess.run(typed, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {said}"
    assert "Traceback" not in done.stderr
    assert not (place / "out").exists()
    (place / "images" / last).write_bytes(old)
    summary = extracted(place / "out", *opened(place), place / "backbone", **EXTRACT)
    assert summary.kept_shards > 0
    assert tree(place / "out") == tree(place / "cache")


def test_of_several_processes_none_shows_a_traceback(place, warm_programs):
    """One meets the image; the other one, which waits for it, says that it has ended."""
    said = overwrite(place)
    done = torchrun(warm_programs, "train-backbone", "ce_mixup", "samples", "out", cwd=place)
    assert done.returncode == 1
    assert f"error: {said}" in done.stderr.splitlines()
    assert "[rank" not in done.stderr  # how torch marks the traceback of a process
    assert not (place / "out").exists()


def test_stage_one_goes_on_to_the_same_bytes_once_the_image_is_back(place, monkeypatch):
    """A large collection is decoded in each epoch; the image changes after the first one."""
    monkeypatch.setattr(images_module, "KEEP_DECODED_BYTES", 0)
    params = train_backbone.Params(**TRAINING)

    def train(out):
        train_backbone.run(params, Run("b", out), *opened(place))

    train(place / "whole")
    old = (place / "images" / VICTIM).read_bytes()
    offer = Checkpoint.offer

    def change(self, steps, *rest):
        offer(self, steps, *rest)
        if steps == 1:
            overwrite(place)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "offer", change)
        with pytest.raises(UserError, match=f"image '{VICTIM}': has changed since it was prepared"):
            train(place / "out")
    assert not (place / "out").exists()
    (place / "images" / VICTIM).write_bytes(old)
    train(place / "out")
    assert tree(place / "out") == tree(place / "whole")


def test_images_that_are_kept_decoded_are_those_that_were_checked(place):
    _, images = opened(place)
    first = images.batch([0, 1], [None, None])
    for path in (place / "images").rglob("*.[pj]*g"):
        path.write_bytes(b"")
    assert (images.batch([0, 1], [None, None]) == first).all()


def test_copies_in_other_processes_check_too(place):
    samples, images = opened(place)
    copy = pickle.loads(pickle.dumps(images))
    number = samples.table["source"].to_pylist().index(VICTIM)
    said = overwrite(place)
    for some in (images, copy):
        with pytest.raises(UserError) as caught:
            some.batch([number], [None])
        assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value))) == said


def test_images_in_memory_are_checked(digits):
    samples, _ = digits
    table = samples.table.set_column(4, "digest", pa.array([*samples.table["digest"].to_pylist()[1:], "0" * 64]))
    images = Samples(table, samples.facts).images({"dataset": "digits"})
    with pytest.raises(UserError, match=f"image '{table['source'][3]}': has changed since it was prepared"):
        images.array(3)


def write_table(path: Path, seed: int) -> dict:
    """A Parquet file of twelve images of one size in two row groups; returns the section `prepare`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 8, 8, 3), np.uint8)
    cells = [{"bytes": encoded(Image.fromarray(image), "BMP")} for image in pixels]
    table = pa.table({"image": cells, "label": [i % 2 for i in range(12)]})
    pq.write_table(table, path, row_group_size=6, compression="none", use_dictionary=False)
    return {
        "dataset": "parquet",
        "options": {"train": [str(path)], "image_column": "image", "label_column": "label", "transform": TRANSFORM},
        "test_per_class": 1,
    }


def test_a_parquet_file_that_is_rewritten_in_place_is_one_line(tmp_path):
    """Opened before or after: the old footer fits the new file, whose row groups have the same sizes."""
    section = write_table(tmp_path / "pets.parquet", 0)
    samples, before = prepared(section, tmp_path / "samples")
    size = (tmp_path / "pets.parquet").stat().st_size
    write_table(tmp_path / "other.parquet", 1)
    other = (tmp_path / "other.parquet").read_bytes()
    assert len(other) == size
    (tmp_path / "pets.parquet").write_bytes(other)
    for images in (before, samples.images(section)):
        with pytest.raises(UserError, match=r"image 'pets\.parquet:0000000\d\d': has changed since it was prepared"):
            images.batch([0], [None])
