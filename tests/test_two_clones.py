"""A extracts and publishes; B clones, gets the results without the backbone, changes a ratio and trains; C has no room.

Over three remotes: a path, an S3 endpoint and a real sshd, both on the loopback. `make -C tests test-remotes` installs
the sshd, and writes what was moved and how long it took to the file that H2T_REMOTES names.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from builders import tree
from pipeline_builders import ROOT, environment, write_params
from servers import openssh_server, s3_endpoint, sshd_program

from benchmarks.measure import save

pytestmark = [pytest.mark.sharing, pytest.mark.slow]

CODE = (
    "h2t",
    "cache",
    "pipeline",
    "plugins",
    "inputs",
    "dvc.yaml",
    "stages.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
)
NO_SSHD = pytest.mark.skipif(not sshd_program(), reason="needs sshd: make -C tests test-remotes")
SSHD = pytest.param("ssh", marks=NO_SSHD)
#: tests/test_docs_sharing.py publishes to a path and pulls from it in every run.
PATH = pytest.param(
    "path", marks=pytest.mark.skipif("H2T_REMOTES" not in os.environ, reason="make -C tests test-remotes")
)
COUNTING_H2T = """#!/bin/sh
echo "$1 $2" >> "$H2T_CALLS"
exec {h2t} "$@"
"""


class Desk:
    """Somebody's directory: commands run there, with an `h2t` that writes down what it is called for."""

    def __init__(self, where: Path, h2t: Path, **own: str) -> None:
        self.where, self.calls = where, where.parent / f"{where.name}.calls"
        programs = where.parent / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "h2t").write_text(COUNTING_H2T.format(h2t=h2t))
        (programs / "h2t").chmod(0o755)
        self.env = environment(
            PATH=f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin",
            PYTHONPATH=str(where),
            DVC_SITE_CACHE_DIR=str(where.parent / f"{where.name}.site"),
            H2T_CALLS=str(self.calls),
            H2T_BLOCK_CACHE=str(where.parent / f"{where.name}.blocks"),
            **own,
        )

    def run(self, *arguments: object) -> str:
        done = subprocess.run(
            [str(a) for a in arguments], cwd=self.where, env=self.env, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def git(self, *arguments: object) -> str:
        return self.run("git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments)

    def called(self) -> list[str]:
        """The stages that `h2t` was called for since last asked."""
        found = self.calls.read_text().split("\n")[:-1] if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [call.split()[0] for call in found]

    def forwarded(self) -> int:
        """Rows that went through a backbone here, as the run records count them."""
        records = (self.where / "data/runs").rglob("*.json")
        return sum(json.loads(path.read_text()).get("forwarded", 0) for path in records)


def size(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, warm_h2t):
    """A's repository with every stage done and committed, on no remote yet."""
    a = Desk(tmp_path_factory.mktemp("lab") / "a", warm_h2t)
    a.where.mkdir()
    for name in CODE:
        (a.where / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, a.where / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, a.where / name)
    write_params(a.where / "params.yaml")
    a.git("init", "--quiet", "--initial-branch=main")
    a.run("dvc", "repro", "--quiet")
    assert a.forwarded() > 0
    assert "extract" in a.called()
    a.git("add", ".")
    a.git("commit", "--quiet", "--message=results")
    return a.where


@pytest.fixture(params=[PATH, "s3", SSHD])
def remote(request, tmp_path):
    """(kind, URL, environment) of an empty remote."""
    if request.param == "path":
        yield "path", str(tmp_path / "store"), {}
    elif request.param == "s3":
        with s3_endpoint() as own:
            import boto3

            boto3.client("s3", endpoint_url=own["AWS_ENDPOINT_URL"], aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
                         aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"]).create_bucket(Bucket="lab")  # fmt: skip
            yield "s3", "s3://lab/store", own
    else:
        with openssh_server(tmp_path / "home") as port:
            user = os.environ.get("USER", "root")
            yield "ssh", f"ssh://{user}@127.0.0.1:{port}{tmp_path}/store", {"HOME": str(tmp_path / "home")}


def test_nobody_extracts_twice(finished, remote, tmp_path, warm_h2t):
    kind, url, own = remote
    shutil.copytree(finished, tmp_path / "a", symlinks=True)
    a, b, c = (Desk(tmp_path / name, warm_h2t, **own) for name in "abc")
    took: dict[str, dict[str, float]] = {}

    def timed(step: str, desk: Desk, *arguments: object) -> str:
        started = time.perf_counter()
        told = desk.run(*arguments)
        took[step] = {"seconds": round(time.perf_counter() - started, 2)}
        return told

    a.run("dvc", "remote", "add", "--default", "store", url)
    a.git("commit", "--quiet", "--all", "--message=remote")
    told = timed("A publishes", a, "h2t", "cache", "publish")
    assert "holds all" in told
    took["A publishes"]["bytes"] = size(a.where / ".dvc/cache/files")
    a.git("commit", "--quiet", "--all", "--message=verify")
    a.git("clone", "--quiet", "--bare", a.where, tmp_path / "server.git")
    a.called()

    # B: everything, and no stage runs.
    a.git("clone", "--quiet", tmp_path / "server.git", b.where)
    timed("B pulls the results", b, "dvc", "repro", "--pull", "--quiet")
    took["B pulls the results"]["bytes"] = size(b.where / ".dvc/cache/files")
    assert b.called() == []
    assert b.forwarded() == 0
    assert tree(b.where / "data/extract/ce_mixup") == tree(a.where / "data/extract/ce_mixup")
    assert tree(b.where / "data/report") == tree(a.where / "data/report")

    # B: another ratio; heads are trained, the backbone is not run.
    values = yaml.safe_load((b.where / "params.yaml").read_text())
    values["hosts"]["dr"]["grid"]["ratio"] = [0.0, 0.5]
    (b.where / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    timed("B trains another ratio", b, "dvc", "repro", "--pull", "--quiet")
    assert sorted(b.called()) == ["evaluate", "report", "train-classifier"]
    assert b.forwarded() == 0
    found = json.loads((b.where / "data/evaluate/dr/metrics.json").read_text())
    assert found["with_h2t"]["ratio"] == 0.5
    assert "ok    remote" in b.run("h2t", "doctor")

    # C: without the repository, the pooled copy alone, and a head trained from it.
    c.where.mkdir()
    shutil.copy(a.where / "params.yaml", c.where)
    for name in ("h2t", "pipeline", "cache"):
        shutil.copytree(a.where / name, c.where / name, symlinks=True)
    told = timed(
        "C pulls the pooled cache", c, "h2t", "cache", "pull", f"file://{tmp_path}/server.git@main", "--pooled"
    )
    assert "every byte checked" in told
    took["C pulls the pooled cache"]["bytes"] = size(c.where / "data")
    timed(
        "C trains on it", c, "h2t", "train-classifier", "dr", "data/pool/ce_mixup", "data/train_backbone/ce_mixup",
        "heads", "--set", "hosts.dr.grid.ratio=[0.0,0.2]",
    )  # fmt: skip
    assert c.called() == ["cache", "train-classifier"]
    assert size(c.where / "data/pool") < size(a.where / "data/extract") * 0.6

    # Without any copy: rows of the maps, by ranges, through the remote.
    told = timed(
        "D reads five rows of the maps", c, sys.executable, "-c",
        "from h2t.cache.reader import open_cache; "
        f"print(open_cache('dvc+file://{tmp_path}/server.git@main#data/extract/ce_mixup').read([5, 1, 1, 7, 9]).shape)",
    )  # fmt: skip
    assert told.startswith("(5, ")
    took["D reads five rows of the maps"]["bytes"] = size(Path(c.env["H2T_BLOCK_CACHE"]))
    if table := os.environ.get("H2T_REMOTES"):
        known = json.loads(Path(table).read_text()) if Path(table).exists() else {}
        save(Path(table), {**known, kind: took})
