"""Bytes from a store: as they lie there, no more than were asked for, at a bearable rate, and of which version.

fsspec reads an answer to its end before it hands it out, and an HTTP client unpacks what comes packed, so a hostile
server can fill any memory. The bodies of HTTP, S3 and SFTP are therefore read here, piece by piece; other stores are
read by fsspec's own ranges, and keep their own timeouts.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import wait
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from h2t.cache.read.protocols import CONNECTIONS, is_http, is_s3, is_sshfs

T = TypeVar("T")
Span = tuple[int, int]

LEAST_RATE = 1000  # bytes per second that a store must give, or answer in full,
WINDOW = 30.0  # in every stretch of this many seconds
LISTING_SECONDS = 300.0  # a listing cannot be counted as it comes
PIECE_BYTES = 256 * 1024
SFTP_PIECE_BYTES = 64 * 1024  # an SFTP server answers in the order of the requests, so these are counted one by one
TIMES = ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created")


class Unasked(ValueError):
    """The answer is not what was asked for: encoded, too long, of another range."""


class TooSlow(ValueError):
    """The store gave fewer than `LEAST_RATE` bytes per second over a window."""


class Version(NamedTuple):
    """What tells a file from another one in its place: an ETag, or size in bytes and time of the last change."""

    tag: str | None = None
    size: int | None = None
    time: tuple[str, str] | None = None  # what the store calls it, and its value: stores keep several

    @property
    def known(self) -> bool:
        """Whether a replaced file would show itself."""
        return bool(self.tag or self.time)

    def differs(self, other: "Version") -> bool:
        """Whether the two are of different files, as far as both say."""
        if self.tag and other.tag:
            return self.tag != other.tag
        if None not in (self.size, other.size) and self.size != other.size:
            return True
        return bool(self.time and other.time and self.time[0] == other.time[0] and self.time[1] != other.time[1])


class Answer(NamedTuple):
    data: bytes
    version: Version


def version_of(about: Mapping[str, Any]) -> Version:
    """The version in what fsspec knows of a file, or in the headers of an HTTP answer."""
    tag = str(about.get("ETag") or about.get("etag") or "").removeprefix("W/").strip('"')
    size = about.get("size")
    changed = next(((key, _timed(about[key])) for key in TIMES if about.get(key)), None)
    return Version(tag or None, None if size is None else int(size), changed)


def _timed(value: Any) -> str:
    """A time as text; listings and single files give the same one in different types."""
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return f"{seconds:.3f}" if isinstance(seconds, (int, float)) else str(seconds)


class Pace:
    """Counts the bytes that a store gave, over all its requests: some may wait while others are served."""

    def __init__(self) -> None:
        self.window, self.count = WINDOW, 0

    def came(self, size: int) -> None:
        """Called in the loop's thread alone."""
        self.count += size


class Patience:
    """Waits for the answer to one question, however many tries it takes, while the store keeps to the least rate."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._begin()

    def _begin(self) -> None:
        self._had, self._until = self.pace.count, time.monotonic() + self.pace.window

    def result(self, fs: Any, work: Coroutine[Any, Any, T], *, seconds: float | None = None) -> T:
        """What `work` gives in the loop of `fs`. TooSlow if the store does; with `seconds`, after that time."""
        if seconds is not None:
            self._until = time.monotonic() + seconds
        future = asyncio.run_coroutine_threadsafe(work, fs.loop)
        try:
            while not wait([future], max(0.0, self._until - time.monotonic())).done:
                if seconds is not None or self.pace.count - self._had < LEAST_RATE * self.pace.window:
                    raise TooSlow(f"fewer than {LEAST_RATE} bytes a second over {seconds or self.pace.window:g} s")
                self._begin()
        finally:
            future.cancel()
        return future.result()


def read_whole(fs: Any, path: str, at_most: int, patience: Patience) -> Answer:
    """The whole file. Raises Unasked, without reading on, if it is longer than `at_most` bytes."""
    if is_sshfs(fs):
        return patience.result(fs, _sftp_whole(fs, path, at_most, patience.pace))
    if one := _one(fs):
        return patience.result(fs, one(fs, path, None, at_most, patience.pace))
    version = version_of(fs.info(path))
    if version.size is not None and version.size > at_most:
        raise _too_long(at_most)
    data = bytes(fs.cat_file(path) if version.size is not None else fs.cat_file(path, start=0, end=at_most + 1))
    if len(data) > at_most:
        raise _too_long(at_most)
    return Answer(data, version)


def read_spans(fs: Any, path: str, spans: Sequence[Span], patience: Patience) -> list[Answer | BaseException]:
    """For each span (start, stop) its bytes, fewer where the file ends, or what went wrong."""
    if is_sshfs(fs):
        return patience.result(fs, _sftp_spans(fs, path, spans, patience.pace))
    if one := _one(fs):
        return patience.result(fs, _side_by_side(one, fs, path, spans, patience.pace))
    starts, stops = zip(*spans, strict=True)
    found = fs.cat_ranges([path] * len(spans), list(starts), list(stops))
    version = version_of(fs.info(path))
    return [data if isinstance(data, Exception) else Answer(bytes(data), version) for data in found]


def about(fs: Any, path: str, patience: Patience) -> dict[str, Any]:
    """What fsspec knows of a file: its `size` in bytes and what `version_of` reads."""
    found: dict[str, Any] = patience.result(fs, fs._info(path)) if _asynchronous(fs) else fs.info(path)
    return found


def listing(fs: Any, path: str, patience: Patience) -> list[dict[str, Any]]:
    """What fsspec knows of everything in a folder; empty for web servers, whose pages tell no sizes."""
    if is_http(fs):
        return []
    fs.invalidate_cache(path)
    if _asynchronous(fs):
        found: list[dict[str, Any]] = patience.result(fs, fs._ls(path, detail=True), seconds=LISTING_SECONDS)
    else:
        found = fs.ls(path, detail=True)
    return found


def below(fs: Any, root: str, patience: Patience) -> list[str]:
    """Paths of all files below a folder; none for web servers."""
    if is_http(fs):
        return []
    if _asynchronous(fs):
        return list(patience.result(fs, fs._find(root), seconds=LISTING_SECONDS))
    return list(fs.find(root))


def _asynchronous(fs: Any) -> bool:
    return is_http(fs) or is_s3(fs) or is_sshfs(fs)


def _too_long(at_most: int) -> Unasked:
    return Unasked(f"is longer than the {at_most} bytes that it may have")


def _one(fs: Any) -> Callable[..., Coroutine[Any, Any, Answer]] | None:
    """What asks for one span (None: the whole file) of at most so many bytes."""
    return _http if is_http(fs) else _s3 if is_s3(fs) else None


async def _side_by_side(
    one: Callable[..., Coroutine[Any, Any, Answer]], fs: Any, path: str, spans: Sequence[Span], pace: Pace
) -> list[Answer | BaseException]:
    gate = asyncio.Semaphore(CONNECTIONS)

    async def gated(span: Span) -> Answer:
        async with gate:
            return await one(fs, path, span, span[1] - span[0], pace)

    return await asyncio.gather(*map(gated, spans), return_exceptions=True)


def _range(span: Span) -> str:
    return f"bytes={span[0]}-{span[1] - 1}"


async def _http(fs: Any, path: str, span: Span | None, at_most: int, pace: Pace) -> Answer:
    if span and span[0] == span[1]:
        return Answer(b"", Version())
    session = await fs.set_session()
    options = {**fs.kwargs, "auto_decompress": False}
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}
    if span:
        options["headers"]["Range"] = _range(span)
    if hasattr(session, "retry_options"):  # DVC's client asks again by itself; one place does, and that is ours
        from aiohttp_retry import ExponentialRetry

        options["retry_options"] = ExponentialRetry(attempts=1)
    async with session.get(fs.encode_url(path), **options) as answer:
        fs._raise_not_found_for_status(answer, path)
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            answer.close()
            raise Unasked(f"the server sends it packed ({encoding[:20]}), which was not asked for")
        try:
            first, size = _content_range(answer.headers.get("Content-Range", ""))
            if span and (first if answer.status == 206 else 0) not in (None, span[0]):
                raise Unasked(
                    f"bytes {span[0]} to {span[1]} were asked for, others came (status {answer.status}); the server "
                    "must know ranges"
                )
            length = answer.content_length
            if length is not None and length > at_most:
                raise _too_long(at_most)
            if answer.status == 200:
                size = length
            data = await _body(answer.content.readany, at_most, pace)
        except Unasked:
            answer.close()  # or the rest of the body would be read before the connection is used again
            raise
        told = {key: answer.headers.get(key) for key in ("ETag", "Last-Modified")}
        return Answer(data, version_of({**told, "size": size}))


def _content_range(header: str) -> tuple[int | None, int | None]:
    """First byte and size of the file in `bytes FIRST-LAST/SIZE`, each None where it is not told."""
    unit, _, told = header.partition(" ")
    if unit != "bytes":
        return None, None
    part, _, size = told.partition("/")
    first = part.partition("-")[0]
    return int(first) if first.isdecimal() else None, int(size) if size.isdecimal() else None


async def _body(read: Callable[[], Coroutine[Any, Any, bytes]], at_most: int, pace: Pace) -> bytes:
    data = bytearray()
    while part := await read():
        pace.came(len(part))
        if len(data) + len(part) > at_most:
            raise _too_long(at_most)
        data += part
    return bytes(data)


async def _s3(fs: Any, path: str, span: Span | None, at_most: int, pace: Pace) -> Answer:
    if span and span[0] == span[1]:
        return Answer(b"", Version())
    bucket, key, version = fs.split_path(path)
    options = {"Range": _range(span)} if span else {}
    if version:
        options["VersionId"] = version
    found = await fs._call_s3("get_object", Bucket=bucket, Key=key, **options)
    body = found["Body"]
    try:
        if found.get("ContentLength", 0) > at_most:
            raise _too_long(at_most)
        data = await _body(lambda: body.read(PIECE_BYTES), at_most, pace)
    finally:
        body.close()
    _, size = _content_range(found.get("ContentRange", ""))
    return Answer(data, version_of({**found, "size": size if span else found.get("ContentLength")}))


async def _sftp_spans(fs: Any, path: str, spans: Sequence[Span], pace: Pace) -> list[Answer | BaseException]:
    async def read(file: Any) -> list[Answer | BaseException]:
        version = await _sftp_version(file)
        tasks = (_sftp_span(file, start, stop, pace) for start, stop in spans)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [data if isinstance(data, BaseException) else Answer(data, version) for data in found]

    return await _sftp(fs, path, read)


async def _sftp_whole(fs: Any, path: str, at_most: int, pace: Pace) -> Answer:
    async def read(file: Any) -> Answer:
        version = await _sftp_version(file)
        if version.size is None or version.size > at_most:
            raise _too_long(at_most)
        return Answer(await _sftp_span(file, 0, version.size, pace), version)

    return await _sftp(fs, path, read)


async def _sftp(fs: Any, path: str, read: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    """What `read` gives for the open file. sshfs's own reads know no ranges and send the whole file."""
    from sshfs.utils import wrap_exceptions

    async def opened() -> T:
        async with fs._pool.get() as channel, channel.open(path, "rb") as file:
            return await read(file)

    found: T = await wrap_exceptions(opened)()
    return found


async def _sftp_version(file: Any) -> Version:
    """As `version_of` what sshfs tells of a file."""
    told = await file.stat()
    return version_of({"size": told.size, "mtime": told.mtime})


async def _sftp_span(file: Any, start: int, stop: int, pace: Pace) -> bytes:
    async def piece(at: int) -> bytes:
        data: bytes = await file.read(min(SFTP_PIECE_BYTES, stop - at), at)
        pace.came(len(data))
        return data

    return b"".join(await asyncio.gather(*(piece(at) for at in range(start, stop, SFTP_PIECE_BYTES))))
