"""A cache on a real S3 endpoint and behind a real SSH server, both on the loopback: read, verified, refused."""

import os
import subprocess
import sys

import pytest
from builders import make_cache, make_rows, raises
from pipeline_builders import ROOT
from servers import S3_KEY, S3_SECRET, Folder, put_all, store_of

from h2t.cache.read import asking
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

SETTINGS = {"rows": make_rows(60), "shard_rows": 4, "maps": ((3, 2, 2), (2, 1, 1))}
WANTED = [59, 4, 4, 0, 31]


@pytest.fixture
def made(tmp_path):
    return make_cache(tmp_path / "c", **SETTINGS)


@pytest.fixture(params=["s3", "ssh"])
def store(request, tmp_path, made):
    """A place on a server on the loopback that holds the cache `c`."""
    with store_of(request.param, tmp_path) as place:
        put_all(place, tmp_path / "c", "c")
        yield place


def replace(store, tmp_path):
    """Puts another cache of the same shape in the place of `c`."""
    make_cache(tmp_path / "new", seed=1, **SETTINGS)
    store.clear()
    put_all(store, tmp_path / "new", "c")
    if isinstance(store, Folder):
        for path in store.root.rglob("*"):
            os.utime(path, (path.stat().st_mtime + 2,) * 2)  # SFTP tells whole seconds


@pytest.mark.parametrize("kept", ["8000000", "0"], ids=["blocks kept", "no blocks"])
def test_a_cache_is_read_and_verified(store, made, monkeypatch, kept):
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", kept)
    with open_cache(f"{store.url}/c") as cache:
        assert cache._chunks.unchecked == set()  # sizes came with the listing
        for expert in (0, 1):
            assert cache.read(WANTED, expert=expert).tobytes() == made[expert][WANTED].tobytes()
        assert cache.rows == SETTINGS["rows"]
    assert verify(f"{store.url}/c") == []
    assert verify(f"{store.url}/c", quick=True) == []


def test_a_replaced_cache_is_noticed(store, tmp_path, monkeypatch):
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "0")
    with open_cache(f"{store.url}/c") as cache, open_cache(f"{store.url}/c") as other:
        cache.read(WANTED)
        replace(store, tmp_path)
        for read in (lambda: cache.read([4]), lambda: cache.read([20]), lambda: other.read([0])):
            with raises("replaced", "was replaced while it was open"):
                read()


def test_what_is_not_there_is_no_cache(store):
    with raises("uncommitted"):
        open_cache(f"{store.url}/d")


def test_a_stranger_is_refused_in_one_line(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # neither a key nor a known host
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with raises("unreachable") as error:
        open_cache(f"{store.url}/c")
    assert "times" not in error.value.detail  # asking again could not help
    assert len(error.value.detail.splitlines()) == 1


def test_no_server_is_one_line(made, monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    for url in ("s3://lab/x/c", "ssh://user:s3cr3t@127.0.0.1:1/c"):
        with raises("unreachable", f"{asking.TRIES} times") as error:
            open_cache(url)
        assert not any(secret in error.value.detail for secret in (S3_SECRET, "s3cr3t"))


def test_the_command_line_tells_no_secret(tmp_path):
    """Not in a message, not in a log, not in what it leaves behind."""
    own = {**os.environ, "HOME": str(tmp_path), "H2T_BLOCK_CACHE": str(tmp_path / "blocks"), "PYTHONPATH": str(ROOT)}
    urls = (
        "https://s3cr3t:s3cr3t@127.0.0.1:1/c?sig=s3cr3t",
        "nosuch://u:s3cr3t@h/c",
        "dvc+https://s3cr3t@127.0.0.1:1/r#x",
    )
    for url in urls:
        command = [sys.executable, "-m", "h2t.pipeline", "cache", "info", url]
        done = subprocess.run(command, env=own, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "s3cr3t" not in done.stdout + done.stderr
    assert not any(b"s3cr3t" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
