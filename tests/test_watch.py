"""Images, lists, tables and weights are inputs: DVC notices what changes there, and runs what that concerns."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from image_builders import make_imagenet_lt, write_image
from pipeline_builders import ROOT, make_backbone_dir, make_params, refused, silent
from repositories import start_project

from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.inspection import setting_up
from h2t.pipeline.inspection.doctor import examine
from h2t.pipeline.stages import inputs, watch

TRANSFORM = {"size": 8, "resize": 8, "mean": [0.5] * 3, "std": [0.25] * 3}


def make_images(root: Path) -> Path:
    for j, (name, count) in enumerate({"owl": 5, "cat": 3}.items()):
        for i in range(count):
            write_image(root / f"train/{name}/{i}.png", 100 * j + i, (9, 8))
        write_image(root / f"test/{name}/0.png", 100 * j + 50, (9, 8))
    return root


def values_of(photos: str, **more) -> dict:
    """Parameters of a project on an image folder, with two tiny backbones."""
    values = make_params(device="cpu")
    values["inputs"] = {"photos": photos, **more}
    options = {"root": "inputs/photos", "test": "test", "transform": TRANSFORM}
    values["prepare"] = {"dataset": "image_folder", "options": options}
    values["backbones"]["other"] = dict(values["backbones"]["ce_mixup"])
    values["hosts"]["dr"]["grid"].update(ratio=[0.0], seed=[0])
    return values


def write(project: Path, values: dict) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


# --- names of inputs in the parameters


def test_a_parameter_names_its_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = values_of("some/photos", weights="/elsewhere/w.pth", lists="../lists")
    values["backbones"]["other"]["start"] = "inputs/weights"
    values["extract"]["statistics_from"] = "inputs/lists/kept"
    values["report"]["title"] = "inputs/photos"
    write(tmp_path, values)
    found = params.load(Path("params.yaml"))
    assert found["prepare"]["options"]["root"] == str(tmp_path / "some/photos")
    assert found["backbones"]["other"]["start"] == "/elsewhere/w.pth"
    assert found["extract"]["statistics_from"] == str(tmp_path.parent / "lists/kept")
    assert found["report"]["title"] == "inputs/photos"
    with pytest.raises(UserError, match=r"prepare\.options\.root: no input 'phots'; did you mean 'photos'"):
        params.load(Path("params.yaml"), ["prepare.options.root=inputs/phots"])


@pytest.mark.parametrize("wrong", [["photos"], {"photos": None}, {"photos": ""}, {"photos": 3}, "photos"])
def test_inputs_are_names_and_paths(tmp_path, wrong):
    write(tmp_path, {**make_params(), "inputs": wrong})
    assert "inputs: must map names to files" in refused(
        "prepare", tmp_path / "out", "--params", tmp_path / "params.yaml", leaves=tmp_path / "out"
    )


def test_a_name_becomes_a_file(tmp_path):
    write(tmp_path, {**make_params(), "inputs": {"../photos": "photos"}})
    said = refused("prepare", tmp_path / "out", "--params", tmp_path / "params.yaml")
    assert "inputs: a name must consist of letters, digits" in said


def options_of(dataset: str, home: Path) -> dict:
    lists = make_imagenet_lt(home / "images") if dataset in ("imagenet_lt", "places_lt", "inaturalist18") else {}
    for part in ("train", "test", "val") if lists else ():
        shutil.move(home / f"images/ImageNet_LT_{part}.txt", home / f"{part}.txt")
        lists[part] = str(home / f"{part}.txt")
    if dataset == "image_folder":
        return {"root": str(make_images(home / "images")), "test": "test"}
    return lists or {"train": [str(home / "a.parquet"), str(home / "b.parquet")], "test": [str(home / "c.parquet")]}


@pytest.mark.parametrize(
    ("dataset", "reads"),
    [
        ("image_folder", {"images/train", "images/test"}),
        ("imagenet_lt", {"images", "train.txt", "val.txt", "test.txt"}),
        ("places_lt", {"images", "train.txt", "val.txt", "test.txt"}),
        ("inaturalist18", {"images", "train.txt", "val.txt", "test.txt"}),
        ("parquet", {"a.parquet", "b.parquet", "c.parquet"}),
    ],
)
def test_every_dataset_says_what_it_reads(tmp_path, dataset, reads):
    """And what it says is refused where dvc.yaml does not watch it."""
    values = make_params(prepare__dataset=dataset, prepare__options=options_of(dataset, tmp_path))
    found = inputs.named(values)["prepare"]
    assert {str(Path(path).relative_to(tmp_path)) for path in found.values()} == reads
    inputs.check(values, tmp_path)  # no dvc.yaml, nothing to compare with
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for path in found.values():
        rest = {str(i): other for i, other in enumerate(set(found.values()) - {path})}
        with pytest.raises(UserError, match="DVC does not watch") as error:
            inputs.check({**values, "inputs": rest}, tmp_path)
        assert path in str(error.value)
    inputs.check({**values, "inputs": {"all": str(tmp_path)}}, tmp_path)
    if dataset == "imagenet_lt":
        inputs.check({**values, "inputs": {"images": f"{tmp_path}/images/", "rest": str(tmp_path / ".")}}, tmp_path)


def test_datasets_without_inputs_have_a_reason():
    """Digits come with a package; CIFAR's files are compared with published digests when they are read."""
    without = [name for name in plugins.names("datasets") if not hasattr(plugins.load("datasets", name), "inputs")]
    assert without == ["cifar10", "cifar100", "digits"]


@pytest.mark.parametrize(
    ("section", "key"), [("backbones.other", "weights"), ("backbones.other", "start"), ("extract", "statistics_from")]
)
def test_an_unwatched_path_is_refused_by_every_stage_and_named_by_doctor(tmp_path, monkeypatch, section, key):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    write(tmp_path, values_of("photos"))
    for command in (["prepare", "out"], ["evaluate", "dr", "cache", "heads", "backbone", "out"]):
        said = refused(*command, "--set", f"{section}.{key}=found/x", leaves=tmp_path / "out")
        assert f"{section}.{key}: DVC does not watch found/x" in said
        assert "inputs: {data: found/x}" in said
    values = params.load(Path("params.yaml"), [f"{section}.{key}=found/x"])
    values["prepare"]["options"]["root"] = "photos"  # by its path: the same file
    write(tmp_path, values)
    said = [f.detail for f in examine(tmp_path, Path("params.yaml")) if (f.check, f.state) == ("inputs", "fault")]
    assert len(said) == 1
    assert f"{section}.{key}: DVC does not watch found/x" in said[0]


def test_what_is_no_file_of_the_project_needs_no_input():
    values = values_of("photos")
    values["backbones"]["other"]["start"] = "torchvision"
    values["extract"]["statistics_from"] = "s3://bucket/cache"
    found = inputs.named({**values, "prepare": {"dataset": "cifar10"}})
    assert found == {"prepare": {}, "extract": {}, "backbones/ce_mixup": {}, "backbones/other": {}}


def test_a_dvc_yaml_of_ones_own_may_name_the_path_itself(tmp_path):
    values = make_params(prepare__dataset="image_folder", prepare__options={"root": "photos"})
    stage = {"cmd": "h2t prepare out", "deps": ["photos"], "outs": ["out"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"prepare": stage}}))
    inputs.check(values, tmp_path)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"prepare": {**stage, "deps": ["other"]}}}))
    with pytest.raises(UserError, match="DVC does not watch"):
        inputs.check({**values, "inputs": {"photos": "photos"}}, tmp_path)


# --- the digest of an input


def digest(path: Path, out: Path, **more: str) -> dict:
    watch.run("photos", {"photos": str(path), **more}, out / "photos.json", silent)
    return json.loads((out / "photos.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write_image(root / "train/owl/new.png"),
        lambda root: (root / "train/owl/0.png").unlink(),
        lambda root: write_image(root / "train/owl/0.png", 77, (9, 8)),
        lambda root: (root / "train/owl/0.png").rename(root / "train/owl/x.png"),
        lambda root: (root / "train/owl").rename(root / "train/eule"),
        lambda root: (root / "train/owl/0.png").write_bytes((root / "train/owl/1.png").read_bytes()),
    ],
    ids=["added", "deleted", "replaced", "renamed", "folder renamed", "doubled"],
)
def test_a_change_has_another_digest(tmp_path, change):
    root = make_images(tmp_path / "photos")
    before = digest(root, tmp_path)
    assert before["files"] == 10
    os.utime(root / "train/owl/1.png", (0, 0))
    shutil.copytree(root, tmp_path / "moved")
    assert digest(root, tmp_path) == before == digest(tmp_path / "moved", tmp_path)
    change(root)
    assert digest(root, tmp_path)["sha256"] != before["sha256"]


def test_a_file_is_an_input_too(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    first = digest(tmp_path / "w.pth", tmp_path)
    (tmp_path / "link").symlink_to("w.pth")
    assert digest(tmp_path / "link", tmp_path) == first
    (tmp_path / "w.pth").write_bytes(b"WEIGHTS")
    assert digest(tmp_path / "link", tmp_path)["sha256"] != first["sha256"]


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lambda root: (root / "x.png").symlink_to("/nowhere"), "x.png: cannot be read"),
        (lambda root: os.mkfifo(root / "pipe"), "pipe: must be a regular file for DVC to watch it"),
        (lambda root: (root / os.fsdecode(b"\xff.png")).write_bytes(b""), "file names must be UTF-8 for DVC"),
        (lambda root: (root / "more").symlink_to(root.parent / "more"), "which DVC does not follow"),
        (shutil.rmtree, "no file or folder"),
    ],
    ids=["dangling link", "pipe", "name", "link to a folder", "nothing"],
)
def test_what_dvc_cannot_watch_is_one_line(tmp_path, plant, says):
    root = make_images(tmp_path / "photos")
    make_images(tmp_path / "more")
    plant(root)
    with pytest.raises(UserError, match=r"^inputs\.photos: ") as error:
        digest(root, tmp_path)
    assert says in str(error.value)
    assert not (tmp_path / "photos.json").exists()


def test_folders_behind_links_are_inputs_of_their_own(tmp_path):
    root, more = make_images(tmp_path / "photos"), make_images(tmp_path / "more")
    (root / "train/elk").symlink_to(more / "train/owl")
    (root / "train/same").symlink_to(root / "train/owl")
    (root / "circle").symlink_to(root)
    found = digest(root, tmp_path, more=str(more))
    assert found["also"] == ["more"]
    watch.run("more", {"more": str(more)}, tmp_path / "more.json", silent)
    values = {**values_of(str(root), more=str(more))}
    values["prepare"]["options"]["root"] = str(root)
    inputs.run(values, tmp_path, tmp_path / "out", silent)
    facts = json.loads((tmp_path / "out/prepare.json").read_text())
    assert set(facts["prepare.options.train"]) == {"photos", "more"}


def changed_inputs(project: Path, monkeypatch) -> list[str]:
    """What a full examination finds in the inputs that an ordinary one does not."""
    monkeypatch.chdir(project)
    usual, full = (setting_up.watched(Path("params.yaml"), full=full) for full in (False, True))
    return [str(f) for f in full if f.state == "fault" and f not in usual]


def test_a_full_examination_reads_the_inputs(tmp_path, monkeypatch):
    """DVC takes a file for the same whose size and time are those of before."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    write(tmp_path, values_of("photos"))
    image = make_images(tmp_path / "photos") / "train/owl/0.png"
    assert changed_inputs(tmp_path, monkeypatch) == []
    assert "nothing to compare with" in str(setting_up.watched(Path("params.yaml"), full=True))
    watch.run("photos", {"photos": "photos"}, tmp_path / "inputs/photos.json", silent)
    assert changed_inputs(tmp_path, monkeypatch) == []
    times, data = image.stat(), image.read_bytes()
    image.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    (found,) = changed_inputs(tmp_path, monkeypatch)
    assert "inputs.photos: photos has changed since it was read" in found
    assert "dvc repro --force --single-item watch@photos && dvc repro" in found
    (tmp_path / "inputs/photos.json").write_text("{")
    assert changed_inputs(tmp_path, monkeypatch) == [found]
    shutil.rmtree(tmp_path / "photos")
    assert changed_inputs(tmp_path, monkeypatch) == []


def test_an_input_that_nothing_names_is_said(tmp_path):
    values = values_of(str(make_images(tmp_path / "photos")))
    values["prepare"] = {"dataset": "digits"}
    digest(tmp_path / "photos", tmp_path)
    said: list[str] = []
    inputs.run(values, tmp_path, tmp_path / "out", said.append)
    assert said == ["note: inputs.photos: no parameter refers to it (inputs/photos), so no stage depends on it"]


def test_a_lost_digest_names_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"dvc repro watch@photos, or dvc repro --pull if you"):
        inputs.run(values_of("photos"), tmp_path, tmp_path / "out", silent)


def test_an_experiment_queue_is_told_of_relative_paths(tmp_path, monkeypatch):
    workspace = tmp_path / ".dvc/tmp/exps/temp"
    workspace.mkdir(parents=True)
    shutil.copy(ROOT / "dvc.yaml", workspace)
    write(workspace, values_of("photos"))
    monkeypatch.chdir(workspace)
    line = refused("prepare", "out", code=1)
    assert "the relative path photos does not exist in the temporary workspace" in line


# --- DVC itself


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dvc_runs_what_a_change_concerns_and_nothing_else(tmp_path, warm_h2t, monkeypatch):
    # Weights to start from lie outside of the repository, at an absolute path with a space.
    make_backbone_dir(tmp_path / "first", seed=1)
    make_backbone_dir(tmp_path / "second", seed=2)
    start = shutil.copy(tmp_path / "first/backbone.safetensors", tmp_path / "start weights.safetensors")
    values = values_of("photos", start=str(start))
    values["backbones"]["other"]["start"] = "inputs/start"
    project = start_project(tmp_path / "a", values, warm_h2t, "photos", "start", "kept")
    photos = make_images(project.root / "photos")
    watched = {"watch@photos", "watch@start", "inputs", "prepare"}
    assert set(project.ran("train_backbone")) == watched | {"train-backbone@ce_mixup", "train-backbone@other"}

    # Other weights: only the backbone that starts from them.
    shutil.copy(tmp_path / "second/backbone.safetensors", start)
    assert set(project.status()) >= {"watch@start"}
    assert project.ran("train_backbone") == ["watch@start", "inputs", "train-backbone@other"]

    # A touched file, a moved folder that is now a link: the same content.
    os.utime(photos / "train/owl/0.png", (0, 0))
    photos.rename(tmp_path / "moved")
    photos.symlink_to(tmp_path / "moved")
    assert project.ran("train_backbone") == []

    # What is no image is looked at, and changes no sample.
    (photos / "notes.txt").write_text("taken in May")
    assert "watch@photos" in set(project.status())
    assert project.ran("train_backbone") == ["watch@photos", "inputs", "prepare"]

    # A cache whose statistics are kept: extraction depends on it, and nothing else.
    assert project.ran("extract@ce_mixup") == ["extract@ce_mixup"]
    shutil.copytree(project.root / "data/extract", project.root / "kept")
    values["inputs"]["kept"] = "kept"
    values["extract"]["statistics_from"] = "inputs/kept"
    write(project.root, values)
    assert project.ran("extract@ce_mixup") == ["watch@kept", "inputs", "extract@ce_mixup"]

    # Images that are replaced, renamed; what else changes a digest is above.
    for change in (
        lambda: write_image(photos / "train/owl/0.png", 99, (9, 8)),
        lambda: (photos / "train/cat/1.png").rename(photos / "train/cat/one.png"),
    ):
        change()
        assert "watch@photos" in set(project.status())
        assert project.ran("prepare") == ["watch@photos", "inputs", "prepare"]
    assert project.ran("train_backbone@ce_mixup") == ["train-backbone@ce_mixup"]

    # Another text of the same length and time: DVC does not look, doctor does, and what it says to type helps.
    notes, times = photos / "notes.txt", (photos / "notes.txt").stat()
    notes.write_text("taken in Jun")
    os.utime(notes, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert project.ran("prepare") == []
    assert "has changed" in str(changed_inputs(project.root, monkeypatch))
    assert project.ran("--force", "--single-item", "watch@photos") == ["watch@photos"]
    assert changed_inputs(project.root, monkeypatch) == []
    assert project.ran("prepare") == ["inputs", "prepare"]

    # None of the user's files is in DVC's cache.
    kept = {p.read_bytes() for p in (project.root / ".dvc/cache/files").rglob("*") if p.is_file()}
    assert not kept & {p.read_bytes() for p in photos.rglob("*") if p.is_file()}
