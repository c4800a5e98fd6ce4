"""Files as users have them: stray quotation marks, folders that file servers make, headers at the end of a file."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_builders import write_image
from PIL import Image

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.classes import describe_similar
from h2t.pipeline.datasets import table as table_dataset
from h2t.pipeline.project import describe, detect, survey
from h2t.pipeline.stages import prepare

NOISE = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)


@pytest.fixture
def photos(tmp_path):
    """A folder of twelve images, without labels."""
    for i in range(12):
        write_image(tmp_path / "photos" / f"{i}.png", i)
    return tmp_path / "photos"


@pytest.fixture
def classes(tmp_path):
    """A folder of two classes."""
    for i in range(6):
        write_image(tmp_path / "classes" / ("cat", "dog")[i % 2] / f"{i}.png", i)
    return tmp_path / "classes"


def rows(first: int = 0, last: int = 12) -> list[str]:
    return [f"{i}.png,{'ab'[i % 2]}" for i in range(first, last)]


def table(photos, *lines: str, name: str = "labels.csv"):
    (photos / name).write_text("\n".join(lines) + "\n")
    return photos


def refusal(data) -> str:
    with pytest.raises(UserError) as caught:
        detect.detect(data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stray", "says"),
    [('5.png,"b', "row 6 opens a quotation mark that nothing closes"), ('"5.png,b', "Row #7: Expected 2 columns")],
)
def test_a_quotation_mark_that_is_left_open_loses_no_row(photos, stray, says):
    assert says in refusal(table(photos, "file_name,label", *rows(0, 5), stray, *rows(6)))


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ('5.png,"b', '9.png,"b', "row 6: a label must be one line; got 'b\\n6.png,a"),
        ('"5.png,b', '9.png",b', "row 6: must be the path of an image; got '5.png,b\\n6.png,a"),
    ],
)
def test_two_stray_quotation_marks_lose_no_row(photos, first, second, says):
    lines = ["file_name,label", *rows(0, 5), first, *rows(6, 9), second, *rows(10)]
    line = refusal(table(photos, *lines))
    assert says in line
    assert "a stray quotation mark joins lines" in line


def test_inches_and_a_last_line_in_quotes_are_no_open_marks(photos):
    lines = ["file_name,label", *rows(0, 10), '10.png,5"', '11.png,"b"']
    assert detect.detect(table(photos, *lines)).collection.classes == ['5"', "a", "b"]


def test_a_column_that_is_there_twice_is_not_chosen(photos):
    line = refusal(table(photos, "file_name,label,label", *(f"{row},c" for row in rows())))
    assert "column 'label': must be there once; got 2 columns of this name" in line


@pytest.mark.parametrize("lines", [rows(), ["file_name,label", *rows(0, 11), '11.png,"b']], ids=["header", "quote"])
def test_a_refused_table_ends_the_command_in_order(photos, tmp_path, lines):
    """A thread of Arrow that lets go of a Python object after Python has ended ends the process with SIGABRT."""
    table(photos, *lines)
    command = [sys.executable, "-m", "h2t.pipeline", "init", str(tmp_path / "p"), "--data", str(photos)]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


def test_json_lines_keep_texts_that_look_like_times_and_need_no_other_column(photos):
    lines = [
        json.dumps({"file_name": f"{i}.png", "label": f"202{i % 2}-01-01", "site": "2026-01-02", "x": (i, "?")[i % 2]})
        for i in range(12)
    ]
    found = detect.detect(table(photos, *lines, name="metadata.jsonl"))
    assert found.collection.classes == ["2020-01-01", "2021-01-01"]
    assert set(found.collection.group) == {"2026-01-02"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": ', "line 2 is no JSON"),
        ("[1]", "line 2 must be an object in braces"),
        ("[" * 100_000, "line 2 is nested too deeply"),
        ('{"file_name": "0.png", "label": "\\ud800"}', "must be a readable table"),
        ('{"file_name": "0.png", "label": 1, "x": "\\ud800"}\n{"file_name": "\\ud800", "label": 2}', "readable table"),
    ],
)
def test_json_lines_that_are_none(photos, line, says):
    assert says in refusal(table(photos, '{"file_name": "1.png", "label": "a"}', line, name="metadata.jsonl"))


def test_a_path_too_long_for_any_file_is_one_line(photos):
    long = "x" * 300
    assert "(File name too long)" in refusal(table(photos, "file_name,label", *rows(), f"{long}\\a,a"))
    assert "row 13: must be the path of an image" in refusal(
        table(photos, "file_name,label", *rows(), f'"a\n{long}",a')
    )
    assert "nor in a folder beside the table" in refusal(table(photos, "file_name,label", f"{long},a"))


def test_what_a_mac_put_beside_a_table_is_no_table(photos):
    (photos / "._labels.csv").write_bytes(b"\0\5\x16\7\xff")
    (photos / "._train-0.parquet").write_bytes(b"\0\5\x16\7\xff")
    assert detect.detect(table(photos, "file_name,label", *rows())).dataset == "table"


@pytest.mark.parametrize("beside", ["__MACOSX/._x", "Thumbs.db", "desktop.ini", "@eaDir/x"])
def test_a_folder_around_all_is_seen_beside_what_systems_make(classes, beside):
    path = classes.parent / beside
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    assert detect.detect(classes.parent).collection.classes == ["cat", "dog"]


def test_previews_and_waste_are_no_images_and_said(classes):
    for place in ("@eaDir", "cat/@eaDir/0.png", "#recycle/cat", "$RECYCLE.BIN"):
        write_image(classes / place / "SYNOPHOTO_THUMB_M.jpg", 99)
    images = detect.detect(classes).collection
    assert (images.classes, len(images.source)) == (["cat", "dog"], 6)
    assert "4 folders of the operating system left out: #recycle, $RECYCLE.BIN, @eaDir" in " ".join(images.notes)


def test_what_lies_beside_the_folders_of_splits_is_said(tmp_path):
    for i, split in enumerate(("train", "val", "validation", "test", "testing", "more")):
        for name in ("cat", "dog"):
            write_image(tmp_path / split / name / "0.png", i)
    write_image(tmp_path / "loose.png")
    notes = " ".join(detect.detect(tmp_path).collection.notes)
    assert "3 folders beside test, train, val left out: more, testing, validation" in notes
    assert "1 image in no folder of a split, left out; first: loose.png" in notes


def test_photos_of_other_kinds_are_named_where_there_are_no_others(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "IMG_1.HEIC").write_bytes(b"x")
    assert "got no images, but .heic 2 (convert photos of other kinds to JPEG or PNG)" in refusal(tmp_path)


LARGE = {"a.tif": {"compression": "tiff_lzw"}, "a.webp": {"lossless": True}, "a.avif": {"quality": 100}, "a.png": {}}


@pytest.mark.parametrize(("name", "more"), LARGE.items(), ids=LARGE)
def test_headers_are_found_wherever_they_lie(classes, name, more):
    Image.fromarray(NOISE).save(classes / "cat" / name, **more)
    assert (classes / "cat" / name).stat().st_size > survey.HEADER_BYTES
    seen = survey.survey(detect.detect(classes), headers=True)
    assert not seen.unreadable
    assert seen.short_side.max() == len(NOISE)


def test_headers_of_a_pipe_are_not_waited_for(classes):
    os.mkfifo(classes / "cat/pipe.png")
    seen = survey.survey(detect.detect(classes), headers=True)
    assert list(seen.unreadable.values()) == ["cannot be read (not a plain file)"]


def test_names_do_not_control_the_terminal(tmp_path):
    for i, name in enumerate(("a\nb", "\x1b[31mred", "\u202eleft")):
        write_image(tmp_path / name / "0.png", i)
        write_image(tmp_path / name / "1.png", i)
    (tmp_path / "none\n").mkdir()
    found = detect.detect(tmp_path)
    lines = list(describe.lines(found, survey.survey(found)))
    assert all(line.isprintable() for line in lines)
    assert any(line.startswith("  a\\nb ") for line in lines)


def test_class_names_that_differ_by_signs_without_width_are_said():
    assert "invisible signs or Unicode form: 'a' and 'a\\u200b'; each" in describe_similar(["a", "a\u200b"])[0]


def test_warnings_of_pillow_are_not_printed(classes, tmp_path, capfd):
    Image.new("L", (10_000, 9_999)).save(classes / "cat/large.png")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x02\x02\0\x02\0\0\xff\xff\0\0\xff\xff"
    Image.new("RGB", (40, 40)).save(classes / "cat/exif.jpg", exif=exif)
    command = [sys.executable, "-m", "h2t.pipeline", "init", str(tmp_path / "p"), "--data", str(classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cat/large.png has 10000x9999 pixels" in done.stdout
    assert done.stderr == ""


def test_prepare_says_names_on_one_line(classes, tmp_path):
    (classes / "none\nat all").mkdir()
    said: list[str] = []
    options = {"root": str(classes), "train": "."}
    values = prepare.Params.model_validate({"dataset": "image_folder", "options": options, "test": 0.4})
    prepare.run(values, Run("prepare", tmp_path / "out", say=said.append))
    assert "so no class: none\\nat all" in said[0]
    assert all(line.isprintable() for line in said)


def test_a_folder_may_begin_with_a_tilde(classes):
    for i in range(2):
        write_image(classes / "~birds" / f"{i}.png", i)
    assert detect.detect(classes).collection.classes == ["cat", "dog", "~birds"]


def stored(folder, name: str = "image", more=None, **columns):
    """A Parquet file of twelve images in the column `name`; `more` makes an Arrow column of the list of images."""
    images = [write_image(folder.parent / f"{i}.png", i).read_bytes() for i in range(12)]
    folder.mkdir(exist_ok=True)
    column = (more or pa.array)(images)
    rows = pa.table({**columns, name: column, "label": [i % 2 for i in range(12)]})
    pq.write_table(rows.replace_schema_metadata({"classes": "cat,dog"}), folder / "train-0.parquet")
    return folder


KINDS = {
    "dictionary": lambda images: pa.array(images).dictionary_encode(),
    "view": lambda images: pa.array(images, pa.binary_view()),
    "large": lambda images: pa.array(images, pa.large_binary()),
    "struct of views": lambda images: pa.array(
        [{"bytes": image} for image in images], pa.struct([("bytes", pa.binary_view())])
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_bytes_is_read(tmp_path, kind):
    found = detect.detect(stored(tmp_path / "d", more=kind))
    assert not survey.survey(found).unreadable
    assert found.collection.classes == ["cat", "dog"]


def test_of_several_columns_of_bytes_the_one_of_a_usual_name_is_read(tmp_path):
    folder = stored(tmp_path / "d", "Image", hash=[b"x"] * 12)
    assert detect.detect(folder).options["bytes"] == "Image"


def test_a_row_without_an_image_is_left_out_like_a_bad_one(tmp_path):
    folder = stored(tmp_path / "d", more=lambda images: pa.array([None, *images[1:]]))
    found = detect.detect(folder)
    assert survey.survey(found).unreadable == {0: "is missing: its row holds no bytes"}
    said: list[str] = []
    section = {"dataset": "table", "options": found.options, "test": 0.4, "bad_images": "skip"}
    prepare.run(prepare.Params.model_validate(section), Run("prepare", tmp_path / "out", say=said.append))
    assert "1 bad image left out, listed in skipped.parquet; first: train-0.parquet:000000000 is miss" in " ".join(said)


def test_names_of_classes_are_no_names_of_groups(tmp_path):
    found = detect.detect(stored(tmp_path / "d", site=[i // 2 for i in range(12)]))
    assert list(found.collection.group) == [str(i // 2) for i in range(12)]


def test_a_column_of_lists_is_no_column_of_paths(tmp_path):
    line = refusal(stored(tmp_path / "d", more=lambda images: pa.array([[image] for image in images])))
    assert "column 'image': must hold paths or encoded images; got list; correct the file" in line


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["path,label,site", "0.png,y,s0", '1.png,y,"s1', "2.png,y,s2", '3.png,y,s3"'], "a group must be one line"),
        (['path,"label', "1.png,x"], "the header opens a quotation mark"),
        (["path,label", *["some/path/to/an/image.png,y"] * 60_000, 'a.png,"x', *["a/path/to/an/image.png,y"] * 60_000],
         "row 60001 opens a quotation mark that nothing closes"),
    ],
)  # fmt: skip
def test_a_quotation_mark_is_named_wherever_it_stands(tmp_path, lines, says):
    (tmp_path / "l.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "0.png").touch()
    options = {"table": str(tmp_path / "l.csv"), "path": "path", "label": "label", "root": str(tmp_path)}
    with pytest.raises(UserError, match=says):
        table_dataset.load(table_dataset.Options(**options, **({"group": "site"} if "site" in lines[0] else {})))


def test_rows_that_quotation_marks_hide_in_a_column_that_is_not_read_are_said(tmp_path):
    rows = [f"{i}.png,y,{note}" for i, note in enumerate(["short", '"tall', "thin", 'wide"', "old"])]
    (tmp_path / "l.csv").write_text("\n".join(["path,label,note", *rows]) + "\n")
    (tmp_path / "0.png").touch()
    options = {"table": str(tmp_path / "l.csv"), "path": "path", "label": "label", "root": str(tmp_path)}
    found = table_dataset.load(table_dataset.Options(**options))
    assert len(found.label) == 3
    (note,) = found.notes
    assert "5 lines below the header, but 3 rows" in note
