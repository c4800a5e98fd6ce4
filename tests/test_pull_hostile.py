"""`h2t cache pull` from remotes that are hostile, slow or damaged: one line, bounded memory, and what came is kept."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from builders import make_rows, tree
from hostile_server import hostile_server
from pipeline_builders import invoke, refused
from repositories import cache_repository, dvc, git

from h2t.cache.format.spec import RECORD
from h2t.cache.read import asking, transfer
from h2t.pipeline.sharing import repository

PARTS = ("extract/b", "train_backbone/b")
SHARD, WEIGHTS = "maps.zarr/expert_0/c.1.0.0.0", "backbone.safetensors"
MOST_MORE = 200 * 1024**2


class Lab:
    """A published repository: its path, the address for a pull, and its remote behind the hostile server."""

    def __init__(self, home: Path, handler) -> None:
        self.home, self.handler = home, handler
        self.url = f"file://{home / 'a'}/.git"
        self.wanted = {part: tree(home / "a/data" / part) for part in PARTS}
        outputs = {out.path: out.digest for out in repository.outs(home / "a")}
        by_content = {content: name for name, content in handler.files.items()}
        self.objects = {name: by_content[content] for part in PARTS for name, content in self.wanted[part].items()}
        self.objects["listing"] = f"files/md5/{outputs['data/extract/b'][:2]}/{outputs['data/extract/b'][2:]}"

    def pull(self, into: Path):
        return invoke("cache", "pull", self.url, "--into", into)

    def refused(self, into: Path) -> str:
        """The line with which the pull ends."""
        return refused("cache", "pull", self.url, "--into", into, leaves=into / "extract/b", code=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    home = tmp_path_factory.mktemp("hostile")
    root = cache_repository(home, rows=make_rows(60), shard_rows=20)
    dvc("push", where=root)
    with hostile_server(tree(home / "store")) as (url, handler):
        dvc("remote", "modify", "store", "url", f"{url}/sound/x", where=root)
        git("add", ".", where=root)
        git("commit", "--quiet", "--message=one", where=root)
        yield Lab(home, handler)


@pytest.fixture
def lab(published, monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0)
    files = dict(published.handler.files)
    yield published
    published.handler.files, published.handler.spoiled = files, {}


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def peak_of_a_pull(lab: Lab, into: Path) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    lab.pull(into)
    return peak_bytes()


def test_no_answer_fills_the_memory_or_the_disk(lab, tmp_path):
    before = peak_of_a_pull(lab, tmp_path / "sound")
    assert {part: tree(tmp_path / "sound" / part) for part in PARTS} == lab.wanted
    assert "identity" in lab.handler.encodings
    for mode in ("gzip", "endless", "lies"):
        for name in (RECORD, SHARD, WEIGHTS, "listing"):
            lab.handler.spoiled = {lab.objects[name]: mode}
            into = tmp_path / f"{mode}-{Path(name).name}"
            peak = peak_of_a_pull(lab, into)
            assert peak - before < MOST_MORE, (mode, name)
            kept = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
            assert kept < 10**6, (mode, name)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("gzip", "the server must send it unencoded; got encoding gzip"),
        ("endless", "must be at most {} bytes"),
        ("lies", "must be at most {} bytes"),
    ],
)
def test_a_spoiled_shard_is_one_line_and_the_rest_is_kept(lab, tmp_path, mode, says):
    lab.handler.spoiled = {lab.objects[SHARD]: mode}
    line = lab.refused(tmp_path)
    assert f"1 file damaged at the remote ({SHARD}: {says.format(len(lab.wanted['extract/b'][SHARD]))}" in line
    assert "h2t cache publish --repair" in line
    assert set(tree(tmp_path / "extract/.b.staging/cache")) == set(lab.wanted["extract/b"]) - {SHARD}
    lab.handler.spoiled, lab.handler.asked[:] = {}, []
    done = lab.pull(tmp_path)
    assert done.exit_code == 0, done.output
    assert {part: tree(tmp_path / part) for part in PARTS} == lab.wanted
    fetched = {name for _, name in lab.handler.asked}
    assert lab.objects[SHARD] in fetched
    assert lab.objects[RECORD] not in fetched


@pytest.mark.parametrize("change", [lambda data: data[:-3], lambda data: data[:-1] + b"?", lambda data: data + b"?"])
@pytest.mark.parametrize("name", [RECORD, SHARD, WEIGHTS, "listing"])
def test_another_object_than_recorded_is_refused(lab, tmp_path, name, change):
    place = lab.objects[name]
    lab.handler.files = lab.handler.files | {place: change(lab.handler.files[place])}
    out = tmp_path / ("train_backbone/b" if name == WEIGHTS else "extract/b")
    assert "h2t cache publish --repair" in refused("cache", "pull", lab.url, "--into", tmp_path, leaves=out, code=1)


def test_all_files_that_are_there_come_and_the_missing_ones_are_counted(lab, tmp_path):
    gone = {SHARD, "maps.zarr/expert_0/c.0.0.0.0"}
    places = {lab.objects[name] for name in gone}
    lab.handler.files = {place: data for place, data in lab.handler.files.items() if place not in places}
    line = lab.refused(tmp_path)
    assert "2 files missing at the remote (first: maps.zarr/expert_0/c." in line
    assert "ask the owner to type: h2t cache publish, then" in line
    assert set(tree(tmp_path / "extract/.b.staging/cache")) == set(lab.wanted["extract/b"]) - gone


@pytest.mark.parametrize("name", [RECORD, SHARD, "listing"])
@pytest.mark.parametrize("mode", ["slow", "silent"])
def test_a_remote_that_hardly_answers_is_left(lab, tmp_path, monkeypatch, mode, name):
    monkeypatch.setattr(transfer, "WINDOW", 1.0)
    lab.handler.spoiled = {lab.objects[name]: mode}
    assert "too slow (fewer than 1000 bytes/s over 1 s)" in lab.refused(tmp_path)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_full_disk_is_one_line_and_the_pull_goes_on_when_there_is_room(lab, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        (disk / "ballast").write_bytes(bytes(2 * 1024**2 - 16 * 1024))
        assert "no space left" in lab.refused(disk / "b")
        (disk / "ballast").unlink()
        assert lab.pull(disk / "b").exit_code == 0
        assert {part: tree(disk / "b" / part) for part in PARTS} == lab.wanted
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def own(lab, tmp_path):
    """A clone with a remote of its own that is a directory, to be changed by a test: (clone, remote)."""
    root, store = tmp_path / "own", tmp_path / "store"
    git("clone", "--quiet", str(lab.home / "a"), str(root), where=tmp_path)
    shutil.copytree(lab.home / "store", store)
    dvc("remote", "modify", "store", "url", str(store), where=root)
    git("commit", "--quiet", "--all", "--message=directory", where=root)
    return root, store


def refused_by(root: Path, into: Path) -> str:
    return refused("cache", "pull", f"file://{root}/.git", "--into", into, code=1)


def test_a_directory_as_remote_is_bounded_too(lab, own, tmp_path):
    root, store = own
    shard = store / lab.objects[SHARD]
    shard.chmod(0o644)
    os.truncate(shard, 10**13)  # a sparse file, larger than the disk
    line = refused_by(root, tmp_path / "b")
    assert f"{SHARD}: must be at most {len(lab.wanted['extract/b'][SHARD])} bytes; it is longer" in line


@pytest.mark.parametrize("name", ["../../x", "/x", "a/../../x"])
def test_a_file_that_leads_out_is_refused(own, tmp_path, name):
    root, store = own
    digest = next(out.digest for out in repository.outs(root) if out.path == "data/extract/b")
    listing = json.loads((store / "files/md5" / digest[:2] / digest[2:]).read_bytes())
    listing[0]["relpath"] = name
    hostile = json.dumps(listing).encode()
    other = f"{hashlib.md5(hostile).hexdigest()}.dir"
    place = store / "files/md5" / other[:2] / other[2:]
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(hostile)
    lock = root / "dvc.lock"
    lock.write_text(lock.read_text().replace(digest, other))
    git("commit", "--quiet", "--all", "--message=hostile", where=root)
    assert "leads out of the folder" in refused_by(root, tmp_path / "b")
    assert not (tmp_path / "x").exists()
