"""What the reader says when it refuses, word for word; what opening costs; which threads work; which bytes are read."""

import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from builders import flip, make_cache, make_rows, raises, reseal, tree

from h2t.cache.errors import CacheError
from h2t.cache.read.gather import Gather
from h2t.cache.reader import THREADS, open_cache
from h2t.cache.tools.audit import describe


def shard(root, number=1, expert=0):
    return root / f"maps.zarr/expert_{expert}/c.{number}.0.0.0"


# --- words

REFUSALS = {
    "fractions": ([1.5], {}, "rows: row numbers expected; got float64"),
    "a mask": ([True], {}, "rows: row numbers expected; got bool"),
    "no dimension": (3, {}, "rows: one dimension expected; got shape ()"),
    "no such expert": ([0], {"expert": 2}, "expert: must be 0 to 1; got 2"),
    "an expert below 0": ([0], {"expert": -1}, "expert: must be 0 to 1; got -1"),
    "two dimensions": ([[0, 1]], {}, "rows: one dimension expected; got shape (1, 2)"),
    "past the end": ([0, 11, 99], {}, "rows: must be 0 to 10; got 11"),
    "below 0": ([5, -2], {}, "rows: must be 0 to 10; got -2"),
}


@pytest.mark.parametrize("rows, how, says", REFUSALS.values(), ids=REFUSALS)  # noqa: PT006
def test_rows_that_are_refused(cache_dir, rows, how, says):
    make_cache(cache_dir, maps=((3, 2, 2), (5, 1, 1)))
    with open_cache(cache_dir) as cache, pytest.raises(CacheError) as error:
        cache.read(rows, **how)
    assert (error.value.reason, error.value.detail) == ("out-of-range", says)


def test_every_row_and_the_last_expert_are_there(cache_dir):
    maps = make_cache(cache_dir, maps=((3, 2, 2), (5, 1, 1)))
    with open_cache(cache_dir) as cache:
        assert cache.read([0, 10], expert=1).tobytes() == maps[1][[0, 10]].tobytes()
        assert cache.read(np.array([0, 10], np.uint8)).tobytes() == maps[0][[0, 10]].tobytes()


BUFFERS = {
    "rows": (np.zeros((2, 3, 2, 2), "<f2"), "float16 (2, 3, 2, 2)"),
    "dtype": (np.zeros((3, 3, 2, 2), "<f4"), "float32 (3, 3, 2, 2)"),
    "strided": (np.zeros((6, 3, 2, 2), "<f2")[::2], "float16 (3, 3, 2, 2)"),
    "column order": (np.zeros((3, 3, 2, 2), "<f2", order="F"), "float16 (3, 3, 2, 2)"),
}


@pytest.mark.parametrize("out, got", BUFFERS.values(), ids=BUFFERS)  # noqa: PT006
def test_a_buffer_that_is_refused(cache_dir, out, got):
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache, pytest.raises(CacheError) as error:
        cache.read([3, 1, 3], out=out)
    says = f"out: contiguous float16 (3, 3, 2, 2) expected; got {got}"
    assert (error.value.reason, error.value.detail) == ("mismatch", says)


def _no_record(root):
    (root / "cache.json").unlink()


def _longer(root):
    shard(root).write_bytes(shard(root).read_bytes() + b"x")


DAMAGE = {
    "no record": (
        _no_record, {}, [], "uncommitted",
        "{root}: no cache.json, so this is not a finished cache; run h2t extract to make one",
    ),
    "another size": (
        _longer, {}, [], "damaged",
        "{root}/maps.zarr/expert_0/c.1.0.0.0: 181 bytes, cache.json says 180; run h2t cache verify",
    ),
    "an index": (
        lambda root: flip(shard(root), 0), {}, [5], "damaged",
        "{root}/maps.zarr/expert_0/c.1.0.0.0: shard index: crc32c mismatch (rows 4 to 7); run h2t cache verify",
    ),
    "the last index": (
        lambda root: flip(shard(root, 2), 0), {}, [0, 9], "damaged",
        "{root}/maps.zarr/expert_0/c.2.0.0.0: shard index: crc32c mismatch (rows 8 to 10); run h2t cache verify",
    ),
    "a row": (
        lambda root: flip(shard(root, 2, 1)), {}, [3, 9, 10, 10], "damaged",
        "{root}/maps.zarr/expert_1/c.2.0.0.0: chunk 2 (row 10): crc32c mismatch; run h2t cache verify",
    ),
    "a row, compressed": (
        lambda root: flip(shard(root, 2, 1)), {"codec": "zstd"}, [3, 9, 10, 10], "damaged",
        "{root}/maps.zarr/expert_1/c.2.0.0.0: chunk 2 (row 10): crc32c mismatch; run h2t cache verify",
    ),
    "a chunk of rows": (
        lambda root: flip(shard(root, 1, 1)), {"chunk_rows": 2}, [3, 4, 6, 9], "damaged",
        "{root}/maps.zarr/expert_1/c.1.0.0.0: chunk 1 (rows 6 to 7): crc32c mismatch; run h2t cache verify",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil, layout, rows, reason, says", DAMAGE.values(), ids=DAMAGE)  # noqa: PT006
def test_damage_by_name(cache_dir, way, spoil, layout, rows, reason, says):
    make_cache(cache_dir, maps=((3, 2, 2), (5, 1, 1)), **layout)
    spoil(cache_dir)
    with pytest.raises(CacheError) as error, open_cache(cache_dir) as cache:
        cache.read(rows, expert=int("expert_1" in says))
    assert (error.value.reason, error.value.detail) == (reason, says.format(root=cache_dir))


@pytest.mark.parametrize("name", ["rows.parquet", "batchnorm.safetensors"])
def test_a_file_that_is_not_the_recorded_one(cache_dir, name):
    make_cache(cache_dir)
    flip(cache_dir / name)
    with open_cache(cache_dir) as cache, pytest.raises(CacheError) as error:
        cache.rows if name == "rows.parquet" else cache.statistics  # noqa: B018
    says = f"{cache_dir}/{name}: sha256 differs from cache.json; run h2t cache verify"
    assert (error.value.reason, error.value.detail) == ("damaged", says)


@pytest.mark.parametrize("name", ["rows.parquet", "batchnorm.safetensors"])
def test_a_file_that_the_record_does_not_name(cache_dir, name):
    make_cache(cache_dir)
    reseal(cache_dir, lambda body: body["files"].pop(name))
    with open_cache(cache_dir) as cache, pytest.raises(CacheError, match=r"is not named in cache\.json"):
        cache.rows if name == "rows.parquet" else cache.statistics  # noqa: B018


def test_a_chunk_whose_checksum_holds_but_which_is_no_zstd(cache_dir):
    from crc32c import crc32c

    make_cache(cache_dir, codec="zstd")
    data = bytearray(shard(cache_dir).read_bytes())
    with open_cache(cache_dir) as cache:
        _, [at], [size] = cache.chunk_ranges(np.array([6]), 0)
    data[at] ^= 0xFF
    data[at + size - 4 : at + size] = crc32c(data[at : at + size - 4]).to_bytes(4, "little")
    shard(cache_dir).write_bytes(data)
    with open_cache(cache_dir) as cache, raises("damaged") as error:
        cache.read([1, 5, 6])
    assert error.value.detail.startswith(f"{shard(cache_dir)}: chunk 2 (row 6): cannot be decoded (")


def test_a_file_that_ends_before_a_chunk_does(cache_dir, way):
    """A file that was cut says so by its size; where it does not, the missing bytes do."""
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache:
        cache.chunk_ranges(np.array([6]), 0)
        cache._chunks.offsets[0, 6] = shard(cache_dir).stat().st_size - 9
        with pytest.raises(CacheError) as error:
            cache.read([0, 4, 6])
    says = f"{shard(cache_dir)}: truncated, it ends before byte 199 (read from byte "
    assert error.value.reason == "damaged"
    assert error.value.detail.startswith(says)


# --- what opening costs

_opened: list[str] | None = None


def _note(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        _opened.append(os.fspath(arguments[0]))


sys.addaudithook(_note)


@pytest.mark.parametrize("shards", [5, 50])
def test_opening_asks_for_each_size_once_and_reads_the_record_alone(cache_dir, monkeypatch, shards):
    """So it takes as long as so many `stat` calls: no index of a shard is read before a row of it is wanted."""
    global _opened
    make_cache(cache_dir, rows=make_rows(shards), shard_rows=1)
    asked: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *rest, **more: asked.append(str(path)) or stat(path, *rest, **more))
    _opened = []
    try:
        with open_cache(cache_dir) as cache:
            at_opening = [path for path in _opened if path.startswith(str(cache_dir))]
            counted = [path for path in asked if path.startswith(str(cache_dir))]
            describe(cache)
            afterwards = [path for path in _opened if path.startswith(str(cache_dir))]
    finally:
        _opened = None
    assert at_opening == [f"{cache_dir}/cache.json"]
    assert afterwards == [f"{cache_dir}/cache.json", f"{cache_dir}/rows.parquet"]
    twice = [f"{cache_dir}/{name}" for name in ("cache.json", "elsewhere.json")]  # whatever the number of shards
    assert sorted(path for path in counted if path not in twice) == sorted(
        str(cache_dir / name) for name in tree(cache_dir) if name != "cache.json"
    )
    assert max(map(counted.count, twice)) <= 2


# --- threads

LARGE = {"maps": ((16, 16, 16),), "shard_rows": 64}  # 8 KiB a row


def threads_of_reading() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("cache-read")]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("layout", [{}, {"codec": "zstd", "chunk_rows": 4}])
def test_the_threads_of_a_cache_are_few_and_end_with_it(cache_dir, monkeypatch, layout, elsewhere):
    """However many callers there are, and where the process is not the one that opened the cache."""
    (maps,) = make_cache(cache_dir, rows=make_rows(600), **LARGE, **layout)
    wanted = np.random.default_rng(0).permutation(600)
    counts = []

    def same(_: int) -> bool:
        found = cache.read(wanted)
        counts.append(len(threads_of_reading()))
        return found.tobytes() == maps[wanted].tobytes()

    with open_cache(cache_dir) as cache, ThreadPoolExecutor(8) as callers:
        if elsewhere:
            monkeypatch.setattr(os, "getpid", lambda: -1)
        assert all(callers.map(same, range(24)))
        assert 1 <= max(counts) <= THREADS
    assert threads_of_reading() == []


@pytest.fixture
def readers(monkeypatch):
    """Names of the threads that read; with `meet`, each waits at its first read until another has come, too."""
    names: list[str] = []
    found = type("Readers", (), {"names": names, "meet": None})()

    def note() -> None:
        name = threading.current_thread().name
        first = name not in names
        names.append(name)
        if first and found.meet is not None:
            found.meet.wait(20)

    def noted(function):
        def call(*given):
            note()
            return function(*given)

        return call

    monkeypatch.setattr(os, "pread", noted(os.pread))
    monkeypatch.setattr(Gather, "__call__", noted(Gather.__call__))
    return found


@pytest.mark.skipif(THREADS < 2, reason="one core")
@pytest.mark.parametrize("layout", [{}, {"codec": "zstd", "chunk_rows": 16}])
def test_a_large_gather_is_read_side_by_side(cache_dir, way, readers, layout):
    (maps,) = make_cache(cache_dir, rows=make_rows(512), **LARGE, **layout)
    wanted = np.arange(512)
    with open_cache(cache_dir) as cache:
        cache.chunk_ranges(np.arange(512 // cache.spec.chunk_rows), 0)  # the indices are read by the caller
        readers.names.clear()
        readers.meet = threading.Barrier(2)
        found = cache.read(wanted)
        assert found.tobytes() == maps.tobytes()
    assert len(set(readers.names)) >= 2


@pytest.mark.parametrize("layout", [{}, {"codec": "zstd"}, {"chunk_rows": 2}])
def test_a_small_gather_is_read_by_its_caller_alone(cache_dir, way, readers, layout):
    make_cache(cache_dir, rows=make_rows(60), **layout)
    with open_cache(cache_dir) as cache:
        cache.read(np.arange(60))
    assert set(readers.names) == {threading.current_thread().name}


# --- bytes


@pytest.mark.parametrize("layout", [{}, {"codec": "zstd"}, {"chunk_rows": 2}])
def test_what_lies_between_is_bridged_on_the_way_to_a_copy(cache_dir, monkeypatch, layout):
    monkeypatch.setattr("h2t.cache.reader.compiled", lambda: None)
    make_cache(cache_dir, rows=make_rows(12), **{"shard_rows": 12, **layout})
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda f, size, at: sizes.append(size) or pread(f, size, at))
    with open_cache(cache_dir) as cache:
        cache.read([0])
        sizes.clear()
        cache.read([0, 4])
        _, offsets, stored = cache.chunk_ranges(np.array([0, 4]) // cache.spec.chunk_rows, 0)
    assert sizes == [offsets[1] + stored[1] - offsets[0]]


def test_a_pickled_cache_keeps_what_it_has_yet_to_check(cache_dir):
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache:
        cache._chunks.unchecked = {"maps.zarr/expert_0/c.1.0.0.0"}
        with pickle.loads(pickle.dumps(cache)) as again:
            assert again._chunks.unchecked == cache._chunks.unchecked
            shard(cache_dir).write_bytes(shard(cache_dir).read_bytes() + b"x")
            with pytest.raises(CacheError, match="was replaced"):
                again.read([4])
            assert again.read([0]).shape == (1, 3, 2, 2)


def test_a_size_is_checked_once(cache_dir):
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache:
        cache._chunks.unchecked = {f"maps.zarr/expert_0/c.{i}.0.0.0" for i in (1, 2)}
        cache.read([0, 4])
        assert cache._chunks.unchecked == {"maps.zarr/expert_0/c.2.0.0.0"}
