"""How each kind of store is asked: one class for web servers, S3 and SFTP each, and one for all others.

fsspec reads an answer completely before returning it, and an HTTP client decompresses it, so a hostile server could
exhaust memory. Bodies from HTTP, S3 and SFTP are therefore read piece by piece, here and in `cache.read.direct`. Other
stores are read with fsspec's own ranges, files and timeouts; for them there is no minimum rate.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from h2t.cache.read.direct import Direct
from h2t.cache.read.protocols import CONNECTIONS, is_http, is_s3, is_sshfs
from h2t.cache.read.spans import MAX_SPAN_BYTES
from h2t.cache.read.transfer import (
    Answer,
    Pace,
    Patience,
    Span,
    Take,
    Unasked,
    Version,
    WholeFile,
    content_range,
    range_header,
    version_of,
)

T = TypeVar("T")

LISTING_SECONDS = 300.0  # timeout of a listing, whose bytes cannot be counted as they arrive
PIECE_BYTES = 256 * 1024
SFTP_PIECE_BYTES = 64 * 1024  # small enough that a slow transfer is seen, as bytes are counted when a piece is complete
SFTP_SPAN_BYTES = 4 * 1024 * 1024  # of a whole file, requested at a time


class Store:
    """A store that is read by means of its fsspec file system `fs` alone."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def whole(self, path: str, at_most: int, patience: Patience) -> WholeFile:
        """The whole file. Raises Unasked, and stops reading, if it is longer than `at_most` bytes."""
        pieces: list[bytes] = []
        version = self.copy(path, at_most, patience, pieces.append)
        return WholeFile(b"".join(pieces), version)

    def copy(self, path: str, at_most: int, patience: Patience, take: Take) -> Version:
        """Passes the whole file to `take`, piece by piece, and returns its version; raises as `whole`."""
        version = version_of(self.fs.info(path))
        if version.size is not None and version.size > at_most:
            raise _too_long(at_most)
        count = 0
        with self.fs.open(path, "rb") as file:
            while part := file.read(PIECE_BYTES):
                count += len(part)
                if count > at_most:
                    raise _too_long(at_most)
                take(part)
        return version

    def spans(self, path: str, spans: Sequence[Span], patience: Patience) -> list[Answer | BaseException]:
        """For each span (start, stop) its bytes, fewer if the file ends earlier, or the exception that was raised."""
        starts, stops = zip(*spans, strict=True)
        results = self.fs.cat_ranges([path] * len(spans), list(starts), list(stops))
        version = version_of(self.fs.info(path))
        return [data if isinstance(data, Exception) else Answer(bytes(data), version) for data in results]

    def about(self, path: str, patience: Patience) -> dict[str, Any]:
        """The details that fsspec has about a file: its `size` in bytes, and the fields that `version_of` reads."""
        details: dict[str, Any] = self.fs.info(path)
        return details

    def listing(self, path: str, patience: Patience) -> list[dict[str, Any]]:
        """The details that fsspec has about each entry of a folder; empty if the store lists no sizes."""
        self.fs.invalidate_cache(path)
        entries: list[dict[str, Any]] = self.fs.ls(path, detail=True)
        return entries

    def below(self, root: str, patience: Patience) -> list[str]:
        """Paths of all files below a folder; empty if the store has no listings."""
        return list(self.fs.find(root))

    def close(self) -> None:
        """Closes idle connections; the next request opens new ones."""


class Asynchronous(Store):
    """A store whose `fs` runs in an event loop, so that its answers can be waited for with patience."""

    def copy(self, path: str, at_most: int, patience: Patience, take: Take) -> Version:
        return patience.result(self.fs, self._request(path, None, at_most, patience.pace, take))

    def spans(self, path: str, spans: Sequence[Span], patience: Patience) -> list[Answer | BaseException]:
        return patience.result(self.fs, self._side_by_side(path, spans, patience.pace))

    def about(self, path: str, patience: Patience) -> dict[str, Any]:
        details: dict[str, Any] = patience.result(self.fs, self.fs._info(path))
        return details

    def listing(self, path: str, patience: Patience) -> list[dict[str, Any]]:
        self.fs.invalidate_cache(path)
        work = self.fs._ls(path, detail=True)
        entries: list[dict[str, Any]] = patience.result(self.fs, work, seconds=LISTING_SECONDS)
        return entries

    def below(self, root: str, patience: Patience) -> list[str]:
        return list(patience.result(self.fs, self.fs._find(root), seconds=LISTING_SECONDS))

    async def _request(self, path: str, span: Span | None, at_most: int, pace: Pace, take: Take) -> Version:
        """Passes the bytes of `span`, which is not empty, or of the whole file to `take`; returns the version."""
        raise NotImplementedError

    async def _side_by_side(self, path: str, spans: Sequence[Span], pace: Pace) -> list[Answer | BaseException]:
        gate = asyncio.Semaphore(CONNECTIONS)

        async def gated(span: Span) -> Answer:
            start, stop = span
            if start == stop:
                return Answer(b"", Version())
            pieces: list[bytes] = []  # joined once: a growing buffer would be copied several times
            async with gate:
                version = await self._request(path, span, stop - start, pace, pieces.append)
            return Answer(b"".join(pieces), version)

        return await asyncio.gather(*map(gated, spans), return_exceptions=True)


class WebServer(Asynchronous):
    """A web server; its pages list no sizes."""

    def listing(self, path: str, patience: Patience) -> list[dict[str, Any]]:
        return []

    def below(self, root: str, patience: Patience) -> list[str]:
        return []

    async def _request(self, path: str, span: Span | None, at_most: int, pace: Pace, take: Take) -> Version:
        session = await self.fs.set_session()
        options = {**self.fs.kwargs, "auto_decompress": False}
        options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}
        if span:
            options["headers"]["Range"] = range_header(span)
        if hasattr(session, "retry_options"):  # DVC's client retries by itself; only `RemoteFiles` should
            from aiohttp_retry import ExponentialRetry

            options["retry_options"] = ExponentialRetry(attempts=1)
        async with session.get(self.fs.encode_url(path), **options) as answer:
            self.fs._raise_not_found_for_status(answer, path)
            encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                answer.close()
                raise Unasked(f"the server must send it unencoded; got encoding {encoding[:20]}")
            try:
                first, size = content_range(answer.headers.get("Content-Range", ""))
                if span and (first if answer.status == 206 else 0) not in (None, span[0]):
                    raise Unasked(
                        f"bytes {span[0]} to {span[1]} were requested, others came (status {answer.status}); the "
                        "server must support range requests"
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


class S3(Asynchronous):
    """A bucket of S3, or of a store with its interface. With `direct`, bytes come by it wherever that works."""

    def __init__(self, fs: Any, direct: Direct | None = None) -> None:
        super().__init__(fs)
        self._direct = direct

    def whole(self, path: str, at_most: int, patience: Patience) -> WholeFile:
        """A long one by ranges side by side: the first answer says how many there are."""
        if self._direct is None or at_most <= MAX_SPAN_BYTES:
            return super().whole(path, at_most, patience)
        found = self._by_ranges(self._direct, path, at_most, patience)
        if found is None:
            found = super().whole(path, at_most, patience)
            self._direct.failed += 1
        else:
            self._direct.failed = 0
        return found

    def _by_ranges(self, direct: Direct, path: str, at_most: int, patience: Patience) -> WholeFile | None:
        first = direct.spans(path, [(0, MAX_SPAN_BYTES)], patience)
        size = first[0].version.size if first[0] else None
        if size is None:
            return None
        if size > at_most:
            raise _too_long(at_most)
        starts = range(MAX_SPAN_BYTES, size, MAX_SPAN_BYTES)
        rest = direct.spans(path, [(at, min(at + MAX_SPAN_BYTES, size)) for at in starts], patience)
        answers = [answer for answer in (*first, *rest) if answer]
        version = answers[0].version
        if len(answers) < 1 + len(starts) or any(version.differs(answer.version) for answer in answers):
            return None
        return WholeFile(b"".join(answer.data for answer in answers), version)

    def spans(self, path: str, spans: Sequence[Span], patience: Patience) -> list[Answer | BaseException]:
        if self._direct is None:
            return super().spans(path, spans, patience)
        filled = [i for i, (start, stop) in enumerate(spans) if stop > start]
        direct = self._direct.spans(path, [spans[i] for i in filled], patience)
        answers: dict[int, Answer | BaseException] = {i: one for i, one in zip(filled, direct, strict=True) if one}
        if answers:
            self._direct.failed = 0
        left = [i for i in range(len(spans)) if i not in answers]
        if left:
            others = super().spans(path, [spans[i] for i in left], patience)
            if not answers and not any(isinstance(other, BaseException) for other in others):
                self._direct.failed += 1
            answers.update(zip(left, others, strict=True))
        return [answers[i] for i in range(len(spans))]

    def close(self) -> None:
        if self._direct:
            self._direct.close()

    async def _request(self, path: str, span: Span | None, at_most: int, pace: Pace, take: Take) -> Version:
        bucket, key, version = self.fs.split_path(path)
        options = {"Range": range_header(span)} if span else {}
        if version:
            options["VersionId"] = version
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **options)
        body = answer["Body"]
        try:
            if answer.get("ContentLength", 0) > at_most:
                raise _too_long(at_most)
            await _body(lambda: body.read(PIECE_BYTES), at_most, pace, take)
        finally:
            body.close()
        _, size = content_range(answer.get("ContentRange", ""))
        return version_of({**answer, "size": size if span else answer.get("ContentLength")})


class Sftp(Asynchronous):
    """A machine behind SSH. Not by sshfs's own reads, which transfer whole files, not ranges."""

    async def _request(self, path: str, span: Span | None, at_most: int, pace: Pace, take: Take) -> Version:
        async def read(file: Any) -> Version:
            version = await _sftp_version(file)
            if version.size is None or version.size > at_most:
                raise _too_long(at_most)
            for start in range(0, version.size, SFTP_SPAN_BYTES):
                take(await _sftp_span(file, start, min(start + SFTP_SPAN_BYTES, version.size), pace))
            return version

        return await self._opened(path, read)

    async def _side_by_side(self, path: str, spans: Sequence[Span], pace: Pace) -> list[Answer | BaseException]:
        async def read(file: Any) -> list[Answer | BaseException]:
            version = await _sftp_version(file)
            tasks = (_sftp_span(file, start, stop, pace) for start, stop in spans)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            return [data if isinstance(data, BaseException) else Answer(data, version) for data in results]

        return await self._opened(path, read)

    async def _opened(self, path: str, read: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """The result of `read` for the open file."""
        from sshfs.utils import wrap_exceptions

        async def opened() -> T:
            async with self.fs._pool.get() as channel, channel.open(path, "rb") as file:
                return await read(file)

        result: T = await wrap_exceptions(opened)()
        return result


def store_of(fs: Any, *, lasting: bool = False) -> Store:
    """The store behind the fsspec file system `fs`; a `lasting` one may keep connections and threads of its own."""
    if lasting and is_s3(fs):
        return S3(fs, Direct(fs))
    kinds = ((is_http, WebServer), (is_s3, S3), (is_sshfs, Sftp))
    return next((kind for belongs, kind in kinds if belongs(fs)), Store)(fs)


def _too_long(at_most: int) -> Unasked:
    return Unasked(f"must be at most {at_most} bytes; it is longer")


async def _body(read: Callable[[], Coroutine[Any, Any, bytes]], at_most: int, pace: Pace, take: Take) -> None:
    count = 0
    while part := await read():
        pace.came(len(part))
        count += len(part)
        if count > at_most:
            raise _too_long(at_most)
        take(part)


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
