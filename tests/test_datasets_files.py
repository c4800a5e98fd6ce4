"""The paper's data sets, on miniature copies: real image files in the real folder layouts."""

import json
import os
import pickle
import sys
import uuid

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_builders import (
    SMALL,
    labelled,
    make_image_folder,
    make_imagenet_lt,
    make_inaturalist18,
    make_places_lt,
    write_image,
    write_list,
)
from pipeline_builders import one_line

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run
from h2t.pipeline.data import cifar_files, list_files
from h2t.pipeline.stages import prepare
from h2t.pipeline.stages.prepare import Imbalance


def opened(name: str, values: dict):
    """(module, options) of a dataset."""
    module = plugins.load("datasets", name)
    return module, build(module.Options, "prepare.options", values)


def prepared(out, dataset: str, options: dict, **more):
    """(sample table as rows, classes.json) of a prepare run."""
    prepare.run(prepare.Params(dataset=dataset, options=options, **more), Run("prepare", out))
    return pq.read_table(out / "samples.parquet").to_pylist(), json.loads((out / "classes.json").read_text())


MAKERS = {
    "imagenet_lt": make_imagenet_lt,
    "places_lt": lambda root: make_places_lt(root, "data_256"),
    "inaturalist18": make_inaturalist18,
    "image_folder": make_image_folder,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_miniature_copy_conforms(name, tmp_path):
    module, options = opened(name, MAKERS[name](tmp_path / "images"))
    found = module.load(options)
    assert len(found.source) == len(found.label) == len(found.split) == len(set(found.source))
    assert set(found.split) <= {"train", "val", "test"}
    assert set(found.label) == set(range(len(found.classes)))
    assert len(set(found.classes)) == len(found.classes)
    read = module.reader(options)
    for source in found.source:
        assert not source.startswith("/")
        assert read(source) == (tmp_path / "images" / source).read_bytes()
    rows, _ = prepared(tmp_path / "prepare", name, MAKERS[name](tmp_path / "images"))
    assert len(rows) == len(found.source)


@pytest.mark.parametrize("name", ["imagenet_lt", "places_lt", "inaturalist18", "image_folder"])
def test_the_default_transform_is_the_published_one(name):
    transform = plugins.load("datasets", name).Options.model_fields["transform"].default
    assert (transform.size, transform.resize, transform.area, transform.jitter) == (224, 256, [0.08, 1.0], 0.4)


# --- CIFAR


def reference_subset(label: np.ndarray, classes: int, ratio: float) -> list[int]:
    """`IMBALANCECIFAR10` of LDAM-DRW, restated: one RandomState(0), shuffled class by class."""
    draws, largest, chosen = np.random.RandomState(0), len(label) / classes, []
    for j in range(classes):
        index = np.where(label == j)[0]
        draws.shuffle(index)
        chosen += index[: int(largest * ((1 / ratio) ** (j / (classes - 1.0))))].tolist()
    return chosen


def test_the_subset_is_the_published_one():
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    imbalance = Imbalance(profile="exponential", ratio=100.0)
    kept = prepare._long_tail(labelled(label), imbalance)
    assert kept.tolist() == reference_subset(label, 10, 100.0)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Miniature CIFAR files, 20 training and 10 test images a class; torchvision's MD5 sums are not asked for."""
    from torchvision.datasets import cifar as theirs

    draws = np.random.default_rng(0)

    def batch(path, size, names, keys):
        path.parent.mkdir(exist_ok=True)
        labels = (np.arange(size) % names).tolist()
        data = draws.integers(0, 256, (size, 3072), np.uint8)
        path.write_bytes(pickle.dumps({"data": data, **dict.fromkeys(keys, labels)}))

    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    for i in range(1, 6):
        batch(ten / f"data_batch_{i}", 40, 10, ["labels"])
    batch(ten / "test_batch", 100, 10, ["labels"])
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {j}" for j in range(10)]}))
    batch(hundred / "train", 500, 100, ["fine_labels"])
    batch(hundred / "test", 100, 100, ["fine_labels"])
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing {j}" for j in range(100)]}))
    monkeypatch.setattr(theirs, "check_integrity", lambda *a: True)
    cifar_files._parts.cache_clear()
    yield {"root": str(tmp_path), "download": False}
    cifar_files._parts.cache_clear()


@pytest.mark.parametrize(("name", "classes", "train"), [("cifar10", 10, 200), ("cifar100", 100, 500)])
def test_cifar_reads_torchvisions_files(cifar, tmp_path, name, classes, train):
    module, options = opened(name, cifar)
    found = module.load(options)
    assert found.split == ["train"] * train + ["test"] * 100
    assert found.source[:2] == ["train/00000", "train/00001"]
    assert len(found.classes) == classes
    first = module.decode(module.reader(options)("test/00003"))
    assert first.shape == (32, 32, 3)
    assert (first == cifar_files._parts(f"CIFAR{classes}", str(tmp_path), False)["test"].data[3]).all()
    imbalance = {"profile": "exponential", "ratio": 5.0}
    rows, facts = prepared(tmp_path / "prepare", name, cifar, imbalance=imbalance)
    assert facts["counts"][0] == 5 * facts["counts"][-1]
    chosen = {r["source"] for r in rows if r["split"] == "train"}
    assert chosen == {f"train/{i:05d}" for i in reference_subset(np.arange(train) % classes, classes, 5.0)}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_cannot_be_downloaded_is_one_line(name, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    module, options = opened(name, {"root": str(tmp_path)})
    with one_line(match=r"the download failed \(<urlopen error no network>\); put"):
        module.load(options)


# --- list files


def test_classes_are_ordered_by_count_and_the_order_is_recorded(tmp_path):
    rows, facts = prepared(tmp_path / "p", "imagenet_lt", make_imagenet_lt(tmp_path / "i", counts=(3, 6, 2, 6)))
    assert facts["order"] == [1, 3, 0, 2]  # ties keep the native order
    assert facts["counts"] == [6, 6, 3, 2]
    assert facts["classes"] == ["n01443537", "n01491361", "n01440764", "n01484850"]
    assert set(facts["groups"]) == {"paper_index", "paper_threshold", "oltr"}
    for row in rows:
        assert facts["classes"][row["label"]] in row["source"]
    assert [sum(r["split"] == s for r in rows) for s in ("train", "val", "test")] == [17, 4, 8]


@pytest.mark.parametrize("style", ["data_256", "train"])
def test_both_path_styles_of_places_name_the_same_classes(style, tmp_path):
    rows, facts = prepared(tmp_path / "p", "places_lt", make_places_lt(tmp_path / "i", style))
    assert facts["classes"] == ["airfield", "bow_window-indoor"]
    assert len(rows) == 7 + 4


def test_species_are_named_by_kingdom_and_number(tmp_path):
    _, facts = prepared(tmp_path / "p", "inaturalist18", make_inaturalist18(tmp_path / "i"))
    assert facts["classes"] == ["Fungi/1", "Aves/0"]


def test_names_are_numbers_where_folders_do_not_tell():
    assert list_files.class_names(["a/x/1", "a/x/2"], [0, 1], lambda s: "x") == ["0", "1"]
    assert list_files.class_names(["a/x/1", "a/y/2"], [0, 0], lambda s: s) == ["0"]
    assert list_files.class_names(["a/x/1", "a/y/2"], [0, 2], lambda s: s[2]) == ["x", "1", "y"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/a.jpg", "must have the form 'relative/path label'"),
        ("train/a.jpg zero", "must have the form"),
        ("train/a.jpg -1", "must have the form"),
        ("train/a.jpg 1.5", "must have the form"),
        ("train/a.jpg 1e3", "must have the form"),
        ("train/a.jpg ²", "must have the form"),
        ("train/a.jpg ٣", "must have the form"),
        ("train/a.jpg 4000000000", "must have the form"),
        ("train/a.jpg " + "9" * 5000, "must have the form"),
        ("7", "must have the form"),
        ("/etc/passwd 0", "must be relative"),
        ("~/.ssh/id_rsa 0", "must be relative"),
        ("train/../../secret 0", "without '..'"),
        ("train\\..\\a.jpg 0", "forward slashes"),
        ("a\0b 0", "must be relative"),
    ],
    ids=lambda value: value[:20],
)
def test_a_malformed_line_is_named_by_file_and_number(line, message, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"train/good.jpg 0\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        list_files.read_list(path, tmp_path, False)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_may_hold_spaces_and_tabs_may_separate(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("train/my dog.jpg 3\r\ntrain/b.jpg\t4\n")
    assert list_files.read_list(path, tmp_path, False) == (["train/my dog.jpg", "train/b.jpg"], ["3", "4"])


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_may_not_leave_the_root_unless_asked(what, tmp_path):
    outside = write_image(tmp_path / "elsewhere" / "x.jpg")
    root = tmp_path / "root"
    (root / "train").mkdir(parents=True)
    if what == "file":
        (root / "train/a").mkdir()
        (root / "train/a/x.jpg").symlink_to(outside)
    else:
        (root / "train/a").symlink_to(outside.parent)
    path = write_list(root / "list.txt", [("train/a/x.jpg", 0)])
    with pytest.raises(UserError, match=r"list\.txt:1: .*link that leads out of it.*follow_links"):
        list_files.read_list(path, root, False)
    with pytest.raises(UserError, match="link that leads out"):
        list_files.Root(root, False).read("train/a/x.jpg")
    assert list_files.read_list(path, root, True) == (["train/a/x.jpg"], ["0"])
    assert list_files.Root(root, True).read("train/a/x.jpg") == outside.read_bytes()


def test_a_folder_that_became_a_link_since_the_last_reading_is_noticed(tmp_path):
    """In one process, as in a notebook; and a link that became a folder is read."""
    outside = write_image(tmp_path / "elsewhere" / "x.jpg")
    inside = write_image(tmp_path / "root" / "a" / "x.jpg")
    path = write_list(tmp_path / "list.txt", [("a/x.jpg", 0)])
    for link in (False, True, False):
        if link:
            inside.parent.rename(tmp_path / "root" / "b")
            inside.parent.symlink_to(outside.parent)
            with pytest.raises(UserError, match="link that leads out"):
                list_files.read_list(path, tmp_path / "root", False)
            inside.parent.unlink()
            (tmp_path / "root" / "b").rename(inside.parent)
        else:
            assert list_files.read_list(path, tmp_path / "root", False) == (["a/x.jpg"], ["0"])


def test_links_within_the_root_are_plain(tmp_path):
    write_image(tmp_path / "store/x.jpg")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/x.jpg").symlink_to(tmp_path / "store/x.jpg")
    assert list_files.Root(tmp_path, False).read("train/x.jpg")


def test_no_name_of_an_image_stays_in_memory(tmp_path):
    """Python 3.12 never frees a text that it interns, and `pathlib` interns each part of a path."""
    name = f"{uuid.uuid4()}.jpg"
    os.link(write_image(tmp_path / "any.jpg"), f"{tmp_path}/{name}")
    list_files.read_list(write_list(tmp_path / "list.txt", [(name, 0)]), tmp_path, False)
    list_files.Root(tmp_path, False).read(name)
    again = "".join(name)[:-1] + name[-1]
    assert again is not name
    assert sys.intern(again) is again


def test_lists_may_lie_elsewhere(tmp_path):
    values = make_imagenet_lt(tmp_path / "i")
    (tmp_path / "lists").mkdir()
    for path in (tmp_path / "i").glob("*.txt"):
        path.rename(tmp_path / "lists" / path.name)
    module, options = opened("imagenet_lt", {**values, "lists": str(tmp_path / "lists")})
    assert len(module.load(options).source) == 20


# --- image folders


def test_an_image_folder_reads_classes_from_folders(tmp_path):
    module, options = opened("image_folder", make_image_folder(tmp_path))
    found = module.load(options)
    assert found.classes == ["cat", "dog"]
    assert "train/dog/more/deep.jpg" in found.source
    assert not any("notes" in s for s in found.source)
    assert found.split.count("test") == 2


@pytest.mark.parametrize("part", ["../train", "val/../train", "/train"])
def test_parts_of_an_image_folder_lie_inside_root(tmp_path, part):
    module, options = opened("image_folder", {**make_image_folder(tmp_path), "train": part})
    with pytest.raises(UserError, match="must be folders inside root"):
        module.load(options)


def test_an_image_folder_without_splits_holds_test_samples_out(tmp_path):
    for name, count in (("cat", 3), ("dog", 5)):
        for i in range(count):
            write_image(tmp_path / "i" / name / f"{i}.jpg", i)
    values = {"root": str(tmp_path / "i"), "train": ".", "transform": SMALL}
    rows, facts = prepared(tmp_path / "p", "image_folder", values, test_per_class=1)
    assert facts["counts"] == [4, 2]
    assert sum(r["split"] == "test" for r in rows) == 2


def test_an_image_folder_refuses_unknown_classes_and_links(tmp_path):
    values = make_image_folder(tmp_path)
    write_image(tmp_path / "test/dgo/x.jpg")
    module, options = opened("image_folder", values)
    with pytest.raises(UserError, match="no training folder for class 'dgo'; did you mean 'dog'"):
        module.load(options)
    (tmp_path / "train/circle").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=r"circle: must not be a link to a folder.*follow_links"):
        module.load(options)
    for path in (tmp_path / "test/dgo").iterdir():
        path.unlink()
    module, options = opened("image_folder", {**values, "follow_links": True})
    assert len(module.load(options).source) == 9  # a circle ends


def test_a_pipe_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(OSError, match="not a plain file"):
        list_files.Root(tmp_path, False).read("x.jpg")
