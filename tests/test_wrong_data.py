"""Ten wrong inputs or more of each dataset that test_own_data.py leaves out: each is one line that names the fault."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_builders import write_image
from test_own_data import WRONG_FOLDERS, WRONG_LISTS, WRONG_TABLES

from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.errors import UserError

HERE = "{here}"  # in options and messages: the test's folder


def refusal(dataset, **options):
    """What is said when the options are read, the dataset is loaded, or its first image is decoded."""
    module = plugins.load("datasets", dataset)
    with pytest.raises(UserError) as caught:
        built = params.build(module.Options, "prepare.options", options)
        found = module.load(built)
        module.reader(built)(found.source[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(here, dataset, options, says):
    options = {k: v.replace(HERE, str(here)) if isinstance(v, str) else v for k, v in options.items()}
    assert says.replace(HERE, str(here)) in refusal(dataset, **options)


# Parquet files of images.

ONE, TWO = ([{"bytes": b"x", "path": None}] * count for count in (1, 2))


def table(here, name="a.parquet", metadata=None, **columns):
    table = pa.table({key: value for key, value in columns.items() if value is not None})
    pq.write_table(table.replace_schema_metadata(metadata), here / name)


def damaged(here):
    table(here, image=TWO, label=[0, 1])
    data = (here / "a.parquet").read_bytes()
    (here / "a.parquet").write_bytes(data[:-20])


HUGGING_FACE = {"huggingface": '{"info": {"features": {"label": {"names": ["owl", "wren"]}}}}'}
PARQUET = {
    "no file": (lambda h: None, {}, "prepare.options.train: {here}/a.parquet: no such file"),
    "no file matches": (lambda h: None, {"train": ["{here}/b*.parquet"]}, "prepare.options.train: no file matches"),
    "a text": (lambda h: (h / "a.parquet").write_text("image,label"), {}, "a.parquet: must be a readable Parquet"),
    "damaged": (damaged, {}, "{here}/a.parquet: must be a readable Parquet file"),
    "no images": (lambda h: table(h, photo=ONE, label=[0]), {}, "a.parquet: no column 'image' (there are: photo, "),
    "no labels": (lambda h: table(h, image=ONE, kind=["owl"]), {}, "a.parquet: no column 'label' (there are: image"),
    "no rows": (lambda h: table(h, image=pa.array([], pa.binary()), label=pa.array([], "i8")), {}, "name files with"),
    "a missing label": (lambda h: table(h, image=TWO, label=["owl", None]), {}, "a.parquet: row 1: a label must be"),
    "an empty label": (lambda h: table(h, image=TWO, label=["owl", " "]), {}, "a.parquet: row 1: a label must not be"),
    "a fraction": (lambda h: table(h, image=TWO, label=[0.5, 1]), {}, "row 0: a label must be text or"),
    "lists for labels": (lambda h: table(h, image=TWO, label=[[0], [1]]), {}, "a whole number; got [0]"),
    "a negative label": (lambda h: table(h, image=TWO, label=[0, -1]), {}, "row 1: a label must be a whole number"),
    "a label too large": (lambda h: table(h, image=TWO, label=[0, 9]), {}, "label 9 is out of range: with 2 images"),
    "a label without a name": (
        lambda h: table(h, metadata=HUGGING_FACE, image=TWO, label=[0, 2]),
        {},
        "label 2 has no name: the metadata of a.parquet names 2 classes",
    ),
    "paths for images": (
        lambda h: table(h, image=["owl.jpg"], label=["owl"]),
        {},
        "column 'image' must hold encoded images as bytes; got str; set prepare.options.image_column",
    ),
    "named twice": (
        lambda h: table(h, image=ONE, label=[0]),
        {"test": ["{here}/a.parquet"]},
        "{here}/a.parquet: must be named once; got it twice",
    ),
    "a wrong key": (lambda h: None, {"label_colum": "y"}, "label_colum: unknown key; did you mean 'label_column'"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "says"), PARQUET.values(), ids=PARQUET)
def test_parquet(tmp_path, make, options, says):
    make(tmp_path)
    options = {
        key: [v.replace(HERE, str(tmp_path)) for v in value] if isinstance(value, list) else value
        for key, value in {"train": ["{here}/a.parquet"], **options}.items()
    }
    refused(tmp_path, "parquet", options, says)


# The published list files.


def lists(text, test="img/9.png 0\n"):
    def make(here):
        write_image(here / "img/0.png", 0)
        (here / "l.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        (here / "t.txt").write_text(test)

    return make


LISTS = {
    "no list": (lambda h: None, {}, "{here}/l.txt: no such list file; set prepare.options.lists"),
    "an empty list": (lists("\n"), {}, "{here}/l.txt: must name at least one image; got an empty list file"),
    "no text": (
        lists(b"img/caf\xe9.png 0"),
        {},
        "{here}/l.txt: must be a readable UTF-8 text file; got another encoding in line 1; save",
    ),
    "a folder": (lambda h: (h / "l.txt").mkdir(), {}, "{here}/l.txt: must be a readable UTF-8 text file"),
    "zeros": (lists(b"\0" * 99), {}, "{here}/l.txt:1: must have the form"),
    "no label": (lists("img/0.png\n"), {}, "{here}/l.txt:1: must have the form 'relative/path label'"),
    "words": (lists("img/0.png owl\n"), {}, "for labels in words set prepare.dataset=list_file"),
    "commas": (lists("img/0.png,0\n"), {}, "set prepare.dataset=table"),
    "labels from 1": (lists("img/0.png 1\n", "img/9.png 1\n"), {}, "labels must start at 0; got 1 as the lowest"),
    "a gap in labels": (lists("img/0.png 0\nimg/1.png 2\n"), {}, "l.txt: 'img/1.png': label 2 is out of range: with 2"),
    "twice": (lists("img/0.png 0\nimg/0.png 1\n"), {}, "'img/0.png': must be listed once"),
    "outside": (lists("../0.png 0\n"), {}, "path '../0.png': must be relative"),
    "absolute": (lists("/img/0.png 0\n"), {}, "path '/img/0.png': must be relative"),
    "a new class in test": (lists("img/0.png 0\n", "img/1.png 1\n"), {}, "t.txt: 'img/1.png': label 1 is out of range"),
    "in two splits": (
        lists("img/0.png 0\n", "img/0.png 0\n"),
        {},
        "{here}/t.txt: 'img/0.png': must be listed once, in one split; got a second entry, after one in {here}/l.txt",
    ),
    "no root": (lists("img/0.png 0\n"), {"root": "{here}/photos", "lists": "{here}"}, "no folder {here}/photos"),
    "a wrong key": (lambda h: None, {"trian": "l.txt"}, "prepare.options.trian: unknown key; did you mean 'train'"),
}


@pytest.mark.parametrize("dataset", ["imagenet_lt", "places_lt", "inaturalist18"])
@pytest.mark.parametrize(("make", "options", "says"), LISTS.values(), ids=LISTS)
def test_published_lists(tmp_path, dataset, make, options, says):
    make(tmp_path)
    refused(tmp_path, dataset, {"root": "{here}", "train": "l.txt", "test": "t.txt", **options}, says)


# CIFAR in torchvision's files.

FOLDERS = {"cifar10": ("cifar-10-batches-py", "data_batch_1"), "cifar100": ("cifar-100-python", "train")}


def batch(data):
    def make(folder, name):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)

    return make


CIFAR = {
    "no folder": (lambda f, n: None, {}, "is missing or incomplete; set prepare.options.root to its folder"),
    "an empty folder": (lambda f, n: f.mkdir(parents=True), {}, "is missing or incomplete"),
    "an empty file": (batch(b""), {}, "is missing or incomplete"),
    "other content": (batch(b"0" * 3073), {}, "is missing or incomplete"),
    "objects": (batch(pickle.dumps({b"data": np.zeros(3)})), {}, "is missing or incomplete"),
    "a file for the folder": (lambda f, n: f.write_text("x"), {}, "is missing or incomplete"),
    "no text for root": (lambda f, n: None, {"root": 5}, "prepare.options.root: must be a valid string; got 5"),
    "no truth value": (lambda f, n: None, {"download": "no"}, "prepare.options.download: must be a valid boolean"),
    "a wrong key": (lambda f, n: None, {"roots": "x"}, "prepare.options.roots: unknown key; did you mean 'root'"),
    "no size": (lambda f, n: None, {"transform": {"size": 0, "mean": [0.5] * 3, "std": [1.0] * 3}}, "transform.size"),
    "two means": (
        lambda f, n: None,
        {"transform": {"size": 32, "mean": [0.5] * 2, "std": [1.0] * 3}},
        "transform.mean: must have at least 3 items; got [0.5, 0.5]",
    ),
}


@pytest.mark.parametrize("dataset", FOLDERS)
@pytest.mark.parametrize(("make", "options", "says"), CIFAR.values(), ids=CIFAR)
def test_cifar(tmp_path, dataset, make, options, says):
    folder, name = FOLDERS[dataset]
    make(tmp_path / folder, name)
    refused(tmp_path, dataset, {"root": "{here}", "download": False, **options}, says)


def test_digits_take_no_option():
    assert refusal("digits", root="x") == "prepare.options.root: unknown key (known: none)"


def test_every_dataset_has_ten_wrong_inputs():
    lists = dict.fromkeys(("imagenet_lt", "places_lt", "inaturalist18"), LISTS)
    own = {"table": WRONG_TABLES, "image_folder": WRONG_FOLDERS, "list_file": WRONG_LISTS, "parquet": PARQUET}
    known = {**own, **lists, "cifar10": CIFAR, "cifar100": CIFAR}
    assert set(known) == set(plugins.names("datasets")) - {"digits"}  # which reads no input
    assert {name: len(cases) for name, cases in known.items() if len(cases) < 10} == {}
