"""Caches behind a URL: few requests to open, ranges only, and every way a store can go wrong is a CacheError."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from builders import make_cache, make_rows, raises, tree
from crc32c import crc32c
from hostile_server import hostile_server

from h2t.cache.errors import CacheError
from h2t.cache.read import asking
from h2t.cache.read.spans import MAX_SPAN_BYTES, merged
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

SHARD = "maps.zarr/expert_0/c.1.0.0.0"
pytestmark = pytest.mark.usefixtures("no_waiting")

SETTINGS = {"rows": make_rows(60), "shard_rows": 4, "maps": ((3, 2, 2), (2, 1, 1))}
WANTED = [59, 4, 4, 0, 31]


def refused(url, reason, says=None, rows=WANTED) -> None:
    with raises(reason, says), open_cache(url) as cache:
        cache.read(rows)


# --- a store that lists sizes


@pytest.fixture
def memory(tmp_path):
    maps = make_cache(tmp_path / "c", **SETTINGS)
    fs = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    for name, data in tree(tmp_path / "c").items():
        fs.pipe_file(f"{root}/{name}", data)
    yield SimpleNamespace(url=f"memory:/{root}", root=root, fs=fs, maps=maps)
    fs.rm(root, recursive=True)


@pytest.fixture
def requests(memory, monkeypatch):
    """(method, path) of what the store was asked for."""
    found = []
    for name in ("ls", "size", "info"):
        original = getattr(type(memory.fs), name)

        def counted(self, path, *rest, _name=name, _original=original, **more):
            found.append((_name, path))
            return _original(self, path, *rest, **more)

        monkeypatch.setattr(type(memory.fs), name, counted)
    return found


def test_opening_asks_once_per_folder_and_not_once_per_file(memory, requests):
    with open_cache(memory.url) as cache:
        listed = {path for name, path in requests if name == "ls"}
        assert len(listed) == 4  # the cache, its group and its two experts, for 30 shards
        for expert in (0, 1):
            assert cache.read(WANTED, expert=expert).tobytes() == memory.maps[expert][WANTED].tobytes()
        assert not any(name == "size" for name, _ in requests)


def test_a_quick_check_lists_folders_and_asks_for_no_size(memory, requests):
    assert verify(memory.url, quick=True) == []
    assert len([path for name, path in requests if name == "ls"]) == 4
    assert not any(name == "size" for name, _ in requests)
    data = memory.fs.cat_file(f"{memory.root}/{SHARD}")
    memory.fs.pipe_file(f"{memory.root}/{SHARD}", data[:-1])
    memory.fs.rm(f"{memory.root}/{SHARD.replace('c.1.', 'c.2.')}")
    said = sorted(str(fault).split(": ")[-1] for fault in verify(memory.url, quick=True))
    assert said == [f"{len(data) - 1} bytes, cache.json says {len(data)}", "file is missing"]


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""], ids=["short", "long", "empty"]
)
def test_another_size_is_found_on_opening(memory, change):
    data = memory.fs.cat_file(f"{memory.root}/{SHARD}")
    memory.fs.pipe_file(f"{memory.root}/{SHARD}", change(data))
    refused(memory.url, "damaged", SHARD, [])


def test_a_missing_file_is_found_on_opening(memory):
    memory.fs.rm(f"{memory.root}/{SHARD}")
    refused(memory.url, "missing", SHARD, [])


def test_a_file_that_a_late_listing_lacks_is_asked_for(memory, monkeypatch):
    original = type(memory.fs).ls
    monkeypatch.setattr(type(memory.fs), "ls", lambda *a, **k: [e for e in original(*a, **k) if SHARD not in e["name"]])
    with open_cache(memory.url) as cache:
        assert cache.read(WANTED).tobytes() == memory.maps[0][WANTED].tobytes()


def test_swapped_bytes_are_damage(memory):
    data = bytearray(memory.fs.cat_file(f"{memory.root}/{SHARD}"))
    data[-10], data[-9] = data[-9] ^ 1, data[-10]
    memory.fs.pipe_file(f"{memory.root}/{SHARD}", bytes(data))
    refused(memory.url, "damaged", rows=[7])


# --- a web server: no sizes in listings


@pytest.fixture
def web(tmp_path):
    maps = make_cache(tmp_path / "c", **SETTINGS)
    with hostile_server(tree(tmp_path / "c")) as (url, handler):
        yield SimpleNamespace(url=f"{url}/as/is", handler=handler, files=handler.files, asked=handler.asked, maps=maps)


def test_a_web_server_is_read_by_ranges(web):
    with open_cache(web.url) as cache:
        assert sum(command == "HEAD" for command, _ in web.asked) <= 1
        assert not any("c." in name for _, name in web.asked)  # no shard is looked at yet
        for expert in (0, 1):
            assert cache.read(WANTED, expert=expert).tobytes() == web.maps[expert][WANTED].tobytes()
        assert cache.rows == SETTINGS["rows"]
    looked = {name for _, name in web.asked if "expert_0/c." in name}
    assert looked == {f"maps.zarr/expert_0/c.{s}.0.0.0" for s in (0, 1, 7, 14)}


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x"], ids=["short", "long"])
def test_another_size_is_found_when_the_shard_is_first_read(web, change):
    web.files[SHARD] = change(web.files[SHARD])
    with open_cache(web.url) as cache:
        cache.read([0])
        with raises("damaged", SHARD):
            cache.read([4])


def test_a_missing_shard_is_named(web):
    del web.files[SHARD]
    refused(web.url, "missing", SHARD)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(lambda name, data: (data[:-1], 206, len(data) - 1), "damaged", id="a byte too few"),
        pytest.param(lambda name, data: (data + b"x", 206, len(data) + 1), "damaged", id="a byte too many"),
        pytest.param(lambda name, data: (b"<html>hello", 200, 11), "damaged", id="a page in place of the range"),
        pytest.param(lambda name, data: (bytes(len(data)), 206, len(data)), "damaged", id="zeros"),
        pytest.param(lambda name, data: (data[::-1], 206, len(data)), "damaged", id="swapped"),
        pytest.param(lambda name, data: (data[: len(data) // 2], 206, len(data)), "unreachable", id="breaks off"),
        pytest.param(lambda name, data: (b"", 416, 0), "damaged", id="beyond the end"),
        pytest.param(lambda name, data: (b"", 403, 0), "unreachable", id="forbidden"),
        pytest.param(lambda name, data: (b"", 500, 0), "unreachable", id="broken"),
    ],
)
def test_whatever_the_server_sends_is_never_taken_for_maps(web, spoil, reason):
    with open_cache(web.url) as cache:
        web.handler.spoil = staticmethod(spoil)
        with pytest.raises(CacheError, match=r"127\.0\.0\.1") as error:
            cache.read(WANTED)
        web.handler.spoil = None
        assert error.value.reason == reason
        assert np.array_equal(cache.read(WANTED), web.maps[0][WANTED])  # once it answers again


def test_a_server_that_ignores_ranges_is_refused(web, monkeypatch):
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "0")  # a shard smaller than a block is asked for whole
    with open_cache(web.url) as cache:
        web.handler.spoil = staticmethod(lambda name, data: (web.files[name], 200, len(web.files[name])))
        with raises("damaged"):
            cache.read(WANTED)


# --- a store that falters, and one that lies once


class Falters:
    """Answers every shard's range `times` times by `spoil`, then rightly."""

    def __init__(self, times, spoil):
        self.times, self.spoil = times, spoil

    def __call__(self, name, data):
        if "expert_" in name and self.times:
            self.times -= 1
            return self.spoil(name, data)
        return data, 206, len(data)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda name, data: (b"", 503, 0), id="busy"),
        pytest.param(lambda name, data: (b"", 429, 0), id="too many"),
        pytest.param(lambda name, data: (data[: len(data) // 2], 206, len(data)), id="breaks off"),
    ],
)
def test_a_store_that_falters_is_asked_again(web, kept, spoil):
    with open_cache(web.url) as cache:
        web.handler.spoil = Falters(asking.TRIES - 1, spoil)
        assert cache.read(WANTED).tobytes() == web.maps[0][WANTED].tobytes()
        web.asked.clear()
        web.handler.spoil = Falters(100, spoil)
        with raises("unreachable", f"{asking.TRIES} times"):
            cache.read([20])
    assert len(web.asked) <= asking.TRIES + 1  # and the size of the shard


def test_what_cannot_pass_is_asked_once(web, kept):
    with open_cache(web.url) as cache:
        cache.read([20])
        web.asked.clear()
        web.handler.spoil = Falters(100, lambda name, data: (b"", 403, 0))
        with pytest.raises(CacheError, match="403"):
            cache.read([40])
    assert [command for command, _ in web.asked] == ["HEAD", "GET"]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda name, data: (bytes(len(data)), 206, len(data)), id="zeros"),
        pytest.param(lambda name, data: (data[::-1], 206, len(data)), id="swapped"),
        pytest.param(lambda name, data: (data[:-1], 206, len(data) - 1), id="a byte too few"),
    ],
)
def test_bytes_that_do_not_hold_are_fetched_once_more_and_never_kept(web, kept, spoil):
    with open_cache(web.url) as cache:
        web.handler.spoil = Falters(1, spoil)
        assert cache.read([4]).tobytes() == web.maps[0][[4]].tobytes()
        web.handler.spoil = Falters(1, spoil)
        assert cache.read([5]).tobytes() == web.maps[0][[5]].tobytes()
    web.handler.spoil = None
    with open_cache(web.url) as cache:
        assert cache.read(WANTED).tobytes() == web.maps[0][WANTED].tobytes()


def test_blocks_are_asked_for_once_also_by_the_next_process(web):
    with open_cache(web.url) as cache:
        cache.read(WANTED)
    web.asked.clear()
    with open_cache(web.url) as cache:
        assert cache.read(WANTED).tobytes() == web.maps[0][WANTED].tobytes()
    assert not any(command == "GET" and "/c." in name for command, name in web.asked)


def test_a_rotten_block_is_dropped_and_fetched_again(web):
    with open_cache(web.url) as cache:
        cache.read(WANTED)
    kept = sorted(p for p in Path(os.environ["H2T_BLOCK_CACHE"]).rglob("*") if p.name == "0")
    assert len(kept) == 4
    for path in kept:
        path.write_bytes(bytes(path.stat().st_size))
    with open_cache(web.url) as cache:
        assert cache.read(WANTED).tobytes() == web.maps[0][WANTED].tobytes()


def test_a_replaced_cache_gets_no_block_of_the_old_one(web, tmp_path):
    with open_cache(web.url) as cache:
        cache.read(range(60))
    maps = make_cache(tmp_path / "new", seed=1, **SETTINGS)
    web.files.clear()
    web.files.update(tree(tmp_path / "new"))
    with open_cache(web.url) as cache:
        assert cache.read(range(60)).tobytes() == maps[0].tobytes()


def test_exchanged_shards_are_damage(web):
    other = SHARD.replace("c.1.", "c.2.")
    web.files[SHARD], web.files[other] = web.files[other], web.files[SHARD]
    refused(web.url, "damaged", "another object is there")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_the_index_of_another_shard_is_damage(web, tmp_path, kept, codec):
    make_cache(tmp_path / "z", codec=codec, **{**SETTINGS, "shard_rows": 4})
    web.files.clear()
    web.files.update(tree(tmp_path / "z"))
    index = 16 * 4 + 4
    shard, stale = web.files[SHARD], bytearray(web.files[SHARD.replace("c.1.", "c.0.")][:index])
    stale[:8] = (int.from_bytes(stale[:8], "little") + 1).to_bytes(8, "little")
    stale[-4:] = crc32c(bytes(stale[:-4])).to_bytes(4, "little")  # its own checksum holds
    web.files[SHARD] = bytes(stale) + shard[index:]
    refused(web.url, "damaged", rows=[4])


def test_many_threads_ask_for_a_block_once(web):
    with open_cache(web.url) as cache, ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: cache.read([4, 5]).tobytes(), range(16)):
            assert found == web.maps[0][[4, 5]].tobytes()
    assert len([name for command, name in web.asked if command == "GET" and name == SHARD]) == 1


def test_neighbours_come_by_one_request():
    spans, inside = merged([(100, 110), (0, 10), (20, 40), (30, 35), (10**6, 10**6 + 5)])
    assert spans == [(0, 110), (10**6, 10**6 + 5)]
    assert inside == [(0, 100, 10), (0, 0, 10), (0, 20, 20), (0, 30, 5), (1, 0, 5)]
    far = MAX_SPAN_BYTES
    assert len(merged([(i * 1000, i * 1000 + 1000) for i in range(far // 500)])[0]) == 2 + far % 500 // 500


def test_a_token_in_the_query_is_sent_and_never_told(web):
    with open_cache(f"{web.url}?sig=s3cr3t%2B") as cache:
        assert cache.read(WANTED).tobytes() == web.maps[0][WANTED].tobytes()
        assert "s3cr3t" not in f"{cache.files} {cache.files!s}"
        web.handler.spoil = Falters(100, lambda name, data: (b"", 403, 0))
        with pytest.raises(CacheError) as error:
            cache.read([20], expert=1)
    assert web.handler.queries == {"sig=s3cr3t%2B"}
    assert "s3cr3t" not in str(error.value)
    for secret in ("http://user:s3cr3t@127.0.0.1:1/c", "http://s3cr3t@127.0.0.1:1/c", "nosuch://s3cr3t@h/c?k=s3cr3t"):
        with pytest.raises((CacheError, ValueError)) as wrong:
            open_cache(secret)
        assert "s3cr3t" not in str(wrong.value)


def test_a_pickled_cache_reads(web):
    with open_cache(web.url) as cache, pickle.loads(pickle.dumps(cache)) as again:
        assert again.read(WANTED).tobytes() == web.maps[0][WANTED].tobytes()


def test_no_server_is_one_line(web):
    with pytest.raises(CacheError) as error:
        open_cache("http://127.0.0.1:1/cache")
    assert error.value.reason in ("uncommitted", "unreachable")
    assert "\n" not in error.value.detail
