"""GETs of byte ranges of objects in S3 over plain HTTP connections: the fast way, for answers that need no handling.

A request through s3fs costs about 2 ms of processor time beside its bytes, and all bytes pass through one thread with
an event loop and are copied several times. Here an address is signed once for many ranges of an object (a presigned
URL, https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html), and each body is read into its
final memory by the thread that asks for it: handing it to another thread costs a third of the request itself. Further
spans of one question have threads of their own.

Only complete and plain answers count. For anything else (another status, a redirect, an encoding, a proxy, a broken
connection) the caller asks again through s3fs, whose errors are the ones that are reported.
"""

import ssl
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import SHUT_RDWR, socket
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

from h2t.cache.read.protocols import CONNECT_TIMEOUT, CONNECTIONS, READ_TIMEOUT
from h2t.cache.read.transfer import Answer, Patience, Span, TooSlow, content_range, range_header, version_of

PIECE_BYTES = 256 * 1024
URL_SECONDS = 300  # an address is signed anew after this time, and valid for twice as long
GIVE_UP = 3  # calls in a row that only s3fs could answer; after them it gets all requests


class Declined(Exception):
    """The answer is not a complete and plain one."""


class Direct:
    """Requests for ranges of objects of the s3fs file system `fs`: one for each caller and up to `CONNECTIONS` more."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._idle: defaultdict[str, list[HTTPConnection]] = defaultdict(list)  # scheme and host -> connections
        self._signed: dict[str, tuple[str, float]] = {}  # path -> its URL and when that was signed
        self.failed = 0  # calls in a row that only s3fs could answer
        self._secure: ssl.SSLContext | None = None
        self._watched: set[_Call] = set()
        self._watching = False

    def spans(self, path: str, spans: Sequence[Span], patience: Patience) -> list[Answer | None]:
        """For each span (start, stop), none empty, its bytes; None if there was no complete and plain answer.

        Raises TooSlow if the store is.
        """
        answers: list[Answer | None] = [None] * len(spans)
        if not spans or self.failed >= GIVE_UP or not (url := self._url(path, patience)):
            return answers
        call = _Call(self, url, spans, answers, patience)
        helpers = min(len(spans), CONNECTIONS) - 1
        futures = [self._started().submit(call.work) for _ in range(helpers)]
        try:
            with self._watch(call):
                call.work()
            patience.wait(futures)
        finally:
            call.stop()
            for future in futures:
                future.cancel()
        if call.too_slow:
            raise call.too_slow
        if None in answers:
            self._signed.pop(path, None)
        return answers

    def close(self) -> None:
        """Closes idle connections and ends the threads; the next request starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()  # its threads give their connections back first
        idle, self._idle = self._idle, defaultdict(list)
        for connection in (one for several in idle.values() for one in several):
            connection.close()

    @contextmanager
    def _watch(self, call: "_Call") -> Iterator[None]:
        """While this lasts, `call` is stopped if the store is too slow."""
        with self._lock:
            self._watched.add(call)
            start, self._watching = not self._watching, True
        if start:
            self.fs.loop.call_soon_threadsafe(self._look)
        try:
            yield
        finally:
            with self._lock:
                self._watched.discard(call)

    def _look(self) -> None:
        """Stops the calls that take too long, in the event loop of `fs`; again as long as there are any."""
        with self._lock:
            for call in list(self._watched):
                try:
                    call.patience.check()
                except TooSlow as error:
                    call.too_slow = error
                    call.stop()
                    self._watched.discard(call)
            self._watching = bool(self._watched)
            if self._watching:
                self.fs.loop.call_later(min(call.patience.left for call in self._watched), self._look)

    def _started(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(CONNECTIONS, "s3")
            return self._pool

    def _url(self, path: str, patience: Patience) -> str | None:
        """The signed URL of an object, which must not be shown; None if a request there needs more than a URL."""
        url, since = self._signed.get(path, ("", 0.0))
        if url and time.monotonic() - since < URL_SECONDS:
            return url
        try:
            url = patience.result(self.fs, self._sign(path))
        except Declined:
            self.failed = GIVE_UP
            return None
        except TooSlow:
            raise
        except Exception:  # noqa: BLE001 - s3fs will report it, or answer
            return None
        self._signed[path] = (url, time.monotonic())
        return url

    async def _sign(self, path: str) -> str:
        """The signed URL. Raises Declined if `fs` was given more than an address and a login, such as a certificate."""
        client = await self.fs.set_session()
        if self.fs.s3_additional_kwargs or self.fs.req_kw or self.fs.config_kwargs.get("proxies"):
            raise Declined
        if set(self.fs.client_kwargs) - {"endpoint_url", "region_name"}:
            raise Declined
        # Else botocore signs URLs with the old version 2, which newer regions refuse.
        client.meta.events.register("choose-signer.s3.GetObject", _as_other_requests, unique_id="h2t-presigned")
        url: str = await self.fs._url(path, 2 * URL_SECONDS)
        parts, proxies = urlsplit(url), urllib.request.getproxies()
        if {parts.scheme, "all"} & set(proxies) and not urllib.request.proxy_bypass(parts.hostname or ""):
            raise Declined
        if self._secure is None and url.startswith("https:"):
            from botocore.httpsession import get_cert_path

            trusted = get_cert_path(self.fs.session.get_config_variable("ca_bundle") or True)
            self._secure = ssl.create_default_context(cafile=trusted)
        return url

    def kept(self, url: str) -> HTTPConnection | None:
        """A connection to the host of `url` that was used before, if one is left."""
        scheme, host = urlsplit(url)[:2]
        with suppress(IndexError):
            return self._idle[f"{scheme}://{host}"].pop()
        return None

    def fresh(self, url: str) -> HTTPConnection:
        """A connection to the host of `url` that was not used before."""
        scheme, host = urlsplit(url)[:2]
        if scheme == "http":
            return HTTPConnection(host, timeout=CONNECT_TIMEOUT)
        return HTTPSConnection(host, timeout=CONNECT_TIMEOUT, context=self._secure)

    def give_back(self, url: str, connection: HTTPConnection) -> None:
        scheme, host = urlsplit(url)[:2]
        self._idle[f"{scheme}://{host}"].append(connection)


class _Call:
    """The requests for `spans` of one object, made by one or more threads, each of which calls `work`."""

    def __init__(
        self, direct: Direct, url: str, spans: Sequence[Span], answers: list[Answer | None], patience: Patience
    ) -> None:
        self.direct, self.url, self.spans, self.answers = direct, url, spans, answers
        self.patience, self.too_slow = patience, cast("TooSlow | None", None)
        self.rest: Iterator[int] = iter(range(len(spans)))
        self.open: set[socket] = set()
        self.stopped = False

    def work(self) -> None:
        """Requests one span after the other until none is left or the store declined one."""
        for i in self.rest:
            try:
                self.answers[i] = self._answer(self.spans[i])
            except Exception:  # noqa: BLE001 - whatever an answer's headers or a closed connection cause, s3fs asks again
                return

    def stop(self) -> None:
        """Ends all requests: their threads find their connections closed."""
        self.stopped = True
        for connected in list(self.open):
            with suppress(OSError):
                connected.shutdown(SHUT_RDWR)

    def _answer(self, span: Span) -> Answer:
        if connection := self.direct.kept(self.url):
            try:
                return self._over(connection, span)
            except (OSError, HTTPException):  # the store has closed it, as it may after a pause; so others, perhaps
                if self.stopped:
                    raise
        return self._over(self.direct.fresh(self.url), span)

    def _over(self, connection: HTTPConnection, span: Span) -> Answer:
        received: socket | None = None
        try:
            if connection.sock is None:
                connection.timeout = max(0.1, min(CONNECT_TIMEOUT, self.patience.left))
                connection.connect()
            received = connection.sock  # the connection forgets it if the store will close it after this answer
            assert received is not None
            self.open.add(received)
            received.settimeout(READ_TIMEOUT)
            if self.stopped:
                raise Declined
            parts = urlsplit(self.url)
            headers = {"Range": range_header(span), "Accept-Encoding": "identity"}
            connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
            answer = connection.getresponse()
            answered = Answer(self._body(answer, span, received), _version(answer))
            answer.close()
        except BaseException:
            connection.close()
            raise
        finally:
            if received is not None:
                self.open.discard(received)
        if answer.will_close:
            connection.close()
        else:
            self.direct.give_back(self.url, connection)
        return answered

    def _body(self, answer: HTTPResponse, span: Span, received: socket) -> memoryview:
        """The body, if it is the whole span or its beginning up to the end of the object, as it is stored."""
        first, size = content_range(answer.headers.get("Content-Range", ""))
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if answer.status != 206 or first != span[0] or size is None or encoding not in ("", "identity"):
            raise Declined
        if answer.length is None or answer.length != min(span[1], size) - span[0]:
            raise Declined
        body = np.empty(answer.length, np.uint8).data  # not zeroed first
        ahead = answer.read1(min(PIECE_BYTES, len(body)))  # all that came with the headers; the rest without a copy
        at = count = len(ahead)
        body[:at] = ahead
        while count and at < len(body):
            self.patience.pace.came(count)
            count = received.recv_into(body[at:])
            at += count
        self.patience.pace.came(count)
        if at < len(body):
            raise Declined
        return body


def _version(answer: HTTPResponse) -> Any:
    """The version of the object, with the fields that s3fs has."""
    changed = answer.headers.get("Last-Modified")
    _, size = content_range(answer.headers.get("Content-Range", ""))
    told = {"ETag": answer.headers.get("ETag"), "size": size}
    return version_of({**told, "LastModified": parsedate_to_datetime(changed)} if changed else told)


def _as_other_requests(signature_version: Any, **_: Any) -> str | None:
    """The signature of other requests, as one in the query of a URL; None where the client decides."""
    signed = isinstance(signature_version, str) and signature_version.endswith("-query")
    return signature_version if signed else None
