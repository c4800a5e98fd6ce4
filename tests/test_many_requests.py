"""A cache at a URL is read by several large requests at a time, so that a distant store is not waited for in turn."""

import numpy as np
import pytest
from builders import make_cache, make_rows

from benchmarks.delayed_s3 import endpoint
from h2t.cache.read.plan import Unit, in_turns
from h2t.cache.reader import REMOTE_THREADS, REMOTE_UNIT_BYTES, open_cache

MIB = 2**20
DELAY = 0.3  # seconds, longer than threads take to start


@pytest.fixture
def store(tmp_path, monkeypatch):
    """48 MiB of maps in six shards, and nothing of them kept here."""
    shape = {"maps": ((256, 32, 32),), "dtype": "float32", "chunk_rows": 1, "shard_rows": 8, "codec": "none"}
    (maps,) = make_cache(tmp_path / "bucket/maps", rows=make_rows(48), **shape)
    with endpoint(tmp_path, DELAY) as s3:
        for name, value in {**s3.environment, "H2T_BLOCK_CACHE_BYTES": "0"}.items():
            monkeypatch.setenv(name, value)
        yield s3, maps


def test_reading_has_many_requests_under_way(store):
    s3, maps = store
    with open_cache("s3://bucket/maps") as cache:
        cache.read([0])
        before, s3.most = s3.requests, 0
        assert np.array_equal(cache.read(range(48)), maps)
        assert 4 < s3.most <= REMOTE_THREADS
        assert s3.requests - before <= 2 * 48 * MIB / REMOTE_UNIT_BYTES + 6


def test_pieces_come_in_turns_of_their_shards():
    work = [Unit(shard, first, first + 1, []) for first, shard in enumerate([0, 0, 0, 1, 2, 2])]
    assert [unit.first for unit in in_turns(work)] == [0, 3, 4, 1, 5, 2]
