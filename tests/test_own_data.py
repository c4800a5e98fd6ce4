"""Images of one's own: tables, folders and lists as people have them; splits of skewed data; pixels."""

import codecs
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_builders import encoded, write_image
from PIL import Image

from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data import images, splits
from h2t.pipeline.data.decoding import decode
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.splits import AtMost, Labelled, SmallClasses
from h2t.pipeline.stages import prepare


def load(dataset: str, **options) -> Collection:
    module = plugins.load("datasets", dataset)
    return module.load(params.build(module.Options, "prepare.options", options))


def refusal(dataset: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(dataset, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def photos(tmp_path):
    """A folder of six photos: img/0.png to img/5.png."""
    for i in range(6):
        write_image(tmp_path / f"img/{i}.png", i)
    return tmp_path


ROWS = ["img/0.png,cat", "img/1.png,dog", "img/2.png,cat", 'img/3.png,"dog"', "img/4.png,NA"]
KINDS = ["cat", "dog", "cat", "dog", "NA"]


def prepared(folder, dataset, options, **section):
    """(sample table as rows, classes.json, lines said) of a prepare run."""
    said: list[str] = []
    values = prepare.Params.model_validate({"dataset": dataset, "options": options, **section})
    prepare.run(values, Run("prepare", folder / "out", say=said.append))
    return (
        pq.read_table(folder / "out/samples.parquet").to_pylist(),
        json.loads((folder / "out/classes.json").read_text()),
        said,
    )


# Tables.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.csv", "\n".join(["file,kind", *ROWS])),
        ("windows.csv", codecs.BOM_UTF8.decode() + "\r\n".join(["file,kind", *ROWS, ""])),
        ("semicolons.csv", "\n".join(["file,kind", *ROWS]).replace(",", ";")),
        ("tabs.tsv", "\n".join(["file,kind", *ROWS]).replace(",", "\t")),
        ("backslashes.csv", "\n".join(["file,kind", *ROWS]).replace("/", "\\")),
        ("lines.jsonl", "".join(f'{{"file": "img/{i}.png", "kind": "{k}"}}\n' for i, k in enumerate(KINDS))),
    ],
)  # fmt: skip
def test_a_table_is_read_in_every_usual_form(photos, name, text):
    (photos / name).write_bytes(text.encode())
    found = load("table", table=str(photos / name), path="file", label="kind")
    assert found.classes == ["NA", "cat", "dog"]
    assert found.source == [f"img/{i}.png" for i in range(5)]
    assert [found.classes[y] for y in found.label] == ["cat", "dog", "cat", "dog", "NA"]


def test_labels_that_are_numbers_are_ordered_by_value(photos):
    (photos / "t.csv").write_text("file,kind\n" + "".join(f"img/{i}.png,{n}\n" for i, n in enumerate((10, 9, 1))))
    assert load("table", table=str(photos / "t.csv"), path="file", label="kind").classes == ["1", "9", "10"]


def test_a_table_may_lie_elsewhere_and_name_absolute_paths(photos, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists/t.csv"
    table.write_text(f"file,kind\n{photos}/img/0.png,a\nimg/1.png,b\n")
    found = load("table", table=str(table), root=str(photos), path="file", label="kind")
    assert found.source == ["img/0.png", "img/1.png"]
    assert "must lie in" in refusal("table", table=str(table), path="file", label="kind")
    monkeypatch.setenv("HOME", str(photos))
    table.write_text("file,kind\n~/img/0.png,a\n~/img/1.png,b\n")
    assert load("table", table="~/lists/t.csv", root="~", path="file", label="kind").source == found.source


def test_splits_and_groups_come_from_columns(photos):
    lines = ["f,y,part,site", "img/0.png,a,Train,s1", "img/1.png,b,train,s2", "img/2.png,a,validation,s3"]
    (photos / "t.csv").write_text("\n".join([*lines, "img/3.png,b,TEST,"]))
    found = load("table", table=str(photos / "t.csv"), path="f", label="y", split="part", group="site")
    assert found.split == ["train", "train", "val", "test"]
    assert found.group == ["s1", "s2", "s3", "img/3.png"]


def parquet(path, labels, first=0, **column):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [encoded(Image.new("RGB", (40, 40), (first + i, 0, 0)), "PNG") for i in range(len(labels))]
    table = pa.table({"image": [{"bytes": d, "path": None} for d in data], "label": labels, **column})
    pq.write_table(table, path, row_group_size=2)
    return data


@pytest.mark.parametrize("dataset", ["table", "parquet"])
@pytest.mark.parametrize(
    ("labels", "classes"), [(["b", "a", "b"], ["a", "b"]), ([True, False, True], ["False", "True"])]
)
def test_parquet_with_images_in_it(tmp_path, dataset, labels, classes):
    data = parquet(tmp_path / "x/part.parquet", labels) + parquet(tmp_path / "y/part.parquet", labels, 9)
    pattern = str(tmp_path / "*/*.parquet")
    options = {"table": pattern, "bytes": "image"} if dataset == "table" else {"train": [pattern]}
    module = plugins.load("datasets", dataset)
    built = params.build(module.Options, "prepare.options", options)
    found = module.load(built)
    assert found.classes == classes
    assert found.source[3] == "y/part.parquet:000000000"
    read = module.reader(built)
    assert [read(source) for source in found.source] == data


TABLE = {"path": "f", "label": "y"}
WRONG_TABLES = {
    "no file": (None, {}, "no such table"),
    "no text": (b"", {}, "it is empty"),
    "UTF-16": ("f,y\nimg/0.png,a\n".encode("utf-16"), {}, "its encoding is UTF-16"),
    "Latin-1": (b"f,y\nimg/0.png,caf\xe9\n", {}, "line 2 is not UTF-8"),
    "a row too long": (b"f,y\nimg/0.png,a,b\n", {}, "Expected 2 columns, got 3"),
    "no column": (b"f,y\nimg/0.png,a\n", {"label": "why"}, "no column 'why' (there are: f, y)"),
    "no label": (b"f,y\nimg/0.png,a\nimg/1.png,\n", {}, "row 2, column 'y': a label must not be empty"),
    "twice": (b"f,y\nimg/0.png,a\nimg/0.png,b\n", {}, "row 2: 'img/0.png' (b): must be named once"),
    "outside": (b"f,y\n../0.png,a\n", {}, "row 1: '../0.png': must lie in"),
    "from another folder": (b"f,y\n0.png,a\n1.png,b\n", {}, "row 1: no file"),
    "no split": (b"f,y\nimg/0.png,a\n", {"split": "y"}, "row 1, column 'y': must be one of train, training"),
    "no rows": (b"f,y\n", {}, "must hold at least one row"),
}


@pytest.mark.parametrize(("data", "options", "says"), WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_a_wrong_table_is_one_line(photos, data, options, says):
    if data is not None:
        (photos / "t.csv").write_bytes(data)
    text = refusal("table", table=str(photos / "t.csv"), **{**TABLE, **options})
    assert says in text
    assert str(photos / "t.csv") in text


def test_other_wrong_options_of_a_table(photos):
    (photos / "t.xlsx").write_bytes(b"PK")
    (photos / "t.csv").write_text("f,y\nimg/0.png,a\n")
    assert "must end in one of .csv" in refusal("table", table=str(photos / "t.xlsx"), **TABLE)
    assert "no file matches" in refusal("table", table=str(photos / "*.tsv"), **TABLE)
    assert "only Parquet files hold images" in refusal("table", table=str(photos / "t.csv"), bytes="f")
    assert "exactly one of path" in refusal("table", table=str(photos / "t.csv"))
    assert "exactly one of path" in refusal("table", table="t.parquet", path="f", bytes="g")


# Folders and lists.


def folder(root, **counts):
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name.replace("__", "/") / f"{i}.png", 100 * number + i)
    return str(root)


def test_usual_names_of_splits_are_found(tmp_path):
    root = folder(tmp_path, train__cat=2, train__dog=2, valid__cat=1, Test__dog=1)
    assert load("image_folder", root=root).split == ["train"] * 4 + ["val"] + ["test"]


def test_what_a_folder_leaves_out_is_said(tmp_path):
    root = folder(tmp_path, train__cat=2, train__dog=2)
    write_image(tmp_path / "train/loose.png")
    (tmp_path / "train/empty").mkdir()
    (tmp_path / "train/cat/scan.dcm").write_bytes(b"x")
    notes = " ".join(load("image_folder", root=root).notes)
    assert "1 image in no class folder, left out; first: train/loose.png" in notes
    assert "1 file of other kinds left out: .dcm 1" in notes
    assert "1 folder without images, so no class: empty" in notes


def test_sub_folders_that_are_no_classes(tmp_path):
    root = folder(tmp_path / "splits", train__cat=1, test__cat=1)
    assert "holds the splits test, train, not classes" in refusal("image_folder", root=root, train=".")
    sites = folder(tmp_path / "sites", a__cat=1, a__dog=1, b__cat=1, b__dog=1)
    assert "which all have the folders cat, dog" in load("image_folder", root=sites, train=".").notes[0]
    classes = folder(tmp_path / "classes", cat=1, dog=1)
    assert "root holds cat, dog; where these are the classes, set train to ." in refusal("image_folder", root=classes)


@pytest.mark.parametrize("where", ["metadata.csv", "site_A/metadata.jsonl"])
def test_metadata_of_hugging_face_is_noticed(tmp_path, where):
    root = folder(tmp_path, site_A=1, site_B=1)
    (tmp_path / where).write_text("file_name,label\n")
    assert "this folder has its labels in a table; set prepare.dataset=table" in refusal(
        "image_folder", root=root, train="."
    )


def test_names_that_are_not_utf8(tmp_path):
    root = folder(tmp_path, cat=1)
    write_image(tmp_path / "x.png").rename(tmp_path / "cat" / b"caf\xe9.png".decode(errors="surrogateescape"))
    assert "file names must be UTF-8; got cat/caf\\xe9.png" in refusal("image_folder", root=root, train=".")


def test_a_back_slash_may_be_part_of_a_name(tmp_path):
    root = folder(tmp_path, cat=1)
    write_image(tmp_path / "cat/a\\b.png")
    assert load("image_folder", root=root, train=".").source == ["cat/0.png", "cat/a\\b.png"]


def test_list_files_with_words(photos):
    (photos / "l.txt").write_bytes(codecs.BOM_UTF8 + b"img/0.png cat\r\nimg/1.png dog\r\n")
    found = load("list_file", root=str(photos), train="l.txt")
    assert (found.source, found.classes, found.label) == (["img/0.png", "img/1.png"], ["cat", "dog"], [0, 1])
    assert "set prepare.dataset=list_file" in refusal("imagenet_lt", root=str(photos), train="l.txt", test=None)
    (photos / "l.txt").write_text("img/0.png,cat\n")
    assert "set prepare.dataset=table" in refusal("list_file", root=str(photos), train="l.txt")


def test_list_labels_from_one_on(photos):
    (photos / "l.txt").write_text("img/0.png 1\nimg/1.png 2\n")
    assert load("list_file", root=str(photos), train="l.txt").classes == ["1", "2"]
    assert "labels must start at 0; got 1 as the lowest" in refusal(
        "imagenet_lt", root=str(photos), train="l.txt", test=None
    )


def test_a_home_folder_in_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.yaml").write_text("prepare: {options: {root: ~/photos}}\n")
    assert params.load(tmp_path / "p.yaml")["prepare"]["options"]["root"] == f"{tmp_path}/photos"
    (tmp_path / "p.yaml").write_text("inputs: {photos: ~/photos}\n")
    with pytest.raises(UserError, match=f"inputs.photos: DVC does not know ~; write {tmp_path}/photos"):
        params.load(tmp_path / "p.yaml")


def linked(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


#: What is wrong with a folder -> (what makes it so, options, what the line says, with the user's own names).
WRONG_FOLDERS = {
    "no root": (lambda r: None, {"root": "elsewhere"}, "no folder elsewhere/train"),
    "no such part": (lambda r: folder(r, birds__owl=1), {}, "(root holds birds; where these are the classes"),
    "an empty part": (lambda r: (r / "train").mkdir(), {}, "train: must hold a folder of images per class; got no"),
    "loose images": (lambda r: write_image(r / "train/a.png"), {}, "got 1 image and no folders of images"),
    "splits as classes": (lambda r: folder(r, train__owl=1, val__owl=1), {"train": "."}, "the splits train, val, not"),
    "a table": (
        lambda r: (folder(r, train__owl=1), (r / "train/metadata.csv").write_text("x")),
        {},
        "metadata.csv: this",
    ),
    "a new class": (lambda r: folder(r, train__owl=1, test__awl=1), {}, "class 'awl'; did you mean 'owl'?"),
    "a linked class": (
        lambda r: (folder(r, train__owl=1), linked(r / "train/wren", r / "train/owl")),
        {},
        "train/wren",
    ),
    "a link out": (lambda r: (folder(r, train__owl=1), linked(r / "train/owl/x.png", "/etc/passwd")), {}, "owl/x.png"),
    "a part outside": (lambda r: folder(r.parent, out__owl=1), {"train": "../out"}, "must be folders inside root"),
    "no such test": (lambda r: folder(r, train__owl=1), {"test": "tset"}, "no folder"),
}


@pytest.mark.parametrize(("make", "options", "says"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_a_wrong_folder_is_one_line(tmp_path, make, options, says):
    root = tmp_path / "root"
    root.mkdir()
    make(root)
    assert says in refusal("image_folder", **{"root": str(root), **options})


WRONG_LISTS = {
    "no label": ("img/0.png", "l.txt:1: must have the form 'relative/path label'; got 'img/0.png'"),
    "commas": ("img/0.png,owl", "got 'img/0.png,owl'; for a table with columns set prepare.dataset=table"),
    "semicolons": ("img/0.png;owl", "set prepare.dataset=table"),
    "absolute": ("/img/0.png owl", "l.txt:1: path '/img/0.png': must be relative"),
    "home": ("~/0.png owl", "'~/0.png': must be relative"),
    "outside": ("../0.png owl", "'../0.png': must be relative"),
    "back-slashes": ("img\\0.png owl", "with forward slashes"),
    "twice": ("img/0.png owl\nimg/0.png wren", "'img/0.png': must be listed once"),
    "nothing": ("\n", "must name at least one image; got an empty list file"),
    "a link out": ("out/passwd owl", "a link that leads out of it"),
    "Latin-1": (b"img/caf\xe9.png owl", "must be a readable UTF-8 text file"),
}


@pytest.mark.parametrize(("text", "says"), WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_a_wrong_list_is_one_line(photos, text, says):
    (photos / "out").symlink_to("/etc")
    (photos / "l.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert says in refusal("list_file", root=str(photos), train="l.txt")


def test_lists_and_roots_that_are_not_there(photos):
    assert "no such list file" in refusal("list_file", root=str(photos), train="m.txt")
    assert "prepare.options.root: no folder nowhere" in refusal("list_file", root="nowhere", train="l.txt")


# Splits.


def test_classes_that_keep_less_than_a_third_are_named(tmp_path):
    """Photos that are added to a small class are held out first: the new ones are tested on, not trained on."""
    folder(tmp_path / "i", cat=40, dog=18, owl=6)
    options = {"root": str(tmp_path / "i"), "train": ".", "transform": {"size": 32, "resize": 36}}
    _, facts, said = prepared(tmp_path, "image_folder", options, test={"at_most": 14, "keep": 4})
    assert facts["counts"] == [26, 4, 4]
    assert "note: less than a third of 1 class stays for training: dog 4 of 18; for more, set share" in " ".join(said)
    _, facts, said = prepared(tmp_path / "b", "image_folder", options, test=0.2)
    assert "less than a third" not in " ".join(said)


def skewed(counts=(50, 20, 7, 2, 1), groups=0, seed=0) -> Labelled:
    label = np.repeat(np.arange(len(counts)), counts)
    order = np.random.default_rng(seed).permutation(len(label))
    source = [f"{i:03}.png" for i in range(len(label))]
    names = [f"c{j}" for j in range(len(counts))]
    group = [f"g{i % groups}" for i in order.tolist()] if groups else None
    return Labelled.of(
        Collection(names, [source[i] for i in order], label[order].tolist(), ["train"] * len(label), group)
    )


def held(images: Labelled, how, small=None, seed=0) -> set[str]:
    splits.hold_out(images, "test", how, small or SmallClasses(), seed)
    return {source for source, split in zip(images.source, images.split, strict=True) if split == "test"}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (0.2, [10, 4, 1, 0, 0]),
        (0.5, [25, 10, 4, 1, 0]),
        (AtMost(at_most=5), [5, 5, 5, 1, 0]),
        (AtMost(at_most=5, keep=4), [5, 5, 3, 0, 0]),
        (AtMost(at_most=15, share=0.4), [15, 8, 2, 0, 0]),
    ],
)
def test_shares_and_numbers_leave_every_class_an_image(how, expected):
    images = skewed()
    held(images, how)
    assert images.sizes("test").tolist() == expected
    assert (images.sizes("train") > 0).all()


def test_what_is_held_out_depends_on_names_and_the_seed_only():
    assert held(skewed(seed=1), 0.2) == held(skewed(seed=2), 0.2) != held(skewed(seed=1), 0.2, seed=1)


def test_groups_are_never_divided():
    images = skewed(counts=(60, 30, 12), groups=17)
    held(images, 0.25)
    both = {g: {s for h, s in zip(images.group, images.split, strict=True) if h == g} for g in images.group}
    assert all(len(found) == 1 for found in both.values())
    assert np.abs(images.sizes("test") / np.array([60, 30, 12]) - 0.25).max() < 0.15
    again = skewed(counts=(60, 30, 12), groups=17)
    assert held(again, 0.25) == {s for s, split in zip(images.source, images.split, strict=True) if split == "test"}


def test_a_group_in_two_given_splits_is_refused():
    with pytest.raises(UserError, match="1 group must lie in one split each; got 'g' in test and training images"):
        Labelled.of(Collection(["a"], ["1", "2"], [0, 0], ["train", "test"], ["g", "g"]))


@pytest.mark.parametrize(
    ("then", "classes", "test"),
    [
        ("keep", ["c0", "c1", "c2", "c3", "c4"], [25, 10, 4, 0, 0]),
        ("drop", ["c0", "c1", "c2"], [25, 10, 4]),
        ("merge", ["c0", "c1", "c2", "other"], [25, 10, 4, 2]),
    ],
)
def test_small_classes(then, classes, test):
    small = SmallClasses(n=3, then=then)
    images, notes = splits.treat_small_classes(skewed(), small)
    assert images.classes == classes
    held(images, 0.5, small if then == "keep" else None)
    assert images.sizes("test").tolist() == test
    assert bool(notes) == (then != "keep")
    assert all("c3, c4" in note for note in notes)


def messy(root):
    """Three classes; one image also in test, one under two labels, one twice in a class; a class of one image."""
    folder(root, train__cat=6, train__dog=4, train__lynx=1, test__cat=2, test__dog=2)
    for old, new in (("cat/0", "../test/cat/9"), ("cat/1", "dog/9"), ("cat/2", "cat/9")):
        data = (root / f"train/{old}.png").read_bytes()
        (root / f"train/{new}.png").resolve().write_bytes(data)
    return {"root": str(root), "transform": {"size": 32, "resize": 36}}


def test_copies_are_counted_and_named(tmp_path):
    rows, facts, said = prepared(tmp_path, "image_folder", messy(tmp_path / "i"))
    assert len(rows) == 6 + 4 + 1 + 2 + 2 + 3
    text = " ".join(said)
    assert "1 image under two labels, such as train/cat/1.png (cat, train) and train/dog/9.png (dog, train)" in text
    assert "1 image in two splits, such as train/cat/0.png (cat, train) and test/cat/9.png (cat, test)" in text
    assert "1 image more than once" in text
    assert "no test images of 1 class of 3, trained but not measured: lynx" in text
    assert facts["counts"] == [7, 5, 1]


def test_copies_among_test_images_are_said_to_count_as_one(tmp_path):
    said, options = "count as one image in intervals", messy(tmp_path / "i")
    assert said not in " ".join(prepared(tmp_path, "image_folder", options)[2])
    shutil.copy(tmp_path / "i/test/dog/0.png", tmp_path / "i/test/dog/8.png")
    assert said in " ".join(prepared(tmp_path, "image_folder", options)[2])
    assert said not in " ".join(prepared(tmp_path, "image_folder", options, duplicates="drop")[2])


def test_copies_are_refused_or_dropped(tmp_path):
    options = messy(tmp_path / "i")
    with pytest.raises(UserError, match=r"prepare\.duplicates=refuse: images must differ; got 1 image under two"):
        prepared(tmp_path, "image_folder", options, duplicates="refuse")
    rows, facts, said = prepared(tmp_path, "image_folder", options, duplicates="drop")
    kept = {row["source"] for row in rows}
    assert not kept & {"train/cat/0.png", "train/cat/1.png", "train/dog/9.png", "train/cat/9.png"}
    assert {"test/cat/9.png", "train/cat/2.png"} <= kept
    assert facts["counts"] == [4, 4, 1]
    assert "leaves out 4 images" in " ".join(said)


def test_an_imbalance_that_is_asked_for_says_what_it_cuts(tmp_path):
    root = folder(tmp_path / "i", cat=8, dog=4, test__cat=1)
    options = {"root": root, "train": ".", "transform": {"size": 32, "resize": 36}}
    for name in ("cat", "dog"):
        (tmp_path / "i" / "train").mkdir(exist_ok=True)
        (tmp_path / "i" / name).rename(tmp_path / "i/train" / name)
    options["train"] = "train"
    _, facts, said = prepared(tmp_path, "image_folder", options)
    assert facts["counts"] == [8, 4]
    assert not [line for line in said if "imbalance" in line]
    _, facts, said = prepared(tmp_path, "image_folder", options, imbalance={"profile": "exponential", "ratio": 2.0})
    assert sum(facts["counts"]) == 6
    assert "imbalance: 6 of 12 training images are kept; the classes have 8 to 4 as they are" in " ".join(said)


def test_both_ways_of_holding_out_are_refused():
    with pytest.raises(UserError, match="set test or test_per_class, not both"):
        params.build(prepare.Params, "prepare", {"dataset": "digits", "test": 0.2, "test_per_class": 3})


def test_no_test_images_names_the_ways_out(tmp_path):
    options = {"root": folder(tmp_path, cat=3, dog=1), "train": "."}
    with pytest.raises(UserError, match=r"prepare\.test: must be set.*such as 0\.2.*prepare\.options\.test"):
        prepare.run(prepare.Params(dataset="image_folder", options=options), Run("prepare", tmp_path / "out"))


# Pixels.


def turned(orientation) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)


def test_exif_orientation_is_applied_where_asked():
    assert decode(turned(6), exif=True).shape == (4, 2, 3)
    assert decode(turned(6)).shape == (2, 4, 3)
    assert decode(turned(1), exif=True).shape == (2, 4, 3)
    assert plugins.load("datasets", "image_folder").Options(root=".").transform.exif == "apply"
    assert plugins.load("datasets", "imagenet_lt").Options(root=".").transform.exif == "ignore"


def test_a_range_spreads_16_bits_and_floats():
    twelve = np.array([[0, 2048, 4095, 9000]], np.uint16)
    assert decode(encoded(Image.fromarray(twelve), "PNG"), levels=[0, 4095])[0, :, 0].tolist() == [0, 128, 255, 255]
    floats = Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32))
    assert decode(encoded(floats, "TIFF"), levels=[-1, 1])[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match=r"set prepare\.options\.transform\.range"):
        decode(encoded(floats, "TIFF"))
    with pytest.raises(ValueError, match="NaN"):
        decode(encoded(Image.fromarray(np.full((1, 1), np.nan, np.float32)), "TIFF"), levels=[0, 1])


def test_pages_and_dicom_say_what_to_do():
    pages = [Image.new("L", (4, 4), v) for v in (1, 2, 3)]
    with pytest.raises(ValueError, match="is a TIFF of 3 pages; save each page"):
        decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    with pytest.raises(ValueError, match="is a DICOM file; convert it"):
        decode(bytes(128) + b"DICM" + bytes(100))


def test_a_partial_transform_keeps_the_other_defaults():
    options = plugins.load("datasets", "image_folder").Options(root=".", transform={"size": 64, "resize": 72})
    default = plugins.load("datasets", "image_folder").Options(root=".").transform
    assert options.transform == default.model_copy(update={"size": 64, "resize": 72})


def test_interpolation_changes_the_pixels_and_old_records_stay_equal():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    plain = {"size": 16, "resize": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    sharp = Transform(**plain, interpolation="lanczos")
    assert (images.for_evaluation(image, sharp) != images.for_evaluation(image, Transform(**plain))).any()
    assert not {"interpolation", "exif", "range"} & set(Transform(**plain).model_dump())
    assert sharp.model_dump()["interpolation"] == "lanczos"
    assert Transform(**sharp.model_dump()) == sharp
