"""Ranges from S3 come over plain connections; whatever is wrong with such an answer, the rows are right or refused."""

import asyncio
import os
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from builders import make_cache, make_rows, raises

from benchmarks.delayed_s3 import Endpoint, endpoint
from h2t.cache.errors import CacheError
from h2t.cache.read import transfer
from h2t.cache.read.direct import GIVE_UP
from h2t.cache.read.files import files_at
from h2t.cache.read.plan import Unit, in_turns
from h2t.cache.reader import REMOTE_THREADS, REMOTE_UNIT_BYTES, open_cache

PAUSE = 0.3  # seconds after which a store has hung up

pytestmark = pytest.mark.usefixtures("no_waiting")


class Spoiling(Endpoint):
    """Answers requests with a signed URL as `spoil` does, and counts them in `signed`."""

    signed, spoil, algorithms = 0, "nothing", set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        sound = await super().answer(request)
        if "X-Amz-Signature" not in request.query:
            return sound
        self.signed += 1
        self.algorithms.add(request.query["X-Amz-Algorithm"])
        return await getattr(self, self.spoil.replace(" ", "_"))(request, sound)

    async def nothing(self, request, sound):
        return sound

    async def end_the_connection(self, request, sound):
        sound.force_close()
        return sound

    async def hang_up_later(self, request, sound):
        asyncio.get_running_loop().call_later(PAUSE / 2, request.transport.close)
        return sound

    async def refuse(self, request, sound):
        return web.Response(status=403)

    async def send_elsewhere(self, request, sound):
        return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})

    async def ignore_the_range(self, request, sound):
        return web.Response(body=(self.root / request.match_info["path"]).read_bytes(), headers=sound.headers)

    async def send_other_bytes(self, request, sound):
        first, _, rest = sound.headers["Content-Range"].removeprefix("bytes ").partition("-")
        sound.headers["Content-Range"] = f"bytes {int(first) + 1}-{rest}"
        return sound

    async def send_less(self, request, sound):
        sound.body = sound.body[:-1]
        return sound

    async def encode(self, request, sound):
        sound.headers["Content-Encoding"] = "gzip"
        return sound

    async def break_off(self, request, sound):
        answer = web.StreamResponse(status=206, headers=sound.headers)
        answer.content_length = len(sound.body)
        await answer.prepare(request)
        await answer.write(sound.body[: len(sound.body) // 2])
        request.transport.close()
        return answer

    async def swap_bytes_of_shards(self, request, sound):
        if "/c." in request.path:
            sound.body = sound.body[:-8] + sound.body[-8:][::-1]
        return sound

    async def name_another_version(self, request, sound):
        sound.headers["ETag"] = '"another"'
        return sound

    async def change_version(self, request, sound):
        sound.headers["ETag"] = f'"{self.signed}"'
        return sound

    async def hardly_send(self, request, sound):
        answer = web.StreamResponse(status=206, headers=sound.headers)
        answer.content_length = len(sound.body)
        await answer.prepare(request)
        with suppress(ConnectionError):
            for byte in sound.body:
                await answer.write(bytes([byte]))
                await asyncio.sleep(0.1)
        return answer


@contextmanager
def served(root, patch, delay, rows, **shape):
    """(S3 endpoint, maps) of a cache that lies there, and nothing of it kept here."""
    (maps,) = make_cache(root / "bucket/maps", rows=make_rows(rows), chunk_rows=1, codec="none", **shape)
    with endpoint(root, delay, Spoiling) as s3:
        for name, value in {**s3.environment, "H2T_BLOCK_CACHE_BYTES": "0"}.items():
            patch.setenv(name, value)
        yield s3, maps


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Forty rows in four shards at an S3 endpoint that spoils nothing yet."""
    with served(tmp_path, monkeypatch, 0, 40, maps=((64, 8, 8),), shard_rows=10) as found:
        yield found


def test_reading_has_many_requests_under_way(tmp_path, monkeypatch):
    """48 MiB in six shards; an answer takes longer than threads take to start."""
    shape = {"maps": ((256, 32, 32),), "dtype": "float32", "shard_rows": 8}
    with (
        served(tmp_path, monkeypatch, 0.3, 48, **shape) as (s3, maps),
        open_cache("s3://bucket/maps") as cache,
    ):
        cache.read([0])
        before, s3.most = s3.requests, 0
        assert np.array_equal(cache.read(range(48)), maps)
        assert 4 < s3.most <= REMOTE_THREADS
        assert s3.requests - before <= 2 * maps.nbytes / REMOTE_UNIT_BYTES + 6


def test_pieces_come_in_turns_of_their_shards():
    work = [Unit(shard, first, first + 1, []) for first, shard in enumerate([0, 0, 0, 1, 2, 2])]
    assert [unit.first for unit in in_turns(work)] == [0, 3, 4, 1, 5, 2]


@pytest.mark.parametrize("spoil", ["nothing", "end the connection"])
def test_ranges_come_by_urls_signed_as_other_requests_are(store, spoil):
    """Also from a store that ends its connections."""
    s3, maps = store
    s3.spoil = spoil
    with open_cache("s3://bucket/maps") as cache:
        before = s3.requests, s3.signed
        assert np.array_equal(cache.read(range(40)), maps)
        assert s3.requests - before[0] == s3.signed - before[1] == 8  # an index and all rows of each shard
    assert s3.algorithms == {"AWS4-HMAC-SHA256"}


def test_after_a_pause_no_connection_is_left_and_ranges_come_as_before(store):
    s3, maps = store
    s3.spoil = "hang up later"
    with open_cache("s3://bucket/maps") as cache:
        cache.read(range(40))
        for row in range(GIVE_UP + 2):
            time.sleep(PAUSE)
            before = s3.requests, s3.signed
            assert np.array_equal(cache.read([row]), maps[[row]])
            assert s3.requests - before[0] == s3.signed - before[1] == 1


def test_the_kept_blocks_are_those_of_the_shards(store, tmp_path, monkeypatch):
    s3, maps = store
    monkeypatch.setenv("H2T_BLOCK_CACHE", str(tmp_path / "blocks"))
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", "100000000")
    shards = []
    for _ in range(2):
        with open_cache("s3://bucket/maps") as cache:
            before = s3.signed
            assert np.array_equal(cache.read(range(40)), maps)
            shards.append(s3.signed - before)
    assert shards == [4, 0]  # whole files, as they are small


@pytest.mark.parametrize(
    "spoil",
    ["refuse", "send elsewhere", "ignore the range", "send other bytes", "send less", "encode", "break off"],
)
def test_what_is_not_plain_and_complete_is_asked_for_through_s3fs(store, spoil):
    s3, maps = store
    s3.spoil = spoil
    with open_cache("s3://bucket/maps") as cache:
        assert np.array_equal(cache.read(range(40)), maps)
        assert s3.signed <= 2 * (GIVE_UP + REMOTE_THREADS)  # threads that had begun; two tries, over an old connection
        signed = s3.signed
        assert np.array_equal(cache.read(range(40)), maps)
        assert s3.signed == signed


def test_one_failure_among_answers_changes_nothing(store):
    s3, maps = store
    with open_cache("s3://bucket/maps") as cache:
        cache.read(range(40))
        s3.spoil = "refuse"
        assert np.array_equal(cache.read([0]), maps[:1])
        s3.spoil, signed = "nothing", s3.signed
        assert np.array_equal(cache.read(range(40)), maps)
        assert s3.signed - signed == 4


def test_swapped_bytes_are_damage(store):
    s3, maps = store
    with open_cache("s3://bucket/maps") as cache:
        assert np.array_equal(cache.read(range(40)), maps)
        s3.spoil = "swap bytes of shards"
        with pytest.raises(CacheError, match=r"chunk 9 \(row 9\): crc32c mismatch"):
            cache.read(range(10))


@pytest.mark.parametrize("spoil", ["nothing", "refuse", "ignore the range", "send less", "break off", "encode"])
def test_whole_files_come_by_ranges_side_by_side(store, spoil):
    s3, _ = store
    data = np.random.default_rng(0).bytes(9 * 2**20)
    (s3.root / "bucket/maps/long").write_bytes(data)
    (s3.root / "bucket/maps/empty").touch()
    files = files_at("s3://bucket/maps")
    s3.spoil = spoil
    assert files.read_all("long", len(data)) == data
    assert files.read_all("empty", 5) == files.read_all("empty", 0) == b""
    with pytest.raises(CacheError, match=f"must be at most {len(data) - 1} bytes; it is longer"):
        files.read_all("long", len(data) - 1)
    files.close()


def test_a_whole_file_is_never_of_two_versions(store):
    s3, _ = store
    (s3.root / "bucket/maps/long").write_bytes(np.random.default_rng(0).bytes(9 * 2**20))
    files = files_at("s3://bucket/maps")
    s3.spoil = "change version"
    assert len(files.read_all("long", 9 * 2**20)) == 9 * 2**20
    assert s3.requests - s3.signed == 1  # the whole file in one answer
    files.close()


def test_another_version_is_another_cache(store):
    s3, _ = store
    with open_cache("s3://bucket/maps") as cache:
        s3.spoil = "name another version"
        with raises("replaced"):
            cache.read([0])


@pytest.mark.parametrize("rows", [[0], [0, 9]], ids=["one request", "two requests at once"])
def test_a_store_that_hardly_sends_is_left(store, monkeypatch, rows):
    s3, _ = store
    monkeypatch.setattr(transfer, "WINDOW", 5.0)  # opening takes more than one second on a busy machine
    with open_cache("s3://bucket/maps") as cache:
        cache.read([0])
        s3.spoil, started = "hardly send", time.monotonic()
        with raises("unreachable", "too slow"):
            cache.read(rows)
    assert time.monotonic() - started < 30  # the row would take 800 s


def connections(port: int) -> int:
    """Open connections of this process to `port` on the loopback."""
    there = f"0100007F:{port:04X}"
    fields = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    inodes = {f[9] for f in fields if f[2] == there}
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += str(entry.readlink()).removeprefix("socket:[").removesuffix("]") in inodes
    return found


def test_connections_are_used_again_and_closed(store):
    s3, _ = store
    cache = open_cache("s3://bucket/maps")
    cache.read(range(40))
    open_now = connections(s3.port)
    for _ in range(5):
        cache.read(range(40))
    assert connections(s3.port) <= max(open_now, 12)
    cache.close()
    assert connections(s3.port) <= 2  # those of s3fs
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("s3")]


def test_a_forked_child_reads_over_its_own_connections(store):
    _, maps = store
    with open_cache("s3://bucket/maps") as cache:
        cache.read(range(40))
        child = os.fork()
        if not child:
            os._exit(0 if np.array_equal(cache.read(range(40)), maps) else 1)
        assert np.array_equal(cache.read(range(40)), maps)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
