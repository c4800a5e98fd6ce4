"""A extracts and publishes; B clones, gets the results without the backbone, changes a ratio and trains."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from builders import tree
from pipeline_builders import ROOT, environment, write_params

pytestmark = pytest.mark.sharing

CODE = ("cache", "pipeline", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore")


def run(*arguments, where):
    path = f"{sys.executable.rpartition('/')[0]}:/usr/bin:/bin"
    own = environment(PATH=path, PYTHONPATH=str(where), DVC_SITE_CACHE_DIR=str(where.parent / f"{where.name}.site"))
    done = subprocess.run([str(a) for a in arguments], cwd=where, env=own, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def git(*arguments, where):
    return run("git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments, where=where)


def ran(where) -> set[str]:
    """The stages that ran here: each writes a record."""
    runs = where / "data/runs"
    return {p.name for p in runs.iterdir()} if runs.is_dir() else set()


def test_nobody_extracts_twice(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    for name in CODE:
        (a / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, a / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, a / name)
    write_params(a / "params.yaml")
    git("init", "--quiet", "--initial-branch=main", where=a)
    run("dvc", "remote", "add", "--default", "store", tmp_path / "store", where=a)
    run("dvc", "repro", "--quiet", where=a)
    forwarded = json.loads((a / "data/runs/extract/ce_mixup.json").read_text())["forwarded"]
    assert forwarded > 0
    git("add", ".", where=a)
    git("commit", "--quiet", "--message=results", where=a)
    told = run("h2t", "cache", "publish", where=a)
    assert "holds all" in told
    git("commit", "--quiet", "--all", "--message=verify", where=a)

    git("clone", "--quiet", a, b, where=tmp_path)
    run("dvc", "repro", "--pull", "--quiet", where=b)
    assert ran(b) == set()
    assert tree(b / "data/extract/ce_mixup") == tree(a / "data/extract/ce_mixup")
    assert tree(b / "data/report") == tree(a / "data/report")

    values = yaml.safe_load((b / "params.yaml").read_text())
    values["hosts"]["dr"]["grid"]["ratio"] = [0.0, 0.5]
    (b / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    run("dvc", "repro", "--pull", "--quiet", where=b)
    assert ran(b) == {"train_classifier", "evaluate", "report"}
    found = json.loads((b / "data/evaluate/dr/metrics.json").read_text())
    assert found["with_h2t"]["ratio"] == 0.5
    assert "ok    remote" in run("h2t", "doctor", where=b)

    # Without the repository: the pooled copy, and a head trained from it.
    git("clone", "--quiet", "--bare", a, tmp_path / "server.git", where=tmp_path)
    (tmp_path / "c").mkdir()
    shutil.copy(a / "params.yaml", tmp_path / "c/params.yaml")
    shutil.copytree(a / "pipeline", tmp_path / "c/pipeline")
    shutil.copytree(a / "cache", tmp_path / "c/cache")
    told = run("h2t", "cache", "pull", f"file://{tmp_path}/server.git@main", "--pooled", where=tmp_path / "c")
    assert "every byte checked" in told
    run(
        "h2t", "train-classifier", "dr", "data/pool/ce_mixup", "data/train_backbone/ce_mixup", "heads",
        "--set", "hosts.dr.grid.ratio=[0.0,0.2]", where=tmp_path / "c",
    )  # fmt: skip
    sizes = {kind: sum(map(len, tree(a / f"data/{kind}/ce_mixup/maps.zarr").values())) for kind in ("extract", "pool")}
    assert sizes["pool"] < sizes["extract"] * 0.6
