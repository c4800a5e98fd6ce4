"""The compiled gather alone: against a reader of one row at a time, and what it says of files that are not right."""

import errno
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from builders import flip
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import h2t
from h2t.cache.format.shard import CRC_BYTES, sealed
from h2t.cache.read.gather import CHANGED, DONE, ENDS_EARLY, MISMATCH, REFUSED, compiled

pytestmark = pytest.mark.skipif(compiled() is None, reason="the compiled gather was not built")


class Store:
    """Files of rows, each row followed by its checksum."""

    def __init__(self, folder: Path, rows: int, row_bytes: int, files: int = 1) -> None:
        rng = np.random.default_rng(row_bytes)
        self.row_bytes, self.stored = row_bytes, row_bytes + 4
        self.rows = rng.integers(0, 256, (files, rows, row_bytes), np.uint8)
        self.paths = [folder / f"{row_bytes}.{i}" for i in range(files)]
        for path, part in zip(self.paths, self.rows, strict=True):
            path.write_bytes(b"".join(row.tobytes() + crc32c(row).to_bytes(4, "little") for row in part))

    def gather(
        self, file: np.ndarray, row: np.ndarray, slot: np.ndarray | None = None, slots: int | None = None, changes=()
    ):
        """(outcome, what lies in the slots); `changes` are made to the files once they are open"""
        slot = np.arange(len(row)) if slot is None else slot
        out = np.zeros((slots or len(row), self.row_bytes), np.uint8)
        with ExitStack() as stack:
            handles = [stack.enter_context(path.open("rb")).fileno() for path in self.paths]
            stats = [os.fstat(handle) for handle in handles]
            opened = np.array([(h, s.st_size, s.st_mtime_ns) for h, s in zip(handles, stats, strict=True)])
            for change in changes:
                change()
            files = np.array(handles, np.int32)[file]
            outcome = compiled()(files, row * self.stored, slot * self.row_bytes, out, self.row_bytes, opened)
        return outcome, out

    def change(self, at: int, bit: int = 1) -> None:
        flip(self.paths[0], at, bit)


def zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.int64)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    row_bytes=st.one_of(st.integers(1, 40), st.sampled_from([4095, 4096, 8192, 200_704, 600_000])),
    count=st.integers(1, 400),
    seed=st.integers(0, 2**32),
    ordered=st.booleans(),
)
def test_every_row_lands_in_its_slot(tmp_path, row_bytes, count, seed, ordered):
    count = min(count, 3_000_000 // row_bytes + 2)
    store = Store(tmp_path, 40 if row_bytes < 10_000 else 6, row_bytes, files=3)
    rng = np.random.default_rng(seed)
    file, row = rng.integers(0, 3, count), rng.integers(0, store.rows.shape[1], count)
    if ordered:  # neighbours, which are read together
        order = np.lexsort((row, file))
        file, row = file[order], row[order]
    slot = rng.permutation(count + 5)[:count]
    outcome, out = store.gather(file, row, slot, count + 5)
    assert outcome.result == DONE
    assert np.array_equal(out[slot], store.rows[file, row])
    untouched = np.setdiff1d(np.arange(count + 5), slot)
    assert not out[untouched].any()


@pytest.mark.parametrize("row_bytes", [1, 13, 64])
def test_every_bit_counts(tmp_path, row_bytes):
    store = Store(tmp_path, 5, row_bytes)
    for at in range(5 * store.stored):
        store.change(at, 1 << at % 8)
        outcome, _ = store.gather(zeros(5), np.arange(5))
        assert (outcome.result, outcome.row) == (MISMATCH, at // store.stored)
        store.change(at, 1 << at % 8)
    assert store.gather(zeros(5), np.arange(5))[0].result == DONE


def test_the_wrong_one_of_many_is_named(tmp_path):
    store = Store(tmp_path, 1000, 100)
    store.change(777 * store.stored + 5)
    order = np.random.default_rng(0).permutation(1000)
    outcome, _ = store.gather(zeros(1000), order)
    assert (outcome.result, order[outcome.row]) == (MISMATCH, 777)


@pytest.mark.parametrize("left", [0, 3, 64, 67, 68, 100, 300, 5 * 68 - 1])
def test_a_file_that_ends_early(tmp_path, left):
    store = Store(tmp_path, 5, 64)
    os.truncate(store.paths[0], left)
    outcome, _ = store.gather(zeros(5), np.arange(5))
    assert (outcome.result, outcome.row) == (ENDS_EARLY, left // store.stored)


def test_a_file_that_cannot_be_read(tmp_path):
    store = Store(tmp_path, 2, 64)
    with store.paths[0].open("ab") as file:
        outcome = compiled()(
            np.full(1, file.fileno(), np.int32),
            zeros(1),
            zeros(1),
            np.zeros(64, np.uint8),
            store.row_bytes,
            np.zeros((0, 3), np.int64),
        )
    assert (outcome.result, outcome.row, outcome.errno) == (REFUSED, 0, errno.EBADF)


@pytest.mark.parametrize("change", ["content", "length", "time"])
def test_a_file_that_was_written_to_after_it_was_opened(tmp_path, change):
    """Whatever its rows say: all of them may hold."""
    store = Store(tmp_path, 5, 64, files=3)
    path = store.paths[1]
    changes = {
        "content": lambda: path.write_bytes(store.paths[2].read_bytes()),
        "length": lambda: os.truncate(path, 3),
        "time": lambda: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    }
    outcome, _ = store.gather(np.arange(3).repeat(5), np.tile(np.arange(5), 3), changes=[changes[change]])
    assert (outcome.result, outcome.row) == (CHANGED, 1)


def test_neighbours_are_read_together(tmp_path):
    store = Store(tmp_path, 640, 512)

    def reads() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("syscr"))

    def cost(rows: np.ndarray) -> int:
        """The least of five times: other threads of this process may read meanwhile."""
        found = []
        for _ in range(5):
            before = reads()
            assert store.gather(zeros(len(rows)), rows)[0].result == DONE
            found.append(reads() - before)
        return min(found)

    if not Path("/proc/self/io").exists():
        pytest.skip("this kernel does not count system calls")
    base = cost(np.arange(1))
    assert cost(np.arange(640)) == base + 640 // 128 - 1
    assert cost(np.arange(0, 640, 2)) == base + 320 - 1


def test_without_the_library_there_is_none(tmp_path):
    """A copy of the package without what the compiler made, or with something that is no library."""
    ignore = shutil.ignore_patterns("_gather*", "__pycache__", "pipeline", "presets")
    copied = shutil.copytree(Path(h2t.__file__).parent, tmp_path / "h2t", ignore=ignore)
    package = copied / "cache" / "read"
    ask = [sys.executable, "-c", "import h2t.cache.read.gather as g; print(g.__file__, g.compiled())"]

    def answer() -> str:
        run = subprocess.run(ask, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
        return run.stdout.decode()

    assert answer() == f"{package / 'gather.py'} None\n"
    (package / "_gather.so").write_bytes(b"not a library")
    assert answer() == f"{package / 'gather.py'} None\n"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 50])
@pytest.mark.parametrize("row_bytes", [1, 7, 64, 1001])
def test_rows_in_memory_are_copied_and_checked(count, row_bytes):
    draws = np.random.default_rng(count + row_bytes)
    rows = draws.integers(0, 256, (count, row_bytes), np.uint8)
    stored = np.frombuffer(b"".join(map(sealed, map(bytes, rows))), np.uint8).copy()
    starts, places = np.arange(count) * (row_bytes + CRC_BYTES), draws.permutation(count)
    out = np.zeros((count, row_bytes), np.uint8)
    assert compiled().unpack(stored, starts, places * row_bytes, out, row_bytes) is None
    assert np.array_equal(out[places], rows)
    for wrong in range(count):
        for byte in (0, row_bytes - 1, row_bytes, row_bytes + CRC_BYTES - 1):
            stored[starts[wrong] + byte] ^= 1
            assert compiled().unpack(stored, starts, places * row_bytes, out, row_bytes) == wrong
            stored[starts[wrong] + byte] ^= 1


@pytest.mark.parametrize("start", [-1, 1])
def test_rows_outside_the_memory_are_never_read(start):
    with pytest.raises(ValueError, match="outside the bytes"):
        compiled().unpack(np.zeros(12, np.uint8), np.array([start]), np.zeros(1, np.int64), np.zeros(8, np.uint8), 8)
