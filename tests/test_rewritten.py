"""Files of the user that h2t adds to: a kill or a full disk loses nothing, and links, modes and line ends stay."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from functools import partial

import pytest
from kills import struck
from pipeline_builders import silent
from repositories import dvc, git

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import rewrite
from h2t.pipeline.project.write import _append
from h2t.pipeline.sharing.publish import set_verify
from h2t.pipeline.stages import watch

CONFIG = b"[core]\n    remote = a  # mine\n['remote \"a\"']\n    url = /store\n"


@contextmanager
def no_room():
    """Any file may have 10 bytes, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def kept(path, change, before: bytes) -> bytes:
    """What `change` makes of `path`, which holds `before` after a full disk, and until the last step when killed."""
    beside = {*names(path.parent), path.name}
    path.write_bytes(before)
    with no_room(), pytest.raises(UserError, match="cannot be written"):
        change()
    assert path.read_bytes() == before
    assert set(names(path.parent)) == beside
    for step in range(20):
        code = struck(change, step)
        if code == 0 or path.read_bytes() != before:
            break
        assert code == -signal.SIGKILL
    assert path.read_bytes() != before
    path.write_bytes(before)
    change()
    assert set(names(path.parent)) == beside  # nothing of the killed ones
    return path.read_bytes()


def test_a_list_of_ignored_files_is_never_lost(tmp_path):
    path = tmp_path / ".gitignore"
    assert kept(path, partial(_append, path, ["/data/"]), b"*.mine\n" * 9) == b"*.mine\n" * 9 + b"/data/\n"


def test_a_list_of_ignored_files_stays_what_it_is(tmp_path):
    own = tmp_path / "own"
    own.write_bytes(b"a\x0cb\r\n" + b"caf\xe9\r\n/data/\r\nlast")
    own.chmod(0o640)
    (tmp_path / ".gitignore").symlink_to(own)
    _append(tmp_path / ".gitignore", ["/data/", "/new/"])
    assert own.read_bytes() == b"a\x0cb\r\ncaf\xe9\r\n/data/\r\nlast\r\n/new/\r\n"
    assert own.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / ".gitignore").is_symlink()


def test_nothing_is_written_where_nothing_is_missing(tmp_path):
    path = tmp_path / ".gitignore"
    path.write_bytes(b"/data/")
    before = path.stat()
    _append(path, ["/data/"])
    assert path.read_bytes() == b"/data/"
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="must be a file; got something else"):
        rewrite(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


@pytest.fixture
def project(tmp_path):
    """A repository of DVC with a remote."""
    git("init", "--quiet", where=tmp_path)
    dvc("init", where=tmp_path)
    return tmp_path


def test_remotes_are_never_lost(project):
    before = names(project / ".dvc")
    config = project / ".dvc/config"
    set_it = partial(set_verify, project, "a")
    for spelt in (CONFIG, CONFIG.replace(b"'", b""), CONFIG.replace(b"\n", b"\r\n")):  # DVC edits the second one
        after = kept(config, set_it, spelt)
        assert after.replace(b"'", b"").count(b'[remote "a"]') == 1
        assert b"url = /store" in after
        assert not set_it()
        assert (b"# mine" in after) == (b"'" in spelt)
        assert (b"\r\n" in after) == (b"\r\n" in spelt)
    assert names(project / ".dvc") == before


def test_the_digest_of_an_input_is_never_lost(tmp_path):
    """As long as nothing has taken its place; DVC runs the stage again then."""
    (tmp_path / "photo").write_bytes(b"new")
    out = tmp_path / "inputs/photo.json"
    out.parent.mkdir()
    out.write_text("old")
    work = partial(watch.run, "photo", {"photo": str(tmp_path / "photo")}, out, silent)
    with no_room(), pytest.raises(OSError, match="File too large"):
        work()
    assert struck(work, 0) == -signal.SIGKILL
    assert out.read_text() == "old"
    work()
    assert json.loads(out.read_text())["files"] == 1
    assert names(out.parent) == ["photo.json"]
