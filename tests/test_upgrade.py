"""`h2t upgrade` on the project in tests/golden/first, whose dvc.lock and outputs version 0.1.0 wrote."""

import contextlib
import json
import logging
import re
import shutil

import pytest
import yaml
from builders import tree
from dvc.repo import Repo
from golden_cases import FIRST
from pipeline_builders import ROOT, accepted, refused, silent
from repositories import dvc, git

from h2t.pipeline.base import numbers
from h2t.pipeline.inspection.doctor import examine
from h2t.pipeline.inspection.upgrade import same_meaning, upgrade

pytestmark = pytest.mark.slow

STAGES = {"prepare", "train_backbone@few", "extract@few", "pool@few", "train_classifier@dr", "evaluate@dr", "report"}
NEWER = {"prepare", "evaluate@dr", "report"}  # have other numbers than version 0.1.0
#: Left out of tests/golden/first, or written by no stage of version 0.1.0.
LEFT_OUT = {"data/pool/few", "data/report", "data/inputs", "data/probe/few", "data/replicates"}
WRITTEN = {"inputs", "replicates"}  # stages of later versions whose output the upgrade writes
LATER = {"probe@few"}  # a stage that version 0.1.0 did not have, so it runs for the first time


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """That project with our dvc.yaml and stages.yaml in a repository."""
    root = tmp_path_factory.mktemp("before") / "project"
    shutil.copytree(FIRST, root)
    shutil.copytree(ROOT / "plugins", root / "plugins", dirs_exist_ok=True)
    for name in ("dvc.yaml", "stages.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, root / name)
    git("init", "--quiet", "--initial-branch=main", where=root)
    dvc("init", where=root)
    return root


@pytest.fixture(scope="module")
def after(before, tmp_path_factory):
    """The same, upgraded."""
    root = shutil.copytree(before, tmp_path_factory.mktemp("after") / "project")
    with contextlib.chdir(root):
        upgrade(root, silent, apply=True)
    return root


@pytest.fixture
def project(before, tmp_path, monkeypatch):
    """A copy of `before`, as the working directory."""
    monkeypatch.chdir(shutil.copytree(before, tmp_path / "project"))
    return tmp_path / "project"


@pytest.fixture
def upgraded(after, tmp_path, monkeypatch):
    """A copy of `after`, as the working directory."""
    monkeypatch.chdir(shutil.copytree(after, tmp_path / "project"))
    return tmp_path / "project"


def changed(root):
    """Stages besides LATER that DVC calls changed, but for outputs in no DVC cache or left out of the example."""
    with contextlib.chdir(root), Repo(str(root)) as repo:
        found = repo.status()
    entries = [entry for what in found.values() for entry in what if isinstance(entry, dict)]
    outs = [out for entry in entries for out in entry.get("changed outs", {}).items()]
    assert {how for _, how in outs} <= {"not in cache", "deleted"}
    assert {out for out, how in outs if how == "deleted"} <= LEFT_OUT
    names = {name for name, what in found.items() if any(w == "changed command" or "changed deps" in w for w in what)}
    return names - LATER


def edit(path, change):
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def test_a_lock_file_from_before_the_numbers_is_taken_over(project):
    before = tree(project)
    assert changed(project) == STAGES | {"inputs", "replicates"}
    said = accepted("upgrade")
    assert f"results of {len(STAGES - NEWER)} stages are kept" in said
    again = [line for line in said.splitlines() if "runs again" in line]
    assert {line.split()[0] for line in again} == NEWER
    assert {name: data for name, data in tree(project).items() if name in before} == before, "said, not done"
    accepted("upgrade", "--apply")
    assert changed(project) == NEWER
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    assert lock["extract@few"]["params"]["stages.yaml"]["extract"] == numbers.FIRST
    kept = [stage for name, stage in lock.items() if name not in NEWER]
    assert not [d for stage in kept for d in stage.get("deps", []) if d["path"].endswith(".py")]
    old = yaml.safe_load((FIRST / "dvc.lock").read_text())["stages"]
    assert {k: v["outs"] for k, v in lock.items() if k not in WRITTEN} == {k: v["outs"] for k, v in old.items()}
    shutil.rmtree(project / "data/inputs")  # the digests of no input, and DVC's note that git ignores them
    shutil.rmtree(project / "data/replicates")  # none
    (project / "data/.gitignore").unlink()
    assert tree(project / "data") == tree(FIRST / "data")
    assert "nothing to change" in accepted("upgrade")


def test_the_lock_file_is_written_once(project, caplog):
    """With thousands of lines, DVC takes seconds for it."""
    log = logging.getLogger("dvc.dvcfile")
    caplog.set_level(logging.INFO, log.name)
    log.addHandler(caplog.handler)
    try:
        upgrade(project, silent, apply=True)
    finally:
        log.removeHandler(caplog.handler)
    written = {record for record in caplog.records if "Updating lock file" in record.msg}
    assert len(written) == 1


def test_an_upgrade_empties_no_file_of_the_user(project):
    """Opened for writing, a file would have changed under its name `old-...` too, as long as it is the same file."""
    (project / "own.yaml").write_bytes((project / "params.yaml").read_bytes().replace(b"\n", b"\r\n"))
    (project / "own.yaml").chmod(0o640)
    (project / "params.yaml").unlink()
    (project / "params.yaml").symlink_to("own.yaml")
    files = ("dvc.lock", "stages.yaml", "own.yaml")
    edit(project / "stages.yaml", lambda values: values.update(prepare=1))
    for name in files:
        (project / f"old-{name}").hardlink_to(project / name)
    before = {name: (project / name).read_bytes() for name in files}
    upgrade(project, silent, apply=True)
    assert {name: (project / f"old-{name}").read_bytes() for name in files} == before
    after = {name: (project / name).read_bytes() for name in files}
    assert all(after[name] != before[name] for name in files)
    assert (project / "params.yaml").is_symlink()
    assert after["own.yaml"].startswith(before["own.yaml"])
    assert after["own.yaml"].count(b"\n") == after["own.yaml"].count(b"\r\n")
    assert (project / "own.yaml").stat().st_mode & 0o777 == 0o640
    assert not list(project.glob(".*.partial*"))


def test_what_the_first_version_wrote_is_verified_and_trained_on(project):
    accepted("cache", "verify", "data/extract/few")
    accepted("train-classifier", "dr", "data/extract/few", "data/train_backbone/few", "heads")
    accepted("evaluate", "dr", "data/extract/few", "data/train_classifier/dr", "data/train_backbone/few", "out")
    assert json.loads((project / "out/metrics.json").read_text())["with_h2t"]["heads"] == 2


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        (
            {("extract", "codec"): "zstd", ("hosts", "dr", "optimiser", "lr"): 0.5},
            {"extract@few", "train_classifier@dr", "report"},
        ),
        ({("seed",): 7}, {"prepare", "train_backbone@few", "extract@few"}),
        (  # defaults, and what changes no byte
            {("extract", "chunk_rows"): None, ("hosts", "dr", "rounding"): "floor", ("run",): {"cluster": "local:2"}},
            set(),
        ),
    ],
)
def test_parameters_must_mean_the_same(project, settings, stages):
    def change(values):
        for (*parents, last), value in settings.items():
            at = values
            for part in parents:
                at = at[part]
            at[last] = value

    edit(project / "params.yaml", change)
    plan = upgrade(project, silent, apply=True)
    assert {redo.stage for redo in plan.redo} == stages | NEWER
    assert changed(project) == stages | NEWER


def test_a_section_without_what_changes_no_byte_means_the_same():
    section = yaml.safe_load((FIRST / "params.yaml").read_text())["extract"]
    assert "cluster" in section
    assert same_meaning("extract", section, {k: v for k, v in section.items() if k != "cluster"})
    assert same_meaning("extract", {**section, "cluster": "local:2"}, section)
    assert not same_meaning("extract", section, {**section, "dtype": "float32"})
    assert not same_meaning("extract", section, {**section, "unknown": 1})


def test_it_says_what_another_number_concerns_and_why(upgraded):
    """As after an upgrade: results were made under an earlier number of `extract` than the code has."""
    for name in ("dvc.lock", "stages.yaml"):
        path = upgraded / name
        path.write_text(path.read_text().replace("extract: 2026112601", "extract: 2026112507"))
    line = refused("prepare", "out", code=1)
    assert "type: h2t upgrade" in line
    said = accepted("upgrade")
    assert "stages.yaml: extract: 2026112507 -> 2026112601" in said
    (line,) = [one for one in said.splitlines() if one.startswith("extract@few runs again")]
    assert line.startswith("extract@few runs again and writes data/extract/few: extract has the number 2026112601, was")
    assert line.endswith("read by evaluate@dr, pool@few, probe@few, report, train_classifier@dr")
    assert "2026112507" in (upgraded / "stages.yaml").read_text()
    accepted("upgrade", "--apply")
    assert changed(upgraded) == {"extract@few", "replicates"} | NEWER
    accepted("prepare", "out")


def test_a_project_below_the_root_of_its_repository_is_the_one_that_is_meant(after, tmp_path, monkeypatch):
    top = tmp_path / "top"
    project = shutil.copytree(after, top / "deep/project")
    for name in (".git", ".dvc", ".dvcignore"):
        (project / name).rename(top / name)
    (top / "other").mkdir()
    (top / "other/dvc.yaml").write_text("stages: {prepare: {cmd: echo 1}}\n")
    for place in (project, project / "data"):
        monkeypatch.chdir(place)
        assert "nothing to change" in accepted("upgrade")
    with Repo(str(top)) as repo, repo.lock:
        found = {f.check: str(f) for f in examine(project, project / "params.yaml")}
    assert ".dvc/tmp/lock" in found["lock"]
    assert "nothing was run yet" not in found["data"]
    assert "links" in found
    assert found["cache"].startswith("ok")
    monkeypatch.chdir(project)
    path = project / "stages.yaml"
    path.write_text(path.read_text().replace("extract: 2026112601", "extract: 2026112507"))
    assert "extract: 2026112507 -> 2026112601" in accepted("upgrade", "--apply")
    assert "extract: 2026112601" in path.read_text()


def test_the_example_keeps_its_numbers_in_the_folder_above_and_its_parameters(tmp_path, monkeypatch):
    project = tmp_path / "examples/cifar10_lt"
    project.mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / "examples/cifar10_lt" / name, project / name)
    shutil.copy(ROOT / "stages.yaml", tmp_path / "stages.yaml")
    git("init", "--quiet", where=tmp_path)
    dvc("init", where=tmp_path)
    monkeypatch.chdir(project)
    assert "nothing to change" in accepted("upgrade")
    edit(tmp_path / "stages.yaml", lambda values: values.update(prepare=1))
    assert "stages.yaml: prepare: 1 -> " in accepted("upgrade", "--apply")
    assert numbers.read(tmp_path / "stages.yaml") == numbers.in_code()
    assert sorted(path.name for path in project.iterdir()) == ["dvc.yaml", "params.yaml"]
    assert (project / "params.yaml").read_bytes() == (ROOT / "examples/cifar10_lt/params.yaml").read_bytes()


def test_it_only_looks_where_nothing_can_be_written(project):
    """DVC's lock takes a folder that can be written; another process that holds it is in the way alike."""
    with Repo(str(project)) as repo, repo.lock:
        assert "nothing was written" in accepted("upgrade")
        assert "lock" in refused("upgrade", "--apply", code=1)


def test_data_that_differ_are_not_taken_over(project):
    path = project / "data/train_backbone/few/backbone.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    plan = upgrade(project, silent)
    reasons = {redo.stage: redo.reasons for redo in plan.redo if redo.stage not in NEWER}
    assert reasons == {"extract@few": ["data/train_backbone/few/backbone.safetensors has changed"]}


def test_it_works_in_a_clone_without_data(project):
    shutil.rmtree(project / "data")
    plan = upgrade(project, silent, apply=True)
    assert set(plan.taken_over) == STAGES - NEWER
    old = yaml.safe_load((FIRST / "dvc.lock").read_text())["stages"]
    new = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    assert {k: v["outs"] for k, v in new.items() if k not in WRITTEN} == {k: v["outs"] for k, v in old.items()}
    found = {d["path"]: d["md5"] for d in new["extract@few"]["deps"] if d["path"].startswith("data/")}
    del found["data/inputs/extract.json"]  # a new dependency
    assert found == {d["path"]: d["md5"] for d in old["extract@few"]["deps"] if d["path"].startswith("data/")}


def test_a_plug_in_of_the_project_gets_its_line_and_reruns_what_uses_its_kind(upgraded):
    assert numbers.read(upgraded / "stages.yaml")["backbones.few"] == numbers.OWN
    shutil.copy(ROOT / "pipeline/hosts/dr.py", upgraded / "plugins/hosts/mine.py")
    found = {finding.check: finding for finding in examine(upgraded, upgraded / "params.yaml")}
    assert found["numbers"].state == "fault"
    assert "hosts.mine" in found["numbers"].detail
    assert "type: h2t upgrade --apply" in str(found["numbers"])
    plan = upgrade(upgraded, silent, apply=True)
    assert set(plan.numbers) == {"hosts.mine"}
    assert {redo.stage for redo in plan.redo} == {"train_classifier@dr", "evaluate@dr"} | NEWER


def test_a_dvc_yaml_that_watches_no_numbers_is_one_line(project):
    path = project / "dvc.yaml"
    path.write_text(re.sub(r"(- |, )?stages\.yaml: \[[^\]]*\]", "", path.read_text()))
    line = refused("upgrade", "--apply", code=1)
    assert "dvc.yaml: watches no numbers" in line


def test_a_dvc_yaml_of_something_else_is_not_called_older_and_gets_no_numbers(tmp_path, monkeypatch):
    git("init", "--quiet", where=tmp_path)
    dvc("init", where=tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {prepare: {cmd: python prepare.py, outs: [data]}}\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert "dvc.yaml: watches no numbers of stages.yaml" in refused("upgrade", "--apply", code=1)
    assert sorted(tmp_path.iterdir()) == before
    assert not [f for f in examine(tmp_path, tmp_path / "params.yaml") if "older version" in f.detail]


def test_a_dvc_yaml_without_stages_that_others_need_is_one_line(project):
    edit(project / "dvc.yaml", lambda values: values["stages"].pop("inputs"))
    before = tree(project)
    line = refused("upgrade", "--apply", code=1)
    assert "dvc.yaml: is that of an older version, without inputs; replace it by the dvc.yaml of this version" in line
    assert tree(project) == before, "nothing was written before it was known"
    (found,) = [f for f in examine(project, project / "params.yaml") if f.check == "numbers"]
    assert found.state == "fault"
    assert "dvc.yaml: is that of an older version, without inputs" in found.detail


def test_a_project_of_stage_two_alone_gets_no_digests_of_inputs(project):
    """It reads a cache that was made elsewhere, and no stage of it would write them."""

    def leave_stage_two(values):
        values["vars"] = []
        values["stages"] = {name: values["stages"][name] for name in ("train_classifier", "evaluate", "report")}
        for name in ("train_classifier", "evaluate"):
            values["stages"][name]["do"]["deps"].remove("data/replicates/${item.backbone}.json")

    edit(project / "dvc.yaml", leave_stage_two)
    accepted("upgrade", "--apply")
    assert not (project / "data/inputs").exists()
    assert not (project / "data/replicates").exists()


def test_without_a_project_it_is_one_line_and_nothing_is_written(project):
    (project / "dvc.yaml").unlink()
    (project / "stages.yaml").unlink()
    line = refused("upgrade", "--apply", code=1)
    assert "has no dvc.yaml; change to the folder of a project" in line
    assert not (project / "stages.yaml").exists()


def test_outside_of_a_repository_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused("upgrade", code=1)
    assert "not inside a DVC repository" in line


def test_doctor_names_outputs_that_were_made_by_other_code_of_the_same_number(upgraded):
    arguments = ("train-classifier", "dr", "data/extract/few", "data/train_backbone/few", "out")
    record = upgraded / "data/runs/train_classifier/dr.json"
    accepted(*arguments, "--record", record)
    values = json.loads(record.read_text())
    assert {"pipeline/heads/stack.py", "pipeline/hosts/dr.py", "cache/reader.py"} <= set(values["code"])

    def notes():
        return [str(f) for f in examine(upgraded, upgraded / "params.yaml") if f.check == "code"]

    assert notes() == []
    values["code"]["pipeline/heads/stack.py"] = "0" * 16
    values["code"]["pipeline/reporting/page.py"] = "0" * 16  # training does not reach it
    record.write_text(json.dumps(values))
    (note,) = notes()
    assert "train_classifier@dr was run by other code of the same number (pipeline/heads/stack.py)" in note
