"""A cache at a URL that is replaced while it is open: its old values or CacheError `replaced`, never some of each."""

import os
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import fsspec
import numpy as np
import pytest
from builders import make_cache, make_rows, raises, tree
from hostile_server import hostile_server
from pipeline_builders import ROOT

from h2t.cache.errors import CacheError, CacheWarning
from h2t.cache.format.spec import RECORD, ROWS, STATISTICS
from h2t.cache.read import blocks, remote
from h2t.cache.read.transfer import Version, version_of
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting")

SETTINGS = {"rows": make_rows(60), "shard_rows": 4, "maps": ((3, 2, 2),)}
SHARD = "maps.zarr/expert_0/c.1.0.0.0"  # rows 4 to 7
EVERY = np.arange(60)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """(files, maps) of two caches of one shape."""
    root = tmp_path_factory.mktemp("pins")
    return [
        (tree(root / str(seed)), maps[0]) for seed in (0, 1) if (maps := make_cache(root / str(seed), seed, **SETTINGS))
    ]


@pytest.fixture
def web(caches):
    with hostile_server(dict(caches[0][0])) as (url, handler):
        yield f"{url}/as/is", handler


def replaced(read) -> None:
    with raises("replaced", "was replaced while it was open"):
        read()


def test_rows_that_were_not_read_before(web, caches, kept):
    url, handler = web
    with open_cache(url) as cache:
        cache.read([0])
        handler.files = caches[1][0]
        replaced(lambda: cache.read([59]))
        replaced(lambda: cache.read([0, 59]))


def test_rows_of_a_shard_that_was_read_before(web, caches, monkeypatch):
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "0")
    url, handler = web
    with open_cache(url) as cache:
        cache.read([4])
        handler.files = caches[1][0]
        handler.asked.clear()
        replaced(lambda: cache.read([5]))
        assert [command for command, _ in handler.asked] == ["GET"]  # the answer itself tells


def test_what_the_disk_keeps_is_still_given(web, caches):
    url, handler = web
    with open_cache(url) as cache:
        cache.read([4])
        handler.files = caches[1][0]
        assert cache.read([5]).tobytes() == caches[0][1][[5]].tobytes()


@pytest.mark.parametrize(("part", "name"), [("rows", ROWS), ("statistics", STATISTICS)])
def test_row_table_and_statistics(web, caches, part, name):
    url, handler = web
    with open_cache(url) as cache:
        handler.files = caches[1][0] | {name: caches[0][0][name][:-1] + b"x"}
        replaced(lambda: getattr(cache, part))


def test_a_cache_that_is_gone(web, caches, kept):
    url, handler = web
    with open_cache(url) as cache:
        cache.read([0])
        handler.files = {}
        replaced(lambda: cache.read([59]))
        replaced(lambda: cache.rows)


def test_a_missing_shard_of_a_cache_that_is_there_is_missing(web, caches, kept):
    url, handler = web
    with open_cache(url) as cache:
        handler.files = {name: data for name, data in caches[0][0].items() if name != SHARD}
        with raises("missing"):
            cache.read([4])


def test_a_shard_of_another_size(web, caches, kept):
    url, handler = web
    with open_cache(url) as cache:
        handler.files = caches[1][0] | {SHARD: caches[1][0][SHARD] + b"x"}
        replaced(lambda: cache.read([4]))


def test_the_record_is_looked_at_from_time_to_time(web, caches, monkeypatch):
    """A shard that was exchanged before its first read, while the record was still the old one."""
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "0")
    monkeypatch.setattr(remote, "RECORD_SECONDS", 0.2)
    url, handler = web
    with open_cache(url) as cache:
        handler.files = caches[1][0] | {RECORD: caches[0][0][RECORD]}
        cache.read([4])
        handler.files = caches[1][0]
        time.sleep(0.3)
        replaced(lambda: cache.read([5]))


def test_a_child_opens_what_its_parent_opened(web, caches, kept):
    url, handler = web
    with open_cache(url) as cache:
        handler.files = caches[1][0]
        child = pickle.loads(pickle.dumps(cache))
        replaced(lambda: child.read([0]))
        replaced(lambda: child.files.read_all(RECORD, 10**6))


def test_a_verification_that_meets_a_replacement_says_so(web, caches, monkeypatch):
    url, handler = web
    original = remote.RemoteFiles.listed_sizes

    def late(self, names):
        handler.files = caches[1][0]
        return original(self, names)

    monkeypatch.setattr(remote.RemoteFiles, "listed_sizes", late)
    assert any("was replaced" in str(fault) for fault in verify(url))


def test_random_moments(web, caches, kept, tmp_path, monkeypatch):
    """A hundred replacements while rows are read: every result is of one cache, the one that was opened."""
    url, handler = web
    rng = random.Random(0)
    ends = []
    for at in range(100):
        monkeypatch.setenv("H2T_BLOCK_CACHE", str(tmp_path / str(at)))
        old, new = caches if at % 2 else caches[::-1]
        handler.files = old[0]
        with open_cache(url) as cache:
            timer = threading.Timer(rng.uniform(0, 0.05), setattr, (handler, "files", new[0]))
            timer.start()
            try:
                for _ in range(6):
                    wanted = np.array(rng.sample(range(60), 3))
                    assert cache.read(wanted).tobytes() == old[1][wanted].tobytes()
            except CacheError as error:
                ends.append(error.reason)
            timer.join()
    assert set(ends) == {"replaced"}


def test_blocks_of_two_versions_never_meet(web, caches, monkeypatch):
    """A large shard, kept block by block: those of the wrong object do not serve once the right one is back."""
    monkeypatch.setattr(remote, "BLOCKS_AT_ONCE", 1)
    for module in (remote, blocks):
        monkeypatch.setattr(module, "BLOCK_BYTES", 32)
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "8000000")
    url, handler = web
    own, other = caches[0][0], caches[1][0]
    handler.files = own | {SHARD: other[SHARD]}
    with open_cache(url) as cache:
        wrong = cache.read([4]).tobytes()  # its own checksum holds
    assert wrong != caches[0][1][[4]].tobytes()
    handler.files = own
    for _ in range(2):
        with open_cache(url) as cache:
            for row in (5, 4, 6, 7):
                assert cache.read([row]).tobytes() == caches[0][1][[row]].tobytes()
    with open_cache(url) as cache:
        handler.asked.clear()
        cache.read([4, 5, 6, 7])
        assert not any(name == SHARD and command == "GET" for command, name in handler.asked)


def test_a_store_that_tells_no_version_says_so_once_and_keeps_whole_shards_only(web, caches, monkeypatch, tmp_path):
    url, handler = web
    handler.tagged = False
    monkeypatch.setenv("H2T_BLOCK_CACHE", str(tmp_path))
    with pytest.warns(CacheWarning, match="neither ETag nor time") as told:
        cache = open_cache(url)
    with cache:
        cache.read([4])
        assert cache.rows == SETTINGS["rows"]
        handler.files = caches[1][0]
        replaced(lambda: cache.read([8]))  # the shard is fetched whole, and does not hold
        monkeypatch.setattr(remote, "BLOCKS_AT_ONCE", 0)
        before = set(tmp_path.rglob("*"))
        handler.files = caches[0][0]
        assert cache.read([12]).tobytes() == caches[0][1][[12]].tobytes()
        assert set(tmp_path.rglob("*")) == before
    assert len(told) == 1


def _touch(given) -> list:
    cache, ways = given
    return [bytes(cache.rows["source"][0].as_py(), "ascii") if way == "rows" else _bytes(cache, way) for way in ways]


def _bytes(cache, way) -> bytes:
    return cache.statistics if way == "statistics" else cache.read([7, 59]).tobytes()


@pytest.mark.parametrize("first", ["rows", "statistics", "read"])
@pytest.mark.parametrize("store", ["http", "memory"])
def test_a_forked_child_touches_anything_first(web, caches, tmp_path, store, first):
    url, _ = web
    if store == "memory":
        url = f"memory://{tmp_path.name}"
        for name, data in caches[0][0].items():
            fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/{name}", data)
    ways = [first, "rows", "statistics", "read"]
    with open_cache(url) as cache:
        expected = _touch((open_cache(url), ways))
        results: list = []
        queue = get_context("fork").Queue()
        children = [get_context("fork").Process(target=lambda: queue.put(_touch((cache, ways)))) for _ in range(2)]
        for child in children:
            child.start()
        results = [queue.get(timeout=60) for _ in children]
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        assert results == [expected] * 2
        assert _touch((cache, ways)) == expected  # and the parent's connection still works


def test_a_fork_while_threads_read(web, caches, monkeypatch):
    """Locks that other threads held, and the loop's thread, do not exist in the child."""
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "0")
    url, _ = web
    with open_cache(url) as cache:
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                cache.read(EVERY)

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            for _ in range(3):
                with ProcessPoolExecutor(1, get_context("fork"), _give, (cache,)) as pool:
                    assert pool.submit(_read_given).result(60) == caches[0][1].tobytes()
        finally:
            stop.set()
            thread.join()


GIVEN = []


def _give(cache):
    GIVEN.append(cache)


def _read_given():
    return GIVEN[-1].read(EVERY).tobytes()


def test_versions():
    assert version_of({"ETag": 'W/"a"', "size": 5}) == Version("a", 5)
    assert version_of({"etag": "a"}).known
    assert not version_of({"size": 5}).known
    assert Version("a", 1).differs(Version("b", 1))
    assert not Version("a", 1, ("mtime", "2")).differs(Version("a", 1, ("mtime", "3")))
    assert Version(None, 1).differs(Version(None, 2))
    assert Version(None, 1, ("mtime", "2")).differs(Version(None, 1, ("mtime", "3")))
    assert not Version(None, 1, ("mtime", "2")).differs(Version(None, 1, ("created", "3")))
    assert not Version("a", None).differs(Version(None, None))


def test_the_command_line_says_it_in_one_line(web, tmp_path):
    url, handler = web
    handler.tagged = False
    own = {**os.environ, "H2T_BLOCK_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "h2t.pipeline", "cache", "info", url]
    done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr.startswith(f"warning: {url}: the store tells neither ETag nor time")
    assert len(done.stderr.splitlines()) == 1
