import gc
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from builders import raises

from h2t.cache.errors import CacheError
from h2t.cache.read.files import MAX_OPEN, LocalFiles, files_at
from h2t.cache.read.remote import RemoteFiles

DATA = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(params=["local", "file", "memory"])
def files(request, tmp_path):
    """Files at a path, a file URL and a remote URL: `data` (5000 bytes), `sub/more` and `empty`."""
    if request.param == "memory":
        fs = fsspec.filesystem("memory")
        url = f"memory://{tmp_path}"
        for name, data in (("data", DATA), ("sub/more", b"more"), ("empty", b"")):
            fs.pipe_file(f"{tmp_path}/{name}", data)
    else:
        (tmp_path / "sub").mkdir()
        for name, data in (("data", DATA), ("sub/more", b"more"), ("empty", b"")):
            (tmp_path / name).write_bytes(data)
        url = f"file://{tmp_path}" if request.param == "file" else tmp_path
    found = files_at(url)
    yield found
    found.close()
    if request.param == "memory":
        fs.rm(str(tmp_path), recursive=True)


def test_kind_of_location(tmp_path):
    assert isinstance(files_at(tmp_path), LocalFiles)
    assert isinstance(files_at(f"file://{tmp_path}"), LocalFiles)
    assert isinstance(files_at("memory://x"), RemoteFiles)


def test_whole_files(files):
    assert files.read_all("data", len(DATA)) == DATA
    assert files.read_all("sub/more", 4) == b"more"
    assert files.read_all("empty", 0) == b""
    assert [files.size(name) for name in ("data", "sub/more", "empty")] == [5000, 4, 0]
    assert files.exists("data")
    assert not files.exists("nothing")


def test_ranges_in_the_order_asked_for(files):
    ranges = [(10, 20), (0, 1), (4999, 5000), (10, 20), (7, 7)]
    assert [bytes(b) for b in files.read_ranges("data", ranges)] == [DATA[a:b] for a, b in ranges]


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda f: f.size("nothing"), id="size"),
        pytest.param(lambda f: f.read_all("nothing", 1), id="read_all"),
        pytest.param(lambda f: f.read_ranges("nothing", [(0, 1)]), id="read_ranges"),
        pytest.param(lambda f: f.read_ranges("data/below/a/file", [(0, 1)]), id="below a file"),
    ],
)
def test_missing_files_are_named(files, ask):
    with raises("missing", r"nothing|below"):
        ask(files)


@pytest.mark.parametrize("wanted", [(4999, 5001), (6000, 6001)])
def test_reading_past_the_end_is_damage_and_never_zeros(files, wanted):
    with raises("damaged", "data"):
        files.read_ranges("data", [wanted])


def test_open_files_are_bounded_and_closed(tmp_path):
    for i in range(MAX_OPEN + 50):
        (tmp_path / str(i)).write_bytes(bytes([i % 256]))
    gc.collect()  # files of earlier tests
    before = open_files()
    files = LocalFiles(tmp_path)
    for _ in range(2):
        for i in range(MAX_OPEN + 50):
            assert files.read_ranges(str(i), [(0, 1)]) == [bytes([i % 256])]
    assert open_files() <= before + MAX_OPEN
    files.close()
    assert open_files() == before


def test_threads_share_the_descriptors(tmp_path):
    for i in range(MAX_OPEN + 20):
        (tmp_path / str(i)).write_bytes(DATA[i : i + 100])
    files = LocalFiles(tmp_path)

    def read(k: int) -> bool:
        i = k * 7919 % (MAX_OPEN + 20)
        return files.read_ranges(str(i), [(3, 9)]) == [DATA[i + 3 : i + 9]]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(4000)))
    files.close()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("read", ["read_all", "handles"])
def test_a_file_that_vanishes_as_it_is_opened_is_missing(tmp_path, read):
    """Another process removes it between any two system calls of ours, or writes it while it is open."""
    path = tmp_path / "shard"
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            path.write_bytes(b"x")
            path.unlink()

    other = threading.Thread(target=come_and_go)
    other.start()
    found, tries = set(), 0
    try:
        while tries < 3000 or (len(found) < 2 and tries < 300_000):
            tries += 1
            files = LocalFiles(tmp_path)
            try:
                if read == "read_all":
                    files.read_all("shard", 10**6)
                else:
                    with files.handles(["shard"]):
                        pass
                found.add("there")
            except CacheError as error:
                found.add(error.reason)
            files.close()
    finally:
        stop.set()
        other.join()
    assert {"there", "missing"} <= found <= {"there", "missing", "replaced"}
