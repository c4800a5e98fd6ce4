"""Transfers bytes from a store: unencoded, no more than requested, at a minimum rate, and with the file's version.

fsspec reads an answer completely before returning it, and an HTTP client decompresses it, so a hostile server could
exhaust memory. Bodies from HTTP, S3 and SFTP are therefore read here, piece by piece. Other stores are read with
fsspec's own ranges, files and timeouts; for them there is no minimum rate.
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
Take = Callable[[bytes], object]  # receives the pieces of a body in order

LEAST_RATE = 1000  # bytes per second that a store must send, averaged over each window, until its answer is complete
WINDOW = 30.0  # seconds
LISTING_SECONDS = 300.0  # timeout of a listing, whose bytes cannot be counted as they arrive
PIECE_BYTES = 256 * 1024
SFTP_PIECE_BYTES = 64 * 1024  # small enough that a slow transfer is seen, as bytes are counted when a piece is complete
SFTP_SPAN_BYTES = 4 * 1024 * 1024  # of a whole file, requested at a time
TIMES = ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created")


class Unasked(ValueError):
    """The answer is not what was requested: encoded, too long, or another range."""


class TooSlow(ValueError):
    """The store sent fewer than `LEAST_RATE` bytes per second over a window."""


class Version(NamedTuple):
    """Identifies one version of a file: an ETag, or its size in bytes and the time of its last change."""

    tag: str | None = None
    size: int | None = None
    time: tuple[str, str] | None = None  # (field name, value); stores have several fields with different times

    @property
    def known(self) -> bool:
        """True if a replaced file would have another version."""
        return bool(self.tag or self.time)

    def differs(self, other: "Version") -> bool:
        """True if a field that both versions have is different; an ETag decides alone."""
        if self.tag and other.tag:
            return self.tag != other.tag
        if None not in (self.size, other.size) and self.size != other.size:
            return True
        return bool(self.time and other.time and self.time[0] == other.time[0] and self.time[1] != other.time[1])


class Answer(NamedTuple):
    """Bytes from a store, and the version of the file that they are from."""

    data: bytes
    version: Version


def version_of(about: Mapping[str, Any]) -> Version:
    """The version of a file, from fsspec's details about it or from the headers of an HTTP answer."""
    tag = str(about.get("ETag") or about.get("etag") or "").removeprefix("W/").strip('"')
    size = about.get("size")
    changed = next(((key, _timed(about[key])) for key in TIMES if about.get(key)), None)
    return Version(tag or None, None if size is None else int(size), changed)


def _timed(value: Any) -> str:
    """A time as text: listings and single files give the same time in different types."""
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return f"{seconds:.3f}" if isinstance(seconds, (int, float)) else str(seconds)


class Pace:
    """Counts the bytes received from a store over all its requests, as some requests wait while others are served."""

    def __init__(self) -> None:
        self.window, self.count = WINDOW, 0

    def came(self, size: int) -> None:
        """Adds received bytes; called only in the thread of the event loop."""
        self.count += size


class Patience:
    """Waits for the answer to one question, over all its tries, as long as the store sends at least `LEAST_RATE`."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._begin()

    def _begin(self) -> None:
        self._had, self._until = self.pace.count, time.monotonic() + self.pace.window

    def result(self, fs: Any, work: Coroutine[Any, Any, T], *, seconds: float | None = None) -> T:
        """The result of `work`, run in the event loop of `fs`.

        Raises TooSlow if the store is; with `seconds`, if the answer is not complete after that time.
        """
        if seconds is not None:
            self._until = time.monotonic() + seconds
        future = asyncio.run_coroutine_threadsafe(work, fs.loop)
        try:
            while not wait([future], max(0.0, self._until - time.monotonic())).done:
                if seconds is not None or self.pace.count - self._had < LEAST_RATE * self.pace.window:
                    raise TooSlow(f"fewer than {LEAST_RATE} bytes/s over {seconds or self.pace.window:g} s")
                self._begin()
        finally:
            future.cancel()
        return future.result()


def read_whole(fs: Any, path: str, at_most: int, patience: Patience) -> Answer:
    """The whole file. Raises Unasked, and stops reading, if it is longer than `at_most` bytes."""
    data = bytearray()
    version = copy_whole(fs, path, at_most, patience, data.extend)
    return Answer(bytes(data), version)


def copy_whole(fs: Any, path: str, at_most: int, patience: Patience, take: Take) -> Version:
    """Passes the whole file to `take`, piece by piece, and returns its version.

    Raises Unasked, and stops reading, if it is longer than `at_most` bytes.
    """
    if is_sshfs(fs):
        return patience.result(fs, _sftp_whole(fs, path, at_most, patience.pace, take))
    if one := _one(fs):
        return patience.result(fs, one(fs, path, None, at_most, patience.pace, take))
    version = version_of(fs.info(path))
    if version.size is not None and version.size > at_most:
        raise _too_long(at_most)
    count = 0
    with fs.open(path, "rb") as file:
        while part := file.read(PIECE_BYTES):
            count += len(part)
            if count > at_most:
                raise _too_long(at_most)
            take(part)
    return version


def read_spans(fs: Any, path: str, spans: Sequence[Span], patience: Patience) -> list[Answer | BaseException]:
    """For each span (start, stop) its bytes, fewer if the file ends earlier, or the exception that was raised."""
    if is_sshfs(fs):
        return patience.result(fs, _sftp_spans(fs, path, spans, patience.pace))
    if one := _one(fs):
        return patience.result(fs, _side_by_side(one, fs, path, spans, patience.pace))
    starts, stops = zip(*spans, strict=True)
    results = fs.cat_ranges([path] * len(spans), list(starts), list(stops))
    version = version_of(fs.info(path))
    return [data if isinstance(data, Exception) else Answer(bytes(data), version) for data in results]


def about(fs: Any, path: str, patience: Patience) -> dict[str, Any]:
    """The details that fsspec has about a file: its `size` in bytes, and the fields that `version_of` reads."""
    details: dict[str, Any] = patience.result(fs, fs._info(path)) if _asynchronous(fs) else fs.info(path)
    return details


def listing(fs: Any, path: str, patience: Patience) -> list[dict[str, Any]]:
    """The details that fsspec has about each entry of a folder; empty for web servers, whose pages list no sizes."""
    if is_http(fs):
        return []
    fs.invalidate_cache(path)
    if _asynchronous(fs):
        entries: list[dict[str, Any]] = patience.result(fs, fs._ls(path, detail=True), seconds=LISTING_SECONDS)
    else:
        entries = fs.ls(path, detail=True)
    return entries


def below(fs: Any, root: str, patience: Patience) -> list[str]:
    """Paths of all files below a folder; empty for web servers."""
    if is_http(fs):
        return []
    if _asynchronous(fs):
        return list(patience.result(fs, fs._find(root), seconds=LISTING_SECONDS))
    return list(fs.find(root))


def _asynchronous(fs: Any) -> bool:
    return is_http(fs) or is_s3(fs) or is_sshfs(fs)


def _too_long(at_most: int) -> Unasked:
    return Unasked(f"must be at most {at_most} bytes; it is longer")


def _one(fs: Any) -> Callable[..., Coroutine[Any, Any, Version]] | None:
    """The function that requests one span (or None: the whole file) of `fs`; None for stores read by fsspec."""
    return _http if is_http(fs) else _s3 if is_s3(fs) else None


async def _side_by_side(
    one: Callable[..., Coroutine[Any, Any, Version]], fs: Any, path: str, spans: Sequence[Span], pace: Pace
) -> list[Answer | BaseException]:
    gate = asyncio.Semaphore(CONNECTIONS)

    async def gated(span: Span) -> Answer:
        data = bytearray()
        async with gate:
            version = await one(fs, path, span, span[1] - span[0], pace, data.extend)
        return Answer(bytes(data), version)

    return await asyncio.gather(*map(gated, spans), return_exceptions=True)


def _range(span: Span) -> str:
    return f"bytes={span[0]}-{span[1] - 1}"


async def _http(fs: Any, path: str, span: Span | None, at_most: int, pace: Pace, take: Take) -> Version:
    if span and span[0] == span[1]:
        return Version()
    session = await fs.set_session()
    options = {**fs.kwargs, "auto_decompress": False}
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}
    if span:
        options["headers"]["Range"] = _range(span)
    if hasattr(session, "retry_options"):  # DVC's client retries by itself; only `RemoteFiles` should
        from aiohttp_retry import ExponentialRetry

        options["retry_options"] = ExponentialRetry(attempts=1)
    async with session.get(fs.encode_url(path), **options) as answer:
        fs._raise_not_found_for_status(answer, path)
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            answer.close()
            raise Unasked(f"the server must send it unencoded; got encoding {encoding[:20]}")
        try:
            first, size = _content_range(answer.headers.get("Content-Range", ""))
            if span and (first if answer.status == 206 else 0) not in (None, span[0]):
                raise Unasked(
                    f"bytes {span[0]} to {span[1]} were requested, others came (status {answer.status}); the server "
                    "must support range requests"
                )
            length = answer.content_length
            if length is not None and length > at_most:
                raise _too_long(at_most)
            if answer.status == 200:
                size = length
            await _body(answer.content.readany, at_most, pace, take)
        except Exception:
            answer.close()  # else aiohttp would read the rest of the body to reuse the connection
            raise
        told = {key: answer.headers.get(key) for key in ("ETag", "Last-Modified")}
        return version_of({**told, "size": size})


def _content_range(header: str) -> tuple[int | None, int | None]:
    """First byte and file size in a header `bytes FIRST-LAST/SIZE`, each None if it is not given."""
    unit, _, told = header.partition(" ")
    if unit != "bytes":
        return None, None
    part, _, size = told.partition("/")
    first = part.partition("-")[0]
    return int(first) if first.isdecimal() else None, int(size) if size.isdecimal() else None


async def _body(read: Callable[[], Coroutine[Any, Any, bytes]], at_most: int, pace: Pace, take: Take) -> None:
    count = 0
    while part := await read():
        pace.came(len(part))
        count += len(part)
        if count > at_most:
            raise _too_long(at_most)
        take(part)


async def _s3(fs: Any, path: str, span: Span | None, at_most: int, pace: Pace, take: Take) -> Version:
    if span and span[0] == span[1]:
        return Version()
    bucket, key, version = fs.split_path(path)
    options = {"Range": _range(span)} if span else {}
    if version:
        options["VersionId"] = version
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **options)
    body = answer["Body"]
    try:
        if answer.get("ContentLength", 0) > at_most:
            raise _too_long(at_most)
        await _body(lambda: body.read(PIECE_BYTES), at_most, pace, take)
    finally:
        body.close()
    _, size = _content_range(answer.get("ContentRange", ""))
    return version_of({**answer, "size": size if span else answer.get("ContentLength")})


async def _sftp_spans(fs: Any, path: str, spans: Sequence[Span], pace: Pace) -> list[Answer | BaseException]:
    async def read(file: Any) -> list[Answer | BaseException]:
        version = await _sftp_version(file)
        tasks = (_sftp_span(file, start, stop, pace) for start, stop in spans)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        return [data if isinstance(data, BaseException) else Answer(data, version) for data in results]

    return await _sftp(fs, path, read)


async def _sftp_whole(fs: Any, path: str, at_most: int, pace: Pace, take: Take) -> Version:
    async def read(file: Any) -> Version:
        version = await _sftp_version(file)
        if version.size is None or version.size > at_most:
            raise _too_long(at_most)
        for start in range(0, version.size, SFTP_SPAN_BYTES):
            take(await _sftp_span(file, start, min(start + SFTP_SPAN_BYTES, version.size), pace))
        return version

    return await _sftp(fs, path, read)


async def _sftp(fs: Any, path: str, read: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    """The result of `read` for the open file. Not by sshfs's own reads, which transfer whole files, not ranges."""
    from sshfs.utils import wrap_exceptions

    async def opened() -> T:
        async with fs._pool.get() as channel, channel.open(path, "rb") as file:
            return await read(file)

    result: T = await wrap_exceptions(opened)()
    return result


async def _sftp_version(file: Any) -> Version:
    """The same version as `version_of` gives for sshfs's details about the file."""
    status = await file.stat()
    return version_of({"size": status.size, "mtime": status.mtime})


async def _sftp_span(file: Any, start: int, stop: int, pace: Pace) -> bytes:
    async def piece(at: int) -> bytes:
        data: bytes = await file.read(min(SFTP_PIECE_BYTES, stop - at), at)
        pace.came(len(data))
        return data

    return b"".join(await asyncio.gather(*(piece(at) for at in range(start, stop, SFTP_PIECE_BYTES))))
