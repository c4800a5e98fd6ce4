"""Caches behind a URL: few requests to open, ranges only, and every way a store can go wrong is a CacheError."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from builders import make_cache, make_rows, tree

from cache import remote
from cache.errors import CacheError
from cache.reader import open_cache

SHARD = "maps.zarr/expert_0/c.1.0.0.0"
SETTINGS = {"rows": make_rows(60), "shard_rows": 4, "maps": ((3, 2, 2), (2, 1, 1))}
WANTED = [59, 4, 4, 0, 31]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0)


def refusal(url, rows=WANTED) -> CacheError:
    with pytest.raises(CacheError) as error, open_cache(url) as cache:
        cache.read(rows)
    return error.value


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


def test_opening_asks_once_per_folder_and_not_once_per_file(memory, monkeypatch):
    asked = []
    for name in ("ls", "size", "info"):
        original = getattr(type(memory.fs), name)

        def counted(self, path, *rest, _name=name, _original=original, **more):
            asked.append((_name, path))
            return _original(self, path, *rest, **more)

        monkeypatch.setattr(type(memory.fs), name, counted)
    with open_cache(memory.url) as cache:
        assert [path for name, path in asked if name == "size"] == []
        listed = {path for name, path in asked if name == "ls"}
        assert len(listed) == 4  # the cache, its group and its two experts, for 30 shards
        for expert in (0, 1):
            assert cache.read(WANTED, expert=expert).tobytes() == memory.maps[expert][WANTED].tobytes()
        assert not any(name == "size" for name, _ in asked)


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""], ids=["short", "long", "empty"]
)
def test_another_size_is_found_on_opening(memory, change):
    data = memory.fs.cat_file(f"{memory.root}/{SHARD}")
    memory.fs.pipe_file(f"{memory.root}/{SHARD}", change(data))
    error = refusal(memory.url, [])
    assert error.reason == "damaged"
    assert SHARD in error.detail


def test_a_missing_file_is_found_on_opening(memory):
    memory.fs.rm(f"{memory.root}/{SHARD}")
    error = refusal(memory.url, [])
    assert error.reason == "missing"
    assert SHARD in error.detail


def test_a_file_that_a_late_listing_lacks_is_asked_for(memory, monkeypatch):
    original = type(memory.fs).ls
    monkeypatch.setattr(type(memory.fs), "ls", lambda *a, **k: [e for e in original(*a, **k) if SHARD not in e["name"]])
    with open_cache(memory.url) as cache:
        assert cache.read(WANTED).tobytes() == memory.maps[0][WANTED].tobytes()


def test_swapped_bytes_are_damage(memory):
    data = bytearray(memory.fs.cat_file(f"{memory.root}/{SHARD}"))
    data[-10], data[-9] = data[-9] ^ 1, data[-10]
    memory.fs.pipe_file(f"{memory.root}/{SHARD}", bytes(data))
    assert refusal(memory.url, [7]).reason == "damaged"


# --- a web server: no sizes in listings


class Handler(BaseHTTPRequestHandler):
    """Serves `files` with ranges; `spoil`, if set, maps (name, body) to (status, headers, body) or None."""

    files: dict[str, bytes] = {}
    asked: list[tuple[str, str]] = []
    spoil = None

    def answer(self, *, body_too: bool) -> None:
        name = self.path.lstrip("/")
        type(self).asked.append((self.command, name))
        if name not in self.files:
            self.send_error(404)
            return
        data, status, headers = self.files[name], 200, {}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            if start >= len(data):
                self.send_error(416)
                return
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        length = len(data)
        if type(self).spoil is not None and wanted:
            data, status, length = type(self).spoil(name, data)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if body_too:
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer(body_too=True)

    def do_HEAD(self) -> None:
        self.answer(body_too=False)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def web(tmp_path):
    pytest.importorskip("aiohttp")
    maps = make_cache(tmp_path / "c", **SETTINGS)
    handler = type("Here", (Handler,), {"files": tree(tmp_path / "c"), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield SimpleNamespace(url=url, handler=handler, files=handler.files, asked=handler.asked, maps=maps)
    server.shutdown()
    server.server_close()
    thread.join()


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
        with pytest.raises(CacheError, match=SHARD) as error:
            cache.read([4])
    assert error.value.reason == "damaged"


def test_a_missing_shard_is_named(web):
    del web.files[SHARD]
    error = refusal(web.url)
    assert error.reason == "missing"
    assert SHARD in error.detail


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
        with pytest.raises(CacheError) as error:
            cache.read(WANTED)
    assert error.value.reason == "damaged"


def test_no_server_is_one_line(web):
    with pytest.raises(CacheError) as error:
        open_cache("http://127.0.0.1:1/cache")
    assert error.value.reason in ("uncommitted", "unreachable")
    assert "\n" not in error.value.detail
