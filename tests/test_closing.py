"""Closing a cache: reads that are under way end well, later calls say `closed`, no descriptor is left or mixed up."""

import gc
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from builders import make_cache, make_rows, raises

from h2t.cache.errors import CacheError
from h2t.cache.read.files import LocalFiles
from h2t.cache.read.in_use import InUse
from h2t.cache.reader import open_cache


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module", autouse=True)
def no_files_of_earlier_tests():
    gc.collect()  # these tests close all of theirs


CALLS = {
    "read": lambda c: c.read([0]),
    "read of no rows": lambda c: c.read([]),
    "rows": lambda c: c.rows,
    "statistics": lambda c: c.statistics,
    "chunk_ranges": lambda c: c.chunk_ranges(np.array([0]), 0),
    "with": lambda c: c.__enter__(),
    "pickle": pickle.dumps,
    "files.exists": lambda c: c.files.exists("cache.json"),
    "files.size": lambda c: c.files.size("cache.json"),
    "files.read_all": lambda c: c.files.read_all("cache.json", 10**6),
    "files.read_ranges": lambda c: c.files.read_ranges("cache.json", [(0, 1)]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("used", [False, True])
def test_a_closed_cache_says_so(cache_dir, call, used):
    make_cache(cache_dir)
    before = open_files()
    cache = open_cache(cache_dir)
    if used:
        assert cache.read([0, 1]).shape == (2, 3, 2, 2)
        assert len(cache.rows) == 11
        assert cache.statistics
    cache.close()
    with raises("closed", "was closed; open it again") as error:
        call(cache)
    assert str(cache_dir) in error.value.detail
    cache.close()
    assert open_files() == before


def test_what_needs_no_file_is_still_told(cache_dir):
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache:
        pass
    assert (cache.spec.rows, cache.experts) == (11, 1)


def test_threads_that_read_while_the_cache_is_closed(cache_dir, layout):
    """Only right values or `closed`; and no descriptor is left, or used once it belongs to another file."""
    (maps,) = make_cache(cache_dir, rows=make_rows(60), shard_rows=4, **layout)
    rng = np.random.default_rng(0)
    wrong: list[object] = []
    served = 0
    before = open_files()

    together = threading.Barrier(8)  # otherwise the threads that read already keep the others from starting

    def use(cache, rows, started) -> None:
        nonlocal served
        together.wait()
        try:
            while True:
                if cache.read(rows).tobytes() != maps[rows].tobytes():
                    wrong.append(rows)
                served += 1
                started.set()
        except CacheError as error:
            if error.reason != "closed":
                wrong.append(error)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is told
            wrong.append(error)
        started.set()

    for _ in range(30):
        cache = open_cache(cache_dir)
        started = threading.Event()
        readers = [threading.Thread(target=use, args=(cache, rng.integers(0, 60, 20), started)) for _ in range(8)]
        for reader in readers:
            reader.start()
        started.wait()
        cache.close()
        for reader in readers:
            reader.join()
        assert open_files() == before
    assert wrong == []
    assert served >= 30


def closed(files, name) -> bool:
    try:
        with files.handles([name]):
            return False
    except CacheError as error:
        return error.reason == "closed"


def test_close_waits_for_the_descriptors_in_use(cache_dir):
    make_cache(cache_dir)
    name = "maps.zarr/expert_0/c.1.0.0.0"
    files = LocalFiles(cache_dir)
    inside, leave, order = threading.Event(), threading.Event(), []

    def use() -> None:
        with files.handles([name]) as ((handle, *_),):
            inside.set()
            leave.wait(20)
            order.append(os.pread(handle, 4, 0))

    reader = threading.Thread(target=use)
    reader.start()
    inside.wait(20)
    closer = threading.Thread(target=lambda: (files.close(), order.append("closed")))
    closer.start()
    until = time.monotonic() + 20
    while not closed(files, name) and time.monotonic() < until:
        pass
    assert closed(files, name)
    assert closer.is_alive()
    leave.set()
    closer.join(20)
    reader.join(20)
    assert order == [(cache_dir / name).read_bytes()[:4], "closed"]


def test_whoever_is_inside_may_enter_again_while_others_close():
    use = InUse("here")
    with use:
        closer = threading.Thread(target=use.close)
        closer.start()
        with ThreadPoolExecutor(1) as stranger:
            while stranger.submit(_refusal, use).result() is None:
                pass
        with use:
            assert closer.is_alive()
    closer.join(20)
    assert not closer.is_alive()
    assert _refusal(use) == "closed"


def _refusal(use: InUse) -> str | None:
    try:
        with use:
            return None
    except CacheError as error:
        return error.reason


def test_an_interrupt_that_kept_a_thread_from_leaving_does_not_keep_it_from_closing():
    use = InUse("here")
    use.__enter__()
    use.close()
    assert use._closed


def test_a_forked_child_closes_while_the_parents_threads_read(cache_dir):
    make_cache(cache_dir, rows=make_rows(200))
    stop = threading.Event()
    with open_cache(cache_dir) as cache:

        def read() -> None:
            while not stop.is_set():
                cache.read(np.arange(200))

        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        try:
            for use_first in (False, True) * 5:
                child = os.fork()
                if child == 0:
                    try:
                        if use_first:
                            cache.read([0, 150])
                        cache.close()
                        os._exit(0 if _refusal(cache._use) == "closed" else 1)
                    finally:
                        os._exit(2)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            for reader in readers:
                reader.join()
