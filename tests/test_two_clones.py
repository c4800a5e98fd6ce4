"""A extracts and publishes; B clones, gets the results without images and backbone, changes a ratio; C has no room.

Over three remotes: a path, an S3 endpoint and a real sshd, both on the loopback. `make -C tests test-remotes` installs
the sshd, and writes what was moved and how long it took to the file that H2T_REMOTES names.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from builders import tree
from repositories import Project, git, start_project
from servers import openssh_server, s3_endpoint, sshd_program
from test_watch import make_images, values_of, write

from benchmarks.measure import save
from h2t.pipeline.sharing.publish import _absent_input

pytestmark = [pytest.mark.sharing, pytest.mark.slow]

NO_SSHD = pytest.mark.skipif(not sshd_program(), reason="needs sshd: make -C tests test-remotes")
SSHD = pytest.param("ssh", marks=NO_SSHD)
#: tests/test_docs_sharing.py publishes to a path and pulls from it in every run.
PATH = pytest.param(
    "path", marks=pytest.mark.skipif("H2T_REMOTES" not in os.environ, reason="make -C tests test-remotes")
)


def parameters(photos: str, ratio: float) -> dict:
    """Of a host with one classifier without H2T and one with it."""
    values = values_of(photos)
    del values["backbones"]["other"]
    values["hosts"]["dr"]["grid"]["ratio"] = [0.0, ratio]
    values["evaluate"] = {"ratio": ratio}
    return values


def forwarded(project: Project) -> int:
    """Rows that went through a backbone there, as the run records count them."""
    records = (project.root / "data/runs").rglob("*.json")
    return sum(json.loads(path.read_text()).get("forwarded", 0) for path in records)


def size(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, warm_h2t):
    """A's repository with every stage done and committed, on no remote yet; its images are in no repository."""
    a = start_project(tmp_path_factory.mktemp("lab") / "a", parameters("photos", 0.3), warm_h2t, "photos")
    make_images(a.root / "photos")
    assert "extract@ce_mixup" in a.ran()
    assert forwarded(a) > 0
    git("add", ".", where=a.root)
    git("commit", "--quiet", "--message=results", where=a.root)
    return a.root


@pytest.fixture(params=[PATH, "s3", SSHD])
def remote(request, tmp_path):
    """(kind, URL, environment) of an empty remote."""
    if request.param == "path":
        yield "path", str(tmp_path / "store"), {}
    elif request.param == "s3":
        with s3_endpoint() as bucket:
            yield "s3", "s3://lab/store", bucket.environment
    else:
        with openssh_server(tmp_path / "home") as port:
            user = os.environ.get("USER", "root")
            yield "ssh", f"ssh://{user}@127.0.0.1:{port}{tmp_path}/store", {"HOME": str(tmp_path / "home")}


def test_nobody_extracts_twice(finished, remote, tmp_path, warm_h2t):
    kind, url, own = remote
    shutil.copytree(finished, tmp_path / "a", symlinks=True)
    a, b, c = (Project(tmp_path / name, warm_h2t, **own) for name in "abc")
    took: dict[str, dict[str, float]] = {}

    def timed(step: str, project: Project, *arguments: object) -> str:
        started = time.perf_counter()
        told = project.run(*arguments)
        took[step] = {"seconds": round(time.perf_counter() - started, 2)}
        return told

    a.run("dvc", "remote", "add", "--default", "store", url)
    git("commit", "--quiet", "--all", "--message=remote", where=a.root)
    told = timed("A publishes", a, "h2t", "cache", "publish")
    assert "holds all" in told
    took["A publishes"]["bytes"] = size(a.root / ".dvc/cache/files")
    images = {p.read_bytes() for p in (a.root / "photos").rglob("*.png")}
    assert not images & {p.read_bytes() for p in (a.root / ".dvc/cache/files").rglob("*") if p.is_file()}
    git("commit", "--quiet", "--all", "--message=verify", where=a.root)
    git("clone", "--quiet", "--bare", str(a.root), str(tmp_path / "server.git"), where=tmp_path)

    # B: everything, and no stage runs.
    git("clone", "--quiet", str(tmp_path / "server.git"), str(b.root), where=tmp_path)
    timed("B pulls the results", b, "dvc", "repro", "--pull", "--quiet")
    took["B pulls the results"]["bytes"] = size(b.root / ".dvc/cache/files")
    assert b.called() == []
    assert forwarded(b) == 0
    assert tree(b.root / "data/extract/ce_mixup") == tree(a.root / "data/extract/ce_mixup")
    assert tree(b.root / "data/report") == tree(a.root / "data/report")

    # B: another ratio; heads are trained, the backbone is not run.
    write(b.root, parameters("photos", 0.5))
    timed("B trains another ratio", b, "dvc", "repro", "--pull", "--quiet")
    assert sorted(b.called()) == ["evaluate", "report", "train-classifier"]
    assert forwarded(b) == 0
    found = json.loads((b.root / "data/evaluate/dr/metrics.json").read_text())
    assert found["with_h2t"]["ratio"] == 0.5
    assert "ok    remote" in b.run("h2t", "doctor")
    # The images are all that `publish` overlooks. Somewhere else their digest is the same.
    status = b.status()
    assert _absent_input("watch@photos", status["watch@photos"])
    assert not any(_absent_input(stage, why) for stage, why in status.items() if stage != "watch@photos")
    shutil.copytree(a.root / "photos", tmp_path / "elsewhere")
    write(b.root, parameters(str(tmp_path / "elsewhere"), 0.5))
    assert b.ran("train_classifier") == ["watch@photos"]

    # C: without the repository, the pooled copy alone, and a head trained from it.
    c.root.mkdir()
    shutil.copy(a.root / "params.yaml", c.root)
    for name in ("h2t", "pipeline", "cache"):
        shutil.copytree(a.root / name, c.root / name, symlinks=True)
    told = timed(
        "C pulls the pooled cache", c, "h2t", "cache", "pull", f"file://{tmp_path}/server.git@main", "--pooled"
    )
    assert "every byte checked" in told
    took["C pulls the pooled cache"]["bytes"] = size(c.root / "data")
    timed(
        "C trains on it", c, "h2t", "train-classifier", "dr", "data/pool/ce_mixup", "data/train_backbone/ce_mixup",
        "heads", "--set", "hosts.dr.grid.ratio=[0.0,0.2]",
    )  # fmt: skip
    assert c.called() == ["cache", "train-classifier"]

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
