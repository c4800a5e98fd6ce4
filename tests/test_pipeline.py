"""The whole of `dvc repro` on a tiny parameter file, in a project with its own `cache.py`, `pipeline/` and `tests/`."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from pipeline_builders import ROOT, environment, make_params
from test_own_names import plant

pytestmark = pytest.mark.slow

OURS = "ours"  # the folder with a copy of our code; everything else in the repository belongs to the user
CODE = ("h2t", "cache", "pipeline")
PROJECT = ("plugins", "inputs", "dvc.yaml", "stages.yaml", ".dvcignore")


def dvc(*arguments: str, cwd: Path) -> str:
    env = environment(PYTHONPATH=f"{cwd}:{cwd / OURS}", DVC_NO_ANALYTICS="1")
    env["XDG_CACHE_HOME"] = str(cwd / "home")
    env["PATH"] = os.pathsep.join([str(cwd / "bin"), str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changed(repository: Path) -> set[str]:
    """Stages that `dvc repro` would run: those that changed and all that they feed; without the `@entry`.

    IDLE stages feed nobody here: `inputs` runs for an instant where a parameter could name a file, `replicates` where
    one could change a replicate. Their outputs stay.
    """
    with contextlib.chdir(repository), Repo(str(repository)) as repo:  # a process for each costs seconds
        reached = set(repo.status())
        feeds = [(fed.addressing, feeding.addressing) for fed, feeding in repo.index.graph.edges]
    for _ in range(10):
        reached |= {fed for fed, feeding in feeds if feeding in reached - IDLE}
    return {name.split("@")[0] for name in reached}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with our code and tiny parameters, one host; every stage has run once."""
    root = tmp_path_factory.mktemp("repository")
    for name in (*CODE, *PROJECT):
        source, target = ROOT / name, root / OURS / name if name in CODE else root / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    plant(root)
    values = make_params()
    values["backbones"] = {"ce_mixup": values["backbones"]["ce_mixup"]}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    (root / "bin").mkdir()
    (root / "bin" / "h2t").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m h2t.pipeline "$@"\n')
    (root / "bin" / "h2t").chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc("init", "-q", cwd=root)
    shutil.copytree(ROOT / ".dvc" / "plots", root / ".dvc" / "plots", dirs_exist_ok=True)
    dvc("repro", cwd=root)
    return root


def test_a_second_run_does_nothing(repository):
    before = {p: p.stat().st_mtime_ns for p in (repository / "data").rglob("*")}
    assert "Running stage" not in dvc("repro", cwd=repository)
    assert {p: p.stat().st_mtime_ns for p in (repository / "data").rglob("*")} == before


def test_metrics_and_plots_are_where_dvc_looks(repository):
    metrics = json.loads(dvc("metrics", "show", "--json", cwd=repository))[""]["data"]
    figures = metrics["data/report/summary.json"]["data"]["dr"]
    assert list(figures) == ["h2t", "tail_with", "tail_without", "top1_with", "top1_without"]
    dvc("plots", "show", "-o", "plots", cwd=repository)
    page = (repository / "plots" / "index.html").read_text(encoding="utf-8")
    assert "ratio" in page
    shutil.rmtree(repository / "plots")


def parameter(**settings):
    def edit(repository):
        path = repository / "params.yaml"
        values = yaml.safe_load(path.read_text())
        for key, value in settings.items():
            *parents, last = key.split("__")
            at = values
            for part in parents:
                at = at.setdefault(part, {})
            at[last] = value
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    return edit


def number(*keys):
    def edit(repository):
        path = repository / "stages.yaml"
        values = yaml.safe_load(path.read_text())
        at = values[keys[0]] if len(keys) > 1 else values
        at[keys[-1]] += 1
        path.write_text(yaml.safe_dump(values))

    return edit


def remark_everywhere(repository):
    for package in ("cache", "pipeline"):
        for path in (repository / OURS / package).rglob("*.py"):
            path.write_text(path.read_text() + "\n# a remark\n")


def line_in(name):
    def edit(repository):
        path = repository / name
        path.write_text(path.read_text() + "\n# a remark\n")

    return edit


HEADS = {"train_classifier", "evaluate", "report"}
BODY = {"extract", "pool", "probe"}
ALL = {"prepare", "train_backbone"} | BODY | HEADS
IDLE = {"inputs", "replicates"}
EDITS = {
    "a remark in every file": (remark_everywhere, set()),
    "a host's number": (number("hosts", "dr"), HEADS),
    "another host's number": (number("hosts", "gcl"), set()),
    "a backbone's number": (number("backbones", "resnet20"), ALL - {"prepare"} | {"replicates"}),
    "a pool's number": (number("pools", "gap"), HEADS | {"pool"}),
    "a probe's number": (number("probe"), {"probe"}),
    "a stage's number": (number("extract"), HEADS | BODY | {"replicates"}),
    "a host of one's own": (line_in("plugins/hosts/.gitkeep"), HEADS),
    "a host's parameter": (parameter(hosts__dr__optimiser__lr=0.01), HEADS),
    "where extraction runs": (parameter(run__cluster="local:2"), set()),
    "extraction's parameter": (parameter(extract__codec="zstd"), HEADS | BODY | IDLE),
    "device": (parameter(device="cpu"), set()),
    "residency": (parameter(train_classifier__pooled=False), set()),
    "seed": (parameter(seed=1), ALL | {"replicates"}),
    "the backbone": (parameter(backbones__ce_mixup__epochs=2), ALL - {"prepare"} | IDLE),
}


@pytest.mark.parametrize(("edit", "stages"), EDITS.values(), ids=EDITS)
def test_an_edit_re_runs_exactly_what_it_can_change(repository, edit, stages):
    kept = {p: p.read_bytes() for n in (OURS, *PROJECT, "params.yaml") for p in _files(repository / n)}
    edit(repository)
    assert any(p.read_bytes() != data for p, data in kept.items())
    try:
        assert changed(repository) == stages
    finally:
        for path, data in kept.items():
            path.write_bytes(data)


def _files(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
