"""The block cache: what it keeps, what it gives up, and that a wrong block costs one more request and nothing else."""

import os

import pytest

from h2t.cache.read import blocks
from h2t.cache.read.blocks import BLOCK_BYTES, BlockCache, from_environment

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def block(letter: str) -> bytes:
    return letter.encode() * BLOCK_BYTES


@pytest.fixture
def place(tmp_path):
    return tmp_path / "blocks"


def stored(place) -> set[str]:
    return {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}


def test_ranges_come_back_across_blocks(place):
    kept = BlockCache(place, 10 * BLOCK_BYTES)
    kept.claim([A])
    kept.put(A, 0, block("x"))
    kept.put(A, 1, b"yz")
    assert kept.read(A, 5, 9) == b"xxxx"
    assert kept.read(A, BLOCK_BYTES - 2, BLOCK_BYTES + 2) == b"xxyz"
    assert kept.read(A, BLOCK_BYTES, BLOCK_BYTES + 3) is None  # more than the block has
    assert kept.read(A, 0, 3 * BLOCK_BYTES) is None
    assert kept.read(B, 0, 1) is None
    assert kept.holds(A, 1)
    assert not kept.holds(A, 2)
    assert BlockCache(place, 10).read(A, 5, 9) == b"xxxx"  # another process finds them


def test_the_budget_holds_and_what_is_in_stays_in(place):
    kept = BlockCache(place, 2 * BLOCK_BYTES)
    kept.claim([A])
    for number in range(5):
        kept.put(A, number, block("x"))
    assert stored(place) == {f"{A}/0", f"{A}/1"}
    assert not kept.room(1)


def test_files_used_longest_ago_make_room_but_not_ones_in_use(place):
    old = BlockCache(place, 3 * BLOCK_BYTES)
    for at, digest in ((100, B), (200, A), (300, C)):
        old.put(digest, 0, block("x"))
        os.utime(place / digest, (at, at))
    new = BlockCache(place, 3 * BLOCK_BYTES)
    new.claim([A, "d" * 64])
    os.utime(place / A, (0, 0))
    new.put("d" * 64, 0, block("d"))
    assert stored(place) == {f"{A}/0", f"{C}/0", f"{'d' * 64}/0"}
    new.put("d" * 64, 1, block("d"))
    new.put("d" * 64, 2, block("d"))  # no room any more
    assert stored(place) == {f"{A}/0", f"{'d' * 64}/0", f"{'d' * 64}/1"}


def test_what_another_process_stored_counts(place):
    one, other = BlockCache(place, 2 * BLOCK_BYTES), BlockCache(place, 2 * BLOCK_BYTES)
    other.claim([A, B])
    one.put(A, 0, block("x"))
    one.put(A, 1, block("x"))
    other.forget(C)  # looks
    assert not other.room(BLOCK_BYTES)
    one.forget(A)
    assert other.room(BLOCK_BYTES)


def test_a_disk_that_refuses_costs_no_more_than_speed(place):
    place.write_text("a file where the directory should be")
    kept = BlockCache(place, 10 * BLOCK_BYTES)
    kept.claim([A])
    kept.put(A, 0, block("x"))
    assert kept.read(A, 0, 1) is None


def test_the_disk_keeps_some_air(place, monkeypatch):
    monkeypatch.setattr(blocks, "LEAST_FREE", 10**18)
    kept = BlockCache(place, 10 * BLOCK_BYTES)
    kept.claim([A])
    kept.put(A, 0, block("x"))
    assert stored(place) == set()


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("H2T_BLOCK_CACHE", str(tmp_path))
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "1000")
    found = from_environment()
    assert found is not None
    assert (found.folder, found.budget) == (tmp_path, 1000)
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "0")
    assert from_environment() is None
    monkeypatch.delenv("H2T_BLOCK_CACHE")
    monkeypatch.delenv("H2T_BLOCK_CACHE_BYTES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert from_environment().folder == tmp_path / "x/h2t/blocks"
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "8 GB")
    with pytest.raises(ValueError, match="a number of bytes expected; got '8 GB'"):
        from_environment()


def test_a_user_without_a_home_folder_keeps_no_blocks(monkeypatch, tmp_path):
    """As in a container that runs under a number of a user that it does not know."""
    for name in ("HOME", "XDG_CACHE_HOME", "H2T_BLOCK_CACHE", "H2T_BLOCK_CACHE_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    assert from_environment() is None
    monkeypatch.setenv("H2T_BLOCK_CACHE", str(tmp_path))
    assert from_environment().folder == tmp_path
