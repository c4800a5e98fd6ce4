"""Hostile and slow web servers: what a reader takes from them is bounded, in memory and in time."""

import json
import os
import subprocess
import sys
import time

import pytest
from aiohttp import ClientResponseError
from builders import make_cache, make_rows, raises, tree
from fsspec.implementations.local import LocalFileSystem
from hostile_server import hostile_server
from pipeline_builders import ROOT

from h2t.cache.errors import CacheError
from h2t.cache.format import spec
from h2t.cache.format.spec import MAPS, MAX_RECORD_BYTES, RECORD, ROWS, STATISTICS
from h2t.cache.read import files as local
from h2t.cache.read import transfer
from h2t.cache.read.stores import store_of
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting")

SETTINGS = {"rows": make_rows(60), "shard_rows": 20, "maps": ((3, 2, 2),)}
MOST_MORE = 200 * 1024**2

#: Reads the cache at each URL in turn, and tells for each how that ended and the peak of memory so far.
READER = """
import json, os, resource, sys
import numpy as np
from h2t.cache.errors import CacheError
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

def whole(url):
    with open_cache(url) as cache:
        cache.rows, cache.statistics
        cache.read(np.arange(cache.spec.rows))
    return "sound"

def checked(url):
    return str(verify(url)[:1])

def ended(way, url):
    try:
        return way(url)
    except CacheError as error:
        return error.reason

found = []
for number, url in enumerate(sys.argv[1:]):
    for way in (whole, checked):
        os.environ["H2T_BLOCK_CACHE"] = f"{number}/{way.__name__}"  # each begins with none
        end = ended(way, url)
        found.append([url, way.__name__, end, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "c"
    make_cache(root, **SETTINGS)
    with hostile_server(tree(root)) as found:
        yield found


@pytest.mark.parametrize(
    ("blocks", "targets"),
    [("8000000", [RECORD, ROWS, STATISTICS, MAPS]), ("0", [MAPS])],  # only shards are kept in blocks
    ids=["blocks kept", "no blocks"],
)
def test_no_answer_fills_the_memory(server, tmp_path, blocks, targets):
    url, handler = server
    urls = [f"{url}/sound/x"] + [
        f"{url}/{mode}/{name}" for mode in ("gzip", "endless", "lies", "range") for name in targets
    ]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "H2T_BLOCK_CACHE_BYTES": blocks}
    done = subprocess.run(
        [sys.executable, "-c", READER, *urls], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [end for _, _, end, _ in found[:2]] == ["sound", "[]"]
    before = found[1][3]
    for address, way, end, peak in found[2:]:
        assert end not in ("sound", "[]"), (address, way)
        assert peak - before < MOST_MORE, (address, way, peak - before)
    assert handler.encodings == {"identity"}


@pytest.mark.parametrize("target", [RECORD, ROWS, MAPS])
@pytest.mark.parametrize("mode", ["slow", "silent", "breaks"])
def test_a_server_that_hardly_answers_is_left(server, monkeypatch, mode, target):
    monkeypatch.setattr(transfer, "WINDOW", 1.0)
    started = time.monotonic()
    with raises("unreachable", "too slow") as error, open_cache(f"{server[0]}/{mode}/{target}") as cache:
        assert cache.rows is not None
        cache.read([0, 59])
    assert len(error.value.detail.splitlines()) == 1
    assert time.monotonic() - started < 60  # one window and a busy machine; the silence lasts two minutes


def test_a_slow_but_steady_server_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(transfer, "WINDOW", 1.5)
    monkeypatch.setattr(transfer, "LEAST_RATE", 100)  # far below the server's, which may be starved for a second
    with open_cache(f"{server[0]}/steady/{ROWS}") as cache:
        started = time.monotonic()
        assert cache.rows == SETTINGS["rows"]
    assert time.monotonic() - started > transfer.WINDOW


def test_the_rate_is_that_of_the_store_and_not_of_a_request(monkeypatch):
    monkeypatch.setattr(transfer, "WINDOW", 1.0)
    pace = transfer.Pace()
    patience = transfer.Patience(pace)
    pace.came(1000)
    time.sleep(1.01)

    async def answer() -> str:
        await transfer.asyncio.sleep(0.1)
        return "here"

    from fsspec.asyn import get_loop

    class Store:
        loop = get_loop()

    assert patience.result(Store, answer()) == "here"
    with pytest.raises(transfer.TooSlow):
        patience.result(Store, transfer.asyncio.sleep(60))


def test_a_local_record_has_a_limit_too(tmp_path):
    make_cache(tmp_path / "c")
    with (tmp_path / "c" / RECORD).open("r+b") as file:
        file.truncate(10 * 10**9)  # a sparse file
    with raises("damaged", str(MAX_RECORD_BYTES)):
        open_cache(tmp_path / "c")
    assert any(RECORD in str(fault) for fault in verify(tmp_path / "c"))


def test_a_local_file_is_read_up_to_its_recorded_size(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    files = local.LocalFiles(tmp_path)
    assert files.read_all("x", 5) == b"12345"
    with pytest.raises(CacheError, match="must be at most 4 bytes"):
        files.read_all("x", 4)


def test_a_cache_of_too_many_shards_is_refused_before_the_first_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(spec, "MAX_RECORD_BYTES", 2000)
    with pytest.raises(CacheError, match="make shards larger"):
        make_cache(tmp_path / "c", **{**SETTINGS, "shard_rows": 1})


@pytest.mark.parametrize("name", [RECORD, "files/md5/ab/cdef.dir"])
def test_dvcs_own_client_is_bounded_and_asks_once(name):
    """The file system of a DVC remote on a web server: it packs, waits and asks again by itself otherwise."""
    from dvc_http import HTTPFileSystem

    with hostile_server({name: b"[1,2,3]"}) as (url, handler):
        fs = HTTPFileSystem(url=url).fs

        def whole(mode: str) -> bytes:
            patience = transfer.Patience(transfer.Pace())
            return store_of(fs).whole(f"{url}/{mode}/{name[:5]}/{name}", 1000, patience).data

        assert whole("unspoiled") == b"[1,2,3]"
        for mode in ("gzip", "endless", "lies"):
            with pytest.raises(transfer.Unasked):
                whole(mode)
        handler.asked.clear()
        with pytest.raises(ClientResponseError, match="500"):
            whole("broken")
        assert len(handler.asked) == 1


def test_a_list_of_files_at_a_dvc_remote_is_bounded(tmp_path):
    """DVC's own parts are as they are; only what the remote gives is too long."""
    (tmp_path / "listing").write_bytes(b"x" * 100)
    with pytest.raises(transfer.Unasked, match="must be at most 99 bytes"):
        store_of(LocalFileSystem()).whole(str(tmp_path / "listing"), 99, transfer.Patience(transfer.Pace()))
