"""`h2t init`: what it finds in collections of every kind, says about them and writes."""

import contextlib
import csv
import shlex
import subprocess
from pathlib import Path

import numpy as np
import own_data
import printed
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from dvc.config import Config
from dvc.repo import Repo
from PIL import Image
from pipeline_builders import ROOT, accepted, invoke, refused
from repositories import dvc, git

from h2t.pipeline.backbones import resnet20, resnet32
from h2t.pipeline.base import params
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.inspection import settings
from h2t.pipeline.networks.weights import save_weights
from h2t.pipeline.project import choose, describe, detect, survey, write
from h2t.pipeline.stages import evaluate, prepare


def said(found, seen) -> str:
    return "\n".join(describe.lines(found, seen))


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    """Folder of the six collections, and the number of usable images of each."""
    folder = tmp_path_factory.mktemp("collections")
    usable = {name: make(folder / name) for name, (make, _) in own_data.COLLECTIONS.items()}
    wren = folder / "messy/wren"
    next(path for path in wren.iterdir() if path.name.startswith("caf")).rename(wren / "cafe.jpg")
    return folder, usable


DETECTED = {
    "skewed": ("image_folder", {"root": ".", "train": "."}),
    "metadata": ("table", {"table": "metadata.csv", "path": "file_name", "label": "species"}),
    "sites": ("table", {"table": "observations.csv", "path": "Image", "label": "Label", "group": "Site"}),
    "parquet": (
        "table",
        {
            "table": {"train": "data/train*.parquet", "test": "data/test*.parquet"},
            "bytes": "image",
            "label": "label",
        },
    ),
    "rare": ("image_folder", {"root": ".", "train": "."}),
    "messy": ("image_folder", {"root": ".", "train": "."}),
}


def below(value, folder: Path):
    """`value` with paths relative to `folder`."""
    if isinstance(value, dict):
        return {key: below(part, folder) for key, part in value.items()}
    return str(Path(value).relative_to(folder)) if str(value).startswith("/") else value


@pytest.mark.parametrize("name", DETECTED)
def test_every_collection_is_read_whole_and_its_settings_are_valid(collections, name, tmp_path):
    folder, usable = collections[0] / name, collections[1][name]
    found = detect.detect(folder)
    assert (found.dataset, below(found.options, folder)) == DETECTED[name]
    seen = survey.survey(found)
    left_out = len(seen.unreadable) + sum(len(group) for group in seen.digests.copies())
    kept = {"messy": 1}.get(name, 0)  # of the two copies in one class one stays
    assert len(found.collection.source) == usable + left_out - kept
    chosen = choose.choose(found, seen, None)
    text = write.parameters(tmp_path, found, chosen, name)
    assert len([line for line in text.splitlines() if line.strip()]) <= 40
    (tmp_path / "params.yaml").write_text(text)
    values = params.load(tmp_path / "params.yaml")
    settings.check(values)
    assert "imbalance" not in values["prepare"]
    assert ("test" in values["prepare"]) == (name != "parquet")
    assert values["prepare"]["options"]["transform"]["size"] == own_data.SIDE
    lines: list[str] = []
    section = params.build(prepare.Params, "prepare", values["prepare"])
    prepare.run(section, Run("prepare", tmp_path / "out", say=lines.append))
    samples = pq.read_table(tmp_path / "out/samples.parquet")
    assert samples.num_rows == usable
    assert {"train", "val", "test"} == set(samples["split"].to_pylist())
    if name == "rare":
        assert [line for line in lines if line.startswith("note: no test images of 3 classes of 8")]
    if name == "sites":
        site = {row["Image"][4:]: row["Site"] for row in rows_of(folder / "observations.csv")}
        both = {(site[source.removeprefix("img/")], split) for source, split in split_of(samples)}
        assert len(both) == len({place for place, _ in both})


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


def split_of(samples) -> list[tuple[str, str]]:
    return list(zip(samples["source"].to_pylist(), samples["split"].to_pylist(), strict=True))


def test_a_messy_collection_is_described(collections):
    found = detect.detect(collections[0] / "messy")
    seen = survey.survey(found)
    text = said(found, seen)
    for line in (
        "129 images in 5 classes (dataset image_folder); train 129",
        "Rotkehlchen      60 " + 40 * "█",
        "RGB 125, CMYK 1, I;16 1",
        "1 image turned",
        "1 file of other kinds left out: .txt 1",
        "2 images, left out (bad_images: skip)",
        "owl/empty.png is empty, 0 bytes",
        "1 image under two labels, such as owl/001.jpg (owl, train) and wren/also.jpg (wren, train)",
    ):
        assert line in text, line
    chosen = choose.choose(found, seen, None).prepare
    assert chosen["options"]["transform"]["range"] == [0.0, 4095.0]
    assert (chosen["bad_images"], chosen["duplicates"]) == ("skip", "drop")


def test_headers_alone_tell_sizes(collections):
    found = detect.detect(collections[0] / "skewed")
    seen = survey.survey(found, headers=True)
    assert (seen.short_side == own_data.SIDE).all()
    assert "not looked for; --check all" in said(found, seen)


def test_many_classes_are_shortened():
    names = [f"class {j}" for j in range(100)]
    lines = list(describe.bars(names, [j for j in range(100) for _ in range(100 - j)], "#"))
    assert len(lines) == describe.MOST + 1
    assert lines[describe.MOST - describe.LAST] == "  ... 80 classes between"


def test_classes_of_similar_names_are_named_by_init_and_prepare(tmp_path):
    own_data.sort(tmp_path / "photos", {"cat": 9, "Cat": 6})
    with contextlib.chdir(tmp_path):
        first = accepted("init", "--data", "photos")
        accepted("watch", "images", "inputs/images.json")
        accepted("inputs", "inputs", "data/inputs")
        for said in (first, accepted("prepare", "data/prepare")):
            assert "differ only by case, spaces, invisible signs or Unicode form: 'Cat' and 'cat'; each" in said


def test_folders_of_splits_and_a_folder_around_all(tmp_path):
    for part in ("training", "valid", "test"):
        own_data.sort(tmp_path / "archive/photos" / part, {"a": 2, "b": 1})
    found = detect.detect(tmp_path / "archive")
    assert below(found.options, tmp_path) == {
        "root": "archive/photos",
        "train": "training",
        "val": "valid",
        "test": "test",
    }
    chosen = choose.choose(found, survey.survey(found), None).prepare
    assert not {"test", "validation"} & set(chosen)


def test_tables_of_splits_and_images_elsewhere(tmp_path):
    own_data.sort(tmp_path / "pool", {"x": 4})
    for part, numbers in (("train", "012"), ("test", "3")):
        lines = "".join(f"{tmp_path}/pool/x/00{n}.jpg,k\n" for n in numbers)
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / f"lists/{part}.csv").write_text(f"path,class\n{lines}")
    found = detect.detect(tmp_path / "lists/train.csv")
    assert found.inputs == {"images": tmp_path / "pool/x", "table": tmp_path / "lists/train.csv"}
    assert found.written()["table"] == "inputs/table"


def test_hugging_face_folders_of_splits(tmp_path):
    for part in ("train", "test"):
        put(tmp_path / part / "metadata.jsonl", '{"file_name": "a.jpg", "label": "k"}\n', a=True)
    found = detect.detect(tmp_path)
    assert found.inputs == {"images": tmp_path}
    assert below(found.options, tmp_path)["table"] == {s: f"{s}/metadata.jsonl" for s in ("train", "test")}
    assert found.collection.source == ["train/a.jpg", "test/a.jpg"]
    assert (survey.survey(found, headers=True).short_side == own_data.SIDE).all()


WRONG = {
    "nothing there": (lambda f: f / "none", "no such file or folder"),
    "an empty folder": (lambda f: f, "no labels found"),
    "no table": (lambda f: put(f / "x.xlsx", "PK"), "must be a folder of images or a table that ends in"),
    "no labels": (lambda f: put(f / "x.csv", "file_name,size\na.jpg,1\n", a=True), "which column holds the labels?"),
    "no paths": (lambda f: put(f / "x.csv", "name,label\na,b\n"), "no column of image paths found"),
    "no such files": (lambda f: put(f / "x.csv", "path,label\nb.jpg,b\n"), "no file"),
    "loose images": (lambda f: put(f / "a.jpg", "", a=True).parent, "no labels found"),
    "two tables": (lambda f: two_tables(f), "several tables (a.csv, b.csv); name one of them"),
    "no images": (lambda f: put(f / "c/notes.txt", "x").parent.parent, "must hold a folder of images per class"),
    "one class": (lambda f: own_data.sort(f, {"c": 3}) and f, "two or more classes must have training images; got one"),
    "a class for each image": (lambda f: own_data.sort(f, {"a": 1, "b": 1}) and f, "no class has two images"),
    "no rows": (lambda f: put(f / "x.csv", "path,label\n"), "has no rows"),
    "images all over the disk": (
        lambda f: put(f / "x.csv", f"path,label\n{f}/a.jpg,k\n/elsewhere/b.jpg,l\n", a=True),
        "images must lie in one folder, which DVC watches; got",
    ),
    "a split of another name": (
        lambda f: put(f / "x.csv", "path,label,split\na.jpg,k,train\nb.jpg,l,holdout\n", a=True),
        "column 'split': must be train, val or test for each image; got 'holdout'",
    ),
    "damaged images": (lambda f: put(f / "c/a.jpg", "x").parent.parent, "no image can be read; the first is in no"),
}


def put(path: Path, text: str, *, a: bool = False) -> Path:
    """Writes a file, with `a` also an image a.jpg beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if a:
        path.with_name("a.jpg").write_bytes(own_data.encoded(own_data.picture(0, 0)))
    return path


def two_tables(folder: Path) -> Path:
    for name in ("a", "b"):
        put(folder / f"{name}.csv", "path,label\na.jpg,b\n", a=True)
    return folder


@pytest.mark.parametrize(("make", "says"), WRONG.values(), ids=WRONG)
def test_wrong_data_is_one_line_and_nothing_is_written(make, says, tmp_path):
    (tmp_path / "d").mkdir()
    line = refused("init", str(tmp_path / "p"), "--data", str(make(tmp_path / "d")), code=1)
    assert says in line
    assert not (tmp_path / "p").exists()


def test_places_where_images_and_results_would_mix(tmp_path):
    own_data.sort(tmp_path / "data/images", {"a": 2, "b": 2})
    for folder, says in (("data/images/project", "must not lie in the folder of the images"), (".", "results will be")):
        with pytest.raises(UserError, match=says):
            write.check_places(
                tmp_path / folder, detect.detect(tmp_path / "data/images"), tmp_path / "data/images", None
            )
    own_data.sort(tmp_path / "photos", {"a": 2, "b": 2})
    with pytest.raises(UserError, match="so the weights cannot lie there"):
        photos = tmp_path / "photos"
        write.check_places(tmp_path / "p", detect.detect(photos), photos, tmp_path / "p/data/w.safetensors")


def test_a_project_is_written_once(tmp_path):
    own_data.sort(tmp_path / "p/photos", {"a": 9, "b": 6})
    with contextlib.chdir(tmp_path / "p"):
        result = accepted("init", "--data", "photos")
        assert result.endswith("next: dvc repro\n")
        assert result.count("initialised") == 2
        values = yaml.safe_load(Path("params.yaml").read_text())
        assert values["inputs"] == {"images": "photos"}
        assert Path("dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()
        assert Path("stages.yaml").read_text() == (ROOT / "stages.yaml").read_text()
        assert {"/data/", "/photos"} <= set(Path(".gitignore").read_text().split())
        assert Path(".dvc/plots/ratio.json").is_file()
        assert Path("plugins/hosts").is_dir()
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        line = refused("init", "--data", "photos", code=2)
        assert line.startswith("error: params.yaml: exists already")
        assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("own", ["", "model"])
def test_git_ignores_what_the_documented_commands_write_but_no_code_of_the_user(tmp_path, own):
    """That is `h2t export ... model` and `h2t report --compare A B comparison`, here and in a project of one's own."""
    own_data.sort(tmp_path / "photos", {"a": 9, "b": 6})
    if own:
        (tmp_path / own).mkdir()
    with contextlib.chdir(tmp_path):
        accepted("init", "--data", "photos")
    ignored = {"/model/", "/comparison/"}
    assert ignored - set((tmp_path / ".gitignore").read_text().split()) == {f"/{own}/"} & ignored
    assert ignored <= set((ROOT / ".gitignore").read_text().split())


@pytest.mark.parametrize("attributes", ["", "*.png binary\n* text=auto\n"], ids=["", "own attributes"])
def test_a_clone_with_windows_line_ends_has_the_inputs_and_plugins_that_stages_ran_on(tmp_path, attributes):
    own_data.sort(tmp_path / "a/photos", {"a": 9, "b": 6})
    if attributes:
        (tmp_path / "a/.gitattributes").write_text(attributes)
    with contextlib.chdir(tmp_path / "a"):
        assert ".gitattributes" in accepted("init", "--data", "photos")
        assert Path(".gitattributes").read_text().startswith(attributes)
        Path("plugins/hosts/mine.py").write_text("first = 1\nsecond = 2\n")
        Path("dvc.yaml").write_text("stages: {all: {cmd: mkdir made, deps: [inputs, plugins], outs: [made]}}\n")
    dvc("repro", where=tmp_path / "a")
    git("add", ".", where=tmp_path / "a")
    git("commit", "--quiet", "--message=all", where=tmp_path / "a")
    git("clone", "--quiet", "--config=core.autocrlf=true", "a", "b", where=tmp_path)
    assert b"\r\n" in (tmp_path / "b/dvc.yaml").read_bytes()  # so git does change line ends here
    with contextlib.chdir(tmp_path / "b"), Repo() as repo:
        assert repo.status() == {"all": [{"changed outs": {"made": "not in cache"}}]}


@pytest.mark.parametrize("name", ["[ab]", "a*", "x ", "#a b", "!a", "a\\b", "a?"])
def test_images_in_the_project_are_ignored_by_git_and_nothing_else_is(tmp_path, name):
    own_data.sort(tmp_path / "p" / name, {"a": 9, "b": 6})
    (tmp_path / "p/ab").mkdir()
    (tmp_path / "p/ab/notes.txt").touch()
    with contextlib.chdir(tmp_path / "p"):
        accepted("init", "--data", f"./{name}")
        status = ["git", "status", "--porcelain", "-z", "--untracked-files=all"]
        listed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert f"{name}/" not in listed
    assert "?? ab/notes.txt" in listed


def test_a_project_without_git_has_one_section_core(tmp_path, monkeypatch):
    """DVC refuses a configuration with two sections of a name."""
    own_data.sort(tmp_path / "p/photos", {"a": 9, "b": 6})
    monkeypatch.setenv("PATH", str(tmp_path))
    with contextlib.chdir(tmp_path / "p"):
        assert "git: not installed" in accepted("init", "--data", "photos")
        core = Config(str(Path(".dvc").absolute())).load_one("repo")["core"]
    assert core == {"no_scm": "True", "analytics": "false", "autostage": "false"}


def test_a_command_that_was_killed_after_dvc_init_goes_on(tmp_path):
    own_data.sort(tmp_path / "p/photos", {"a": 9, "b": 6})
    (tmp_path / "p/.dvc").mkdir()
    (tmp_path / "p/.dvc/config").write_text("\n")
    with contextlib.chdir(tmp_path / "p"):
        accepted("init", "--data", "photos")
    made = (tmp_path / "p/.dvc/config").read_text()
    assert "symlink" in made
    assert "no_scm" not in made


def test_a_command_that_was_killed_between_its_files_goes_on(tmp_path):
    own_data.sort(tmp_path / "p/photos", {"a": 9, "b": 6})
    with contextlib.chdir(tmp_path / "p"):
        accepted("init", "--data", "photos")
        whole = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and ".git/" not in str(path)}
        Path("params.yaml").unlink()
        Path("stages.yaml").rename("stages.yaml.partial")
        assert "wrote" in accepted("init", "--data", "photos")
        assert all(path.read_bytes() == held for path, held in whole.items())
        Path("params.yaml").unlink()
        Path("dvc.yaml").write_text("stages: {}")
        assert "dvc.yaml: exists already" in refused("init", "--data", "photos", code=2)


def test_a_folder_that_dvc_cannot_work_in_is_refused(tmp_path):
    own_data.sort(tmp_path / "a{seed}/photos", {"a": 9, "b": 6})
    with contextlib.chdir(tmp_path):
        line = refused("init", "p", "--data", "a{seed}/photos")
        assert "DVC cannot work where a path has { or }" in line
        assert refused("init", "a{seed}/p", "--data", "a{seed}/photos").count("{ or }") == 1
    assert not (tmp_path / "p").exists()


def test_what_lies_in_a_folder_of_dvc_without_its_config_stays(tmp_path):
    own_data.sort(tmp_path / "p/photos", {"a": 9, "b": 6})
    kept = tmp_path / "p/.dvc/cache/files/md5/ab/cd"
    kept.parent.mkdir(parents=True)
    kept.write_text("an object")
    with contextlib.chdir(tmp_path / "p"):
        assert ".dvc: must have a file config" in refused("init", "--data", "photos")
    assert kept.read_text() == "an object"


def test_the_command_of_the_docs(tmp_path, monkeypatch):
    own_data.sort(tmp_path / "photos", {"a": 9, "b": 6})
    monkeypatch.setenv("HOME", str(tmp_path))
    (block,) = printed.blocks("docs/own-data.md")
    with contextlib.chdir(tmp_path):
        assert accepted(*shlex.split(block)[1:]).endswith("next: cd birds && dvc repro\n")
    assert params.load(tmp_path / "birds/params.yaml")["inputs"] == {"images": str(tmp_path / "photos")}


def test_sensitivity_by_patient_as_the_page_shows_it(tmp_path, capsys):
    """Ten patients of two images with the finding, of which one is found, and 20 normal images in their own groups."""
    place = tmp_path / "data/evaluate/dr"
    place.mkdir(parents=True)
    label = np.repeat([1, 0], 20)
    sure = np.where(np.arange(40) % 2, 0.88, 0.6)
    predicted = np.where(np.arange(40) % 2, 0, label)  # every second image is called normal: surely
    score = np.where(predicted == 1, 1, -1) * np.log(sure / (1 - sure))
    group = np.concatenate([np.arange(20) // 2, np.arange(10, 30)])
    columns = {"number": np.zeros(40, int), "label": label, "score": score.astype(np.float32)}
    pq.write_table(pa.table({**columns, "image_group": group}), place / "predictions.parquet")
    (block,) = printed.blocks("docs/own-data.md", "python")
    with contextlib.chdir(tmp_path):
        exec(block, {})
    assert capsys.readouterr().out.splitlines() == [
        "0.1: 1.000 [1.000, 1.000], specificity 0.000",
        "0.3: 0.500 [0.500, 0.500], specificity 0.500",
        "0.5: 0.500 [0.500, 0.500], specificity 1.000",
    ]


def test_the_commands_that_init_prints_can_be_typed_for_paths_with_spaces(tmp_path):
    own_data.sort(tmp_path / "my photos", {"a": 9, "b": 6})
    with contextlib.chdir(tmp_path):
        said = accepted("init", "my birds", "--data", "my photos")
        line = refused("init", "my photos/birds", "--data", "my photos").strip()
    assert shlex.split(said.rpartition("next: ")[2]) == ["cd", "my birds", "&&", "dvc", "repro"]
    assert shlex.split(line.rpartition("type: ")[2])[1:] == [
        *("init", str(tmp_path / "birds"), "--data", str(tmp_path / "my photos"))
    ]


def test_the_way_out_of_a_project_beside_its_table_keeps_the_table(tmp_path):
    own_data.sites(tmp_path / "plants")
    with contextlib.chdir(tmp_path / "plants"):
        line = refused("init", "answer", "--data", "observations.csv").strip()
        assert "wrote" in accepted(*shlex.split(line.rpartition("type: ")[2])[1:])
    assert (tmp_path / "answer/params.yaml").is_file()


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        (["photos"], ["test        up to 2 images of each class are held out, at most 40% of it",
                      "validation  up to 2 images of each class are held out, at most 25% of it"]),
        (["photos/train", "photos/test"], ["validation  up to 2 images of each class are held out, at most 25% of it"]),
        (["photos/train", "photos/val", "photos/test"], []),
    ],
)  # fmt: skip
def test_what_will_be_held_out_is_said(tmp_path, splits, says):
    for place in splits:
        own_data.sort(tmp_path / place, {"a": 9, "b": 6})
    found = detect.detect(tmp_path / "photos")
    assert choose.choose(found, survey.survey(found), None).notes == says


def test_a_pretrained_backbone_by_name(collections, tmp_path):
    found = detect.detect(collections[0] / "skewed")
    chosen = choose.choose(found, survey.survey(found, headers=True), "torchvision:efficientnet_b0")
    assert (chosen.name, chosen.backbone["options"]) == ("efficientnet_b0", {"model": "efficientnet_b0"})
    assert "transform" not in chosen.prepare["options"]
    (tmp_path / "params.yaml").write_text(write.parameters(tmp_path, found, chosen, "x"))
    settings.check(params.load(tmp_path / "params.yaml"))
    with pytest.raises(UserError, match="no backbone 'resnet5'; did you mean 'resnet"):
        choose.choose(found, survey.survey(found, headers=True), "resnet5")


def test_a_backbone_without_pretrained_weights_is_trained_at_the_size_of_the_photos(tmp_path):
    own_data.sort(tmp_path / "photos", {"a": 9, "b": 6})
    with contextlib.chdir(tmp_path):
        said = accepted("init", "p", "--data", "photos", "--backbone", "resnet32")
        values = params.load(tmp_path / "p/params.yaml")
        settings.check(values)
    assert "resnet32 has no pretrained weights, so it will be trained" in said
    assert "start" not in values["backbones"]["resnet32"]
    assert values["backbones"]["resnet32"]["epochs"] == 60
    assert values["prepare"]["options"]["transform"]["size"] == 40


def test_few_images_are_trained_on_for_500_steps_counted_after_others_are_held_out(tmp_path):
    own_data.sort(tmp_path / "photos", {"a": 170, "b": 110, "c": 20})
    with contextlib.chdir(tmp_path):
        accepted("init", "p", "--data", "photos", "--check", "headers")
    with contextlib.chdir(tmp_path / "p"):
        accepted("prepare", "data/prepare")
        epochs = params.load(Path("params.yaml"))["hosts"]["dr"]["optimiser"]["epochs"]
        steps = -(-sum(load_samples(Path("data/prepare")).counts) // 128)
    assert epochs == -(-500 // steps)
    assert steps < -(-300 // 128)


def test_weights_of_ones_own_are_an_input_and_nothing_is_trained(tmp_path):
    own_data.sort(tmp_path / "photos", {"a": 9, "b": 6})
    torch.manual_seed(0)
    own = Path(tmp_path, "my weights.safetensors")
    network = resnet32.build(resnet32.Options())
    head = {"fc.weight": torch.zeros(7, 64), "fc.bias": torch.zeros(7)}
    save_weights(own, {**network.state_dict(), **head}, {})
    with contextlib.chdir(tmp_path):
        accepted("init", "p", "--data", "photos", "--backbone", "resnet32", "--weights", "my weights.safetensors")
    with contextlib.chdir(tmp_path / "p"):
        values = params.load(Path("params.yaml"))
        settings.check(values)
        assert values["inputs"]["weights"] == str(own)
        assert values["prepare"]["options"]["transform"] == {"size": 40, "resize": 40}
        accepted("prepare", "data/prepare")
        said = accepted("train-backbone", "resnet32", "data/prepare", "data/train_backbone/resnet32")
    assert "weights from my weights.safetensors; nothing is trained" in said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--weights", "w.pth"], "add --backbone NAME"),
        (["--weights", "absent.pth", "--backbone", "resnet32"], "no such file"),
        (["--backbone", "w.pth"], "for a file of weights give the network too: --backbone NAME --weights w.pth"),
        (["--backbone", "resnet32:w.pth"], "type --backbone resnet32, with --weights FILE for weights of your own"),
    ],
)
def test_how_weights_of_ones_own_are_given_is_said(tmp_path, given, says):
    own_data.sort(tmp_path / "photos", {"a": 9, "b": 6})
    with contextlib.chdir(tmp_path):
        Path("w.pth").write_bytes(b"")
        assert says in refused("init", "p", "--data", "photos", *given)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("made", "says"),
    [
        (None, "not a readable checkpoint"),
        ({"fc.weight": torch.zeros(7, 64)}, "must hold weights for 'conv1.weight'"),
        (resnet20.build(resnet20.Options()).state_dict(), "must hold weights for 'layer1.3."),
    ],
    ids=["text", "a classifier alone", "another network"],
)
def test_weights_of_something_else_are_refused_before_an_image_is_read(tmp_path, monkeypatch, suffix, made, says):
    monkeypatch.chdir(tmp_path)
    file = Path("w").with_suffix(suffix)
    if made is None:
        file.write_text("no weights")
    elif suffix == ".pth":
        torch.save(made, file)
    else:
        save_weights(file, made, {})
    line = refused("init", "p", "--data", "no photos", "--backbone", "resnet32", "--weights", file)
    assert says in line
    assert str(file) in line
    assert not Path("p").exists()


def test_weights_that_could_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Path("x"), "w.pth")
    line = refused("init", "p", "--data", "no photos", "--backbone", "resnet32", "--weights", "w.pth")
    assert "w.pth: refused, it holds more than tensors" in line


def test_most_images_of_a_rare_class_stay_for_training(tmp_path):
    own_data.sort(tmp_path / "photos", {"normal": 400, "lesion": 20})
    found = detect.detect(tmp_path / "photos")
    chosen = choose.choose(found, survey.survey(found, headers=True), None).prepare
    assert chosen["test"] == {"at_most": 50, "share": 0.4}
    assert chosen["validation"] == {"at_most": 25, "share": 0.25}


def test_nearly_half_of_each_class_stays_for_training(tmp_path):
    own_data.sort(tmp_path / "photos", {"wren": 120, "owl": 34, "kite": 16, "stilt": 8})
    found = detect.detect(tmp_path / "photos")
    chosen = choose.choose(found, survey.survey(found, headers=True), None).prepare
    chosen["options"]["root"] = str(tmp_path / "photos")
    prepare.run(prepare.Params(**chosen), Run("", tmp_path / "samples", torch.device("cpu")))
    samples = load_samples(tmp_path / "samples")
    assert [int(n) for n in samples.counts] == [107, 21, 8, 4]


def test_the_rarer_of_two_classes_is_the_tail(tmp_path):
    own_data.sort(tmp_path / "photos", {"normal": 9, "lesion": 6})
    with contextlib.chdir(tmp_path):
        accepted("init", "p", "--data", "photos")
        values = params.load(tmp_path / "p/params.yaml")
    assert evaluate.group_choice(evaluate.Params(**values["evaluate"]), [9, 6]) == ["head", "tail"]


def test_groups_too_few_for_a_verdict_are_said(tmp_path):
    lines = [["file_name", "species", "site"]]
    for kind, name in enumerate(("wren", "owl")):
        for i in range(30):
            own_data.picture(kind, i).save(tmp_path / f"{name}{i}.png")
            lines.append([f"{name}{i}.png", name, f"S{i % 10}"])
    own_data.write_table(tmp_path / "labels.csv", lines)
    found = detect.detect(tmp_path / "labels.csv")
    notes = choose.choose(found, survey.survey(found), None).notes
    assert "as nearly as whole groups allow" in notes[0]
    (note,) = [n for n in notes if n.startswith("note:") and "groups" in n]
    assert note.startswith("note: about 2 of 10 groups will be test images; fewer than 5 never tell methods apart")


def test_a_column_of_labels_is_not_ignored_where_there_is_no_table(tmp_path):
    own_data.sort(tmp_path / "photos", {"a": 3, "b": 2})
    for data in (tmp_path / "photos", tmp_path):  # the second as archives unpack
        with pytest.raises(UserError, match=r"--label species: no table of images"):
            detect.detect(data, "species")


def test_splits_are_looked_up_in_every_file_of_a_table(tmp_path):
    image = {"bytes": own_data.encoded(own_data.picture(0, 0)), "path": "a"}
    for number, split in enumerate(("test", "train")):
        table = pa.table({"image": [image] * 4, "label": ["k", "l"] * 2, "split": [split] * 4})
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
    found = detect.detect(tmp_path)
    assert found.options["split"] == "split"
    assert found.collection.notes == []
    pq.write_table(table.slice(0, 0), tmp_path / "part-0.parquet")
    (tmp_path / "part-1.parquet").unlink()
    with pytest.raises(UserError, match="has no rows; add a row for each image"):
        detect.detect(tmp_path)


def test_a_label_that_the_table_lacks_is_named_beside_folders_too(tmp_path):
    (tmp_path / "images").mkdir()
    put(tmp_path / "labels.csv", "file_name,sort\nimages/a.jpg,k\n", a=True)
    with pytest.raises(UserError, match=r"which column holds the labels\? There are: file_name, sort"):
        detect.detect(tmp_path, "srt")


def test_relative_paths_do_not_leave_the_folder_of_the_table(tmp_path):
    """They asked for a key of params.yaml, which `h2t init` had not written."""
    put(tmp_path / "lists/x.csv", "path,label\n../a.jpg,k\n../b.jpg,l\n")
    put(tmp_path / "about.txt", "", a=True)
    with pytest.raises(UserError, match=r"got \.\./a\.jpg; write absolute paths, or move the table above the images"):
        detect.detect(tmp_path / "lists/x.csv")


def test_absolute_and_relative_paths_are_not_mixed(tmp_path):
    put(tmp_path / "x.csv", f"path,label\n{tmp_path}/a.jpg,k\nb.jpg,l\n", a=True)
    with pytest.raises(UserError, match="paths must all be absolute, or all relative"):
        detect.detect(tmp_path / "x.csv")


def test_a_column_of_folds_is_no_split_and_said(tmp_path):
    put(tmp_path / "x.csv", "path,label,split\na.jpg,k,2\nb.jpg,l,1\n", a=True)
    found = detect.detect(tmp_path / "x.csv")
    assert "split" not in found.options
    assert found.collection.notes == ["column 'split' is not used: it names no training images; got '1'"]


def test_an_unknown_backbone_is_said_before_images_are_read(tmp_path):
    own_data.sort(tmp_path / "photos", {"a": 3, "b": 2})
    given = ["init", str(tmp_path / "p"), "--data", str(tmp_path / "photos"), "--backbone", "resnet5"]
    result = invoke(*given)
    assert "did you mean 'resnet50'" in result.stderr
    assert result.stdout == ""


def test_animations_and_mixed_ranges_are_said(tmp_path):
    own_data.sort(tmp_path, {"a": 3, "b": 2})
    frames = [own_data.picture(0, i) for i in range(3)]
    for kind in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a/moving.{kind}", save_all=True, append_images=frames[1:])
    Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)).save(tmp_path / "b/float.tif")
    Image.fromarray(np.linspace(0, 4000, 400).astype(np.uint16).reshape(20, 20)).save(tmp_path / "b/deep.png")
    found = detect.detect(tmp_path)
    text = said(found, survey.survey(found))
    assert "animated    3 images: only the first frame is used" in text
    assert "F 0 to 1, I;16 0 to 4000: one range holds for all" in text


@pytest.mark.parametrize("small", [{}, {"n": 3, "then": "drop"}, {"n": 4, "then": "merge"}])
def test_one_class_alone_is_not_prepared(tmp_path, small):
    own_data.sort(tmp_path / "photos", {"a": 3, "b": 2} if small else {"a": 3})
    values = {
        "dataset": "image_folder",
        "options": {"root": str(tmp_path / "photos"), "train": "."},
        "test": 0.3,
        "min_per_class": small,
    }
    with pytest.raises(UserError, match=r"must have two or more classes; got one, '(a|other)'"):
        prepare.run(params.build(prepare.Params, "prepare", values), Run("prepare", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_negative_whole_numbers_are_not_cut_off_by_the_range_that_is_chosen():
    assert choose._range(-1024, 3070, floating=False) == [-1024, 3070]
    assert choose._range(0, 4000, floating=False) == [0.0, 4095.0]
