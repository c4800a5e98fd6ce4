"""A web server that gives a cache as it is or spoils one of its files, for tests of what a reader takes from it.

Paths are /MODE/TARGET/NAME: where NAME begins with TARGET, MODE spoils the answer; all else is sound. `spoiled` gives
the mode of single names, whatever the path says; `spoil` changes ranges.
"""

import hashlib
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BOMB_BYTES = 600 * 1024**2
MEBIBYTE = bytes(1024**2)


@cache
def bomb() -> bytes:
    """Gzip of `BOMB_BYTES` of zeros, without the end of the stream: a reader must not get so far."""
    packer = zlib.compressobj(1, wbits=31)
    first, next_one = (packer.compress(MEBIBYTE) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + next_one * (BOMB_BYTES // len(MEBIBYTE) - 1)


class Handler(BaseHTTPRequestHandler):
    """Serves `files` by ranges, with an ETag if `tagged`; `asked` are (method, name) of all requests.

    `queries` are what stood behind a `?`. `spoil`, if set, maps (name, bytes of a range) to (body, status, length).
    """

    files: dict[str, bytes] = {}
    spoiled: dict[str, str] = {}
    asked: list[tuple[str, str]] = []
    encodings: set[str] = set()
    queries: set[str] = set()
    tagged = True
    spoil = None

    def do_HEAD(self) -> None:
        self._sound(body_too=False)

    def do_GET(self) -> None:
        mode, target, name = self._parts()
        type(self).encodings.add(self.headers.get("Accept-Encoding", ""))
        mode = self.spoiled.get(name, mode if name.startswith(target) else "sound")
        spoil = getattr(self, f"_{mode}", None) if mode != "sound" else None
        if spoil and name in self.files:
            type(self).asked.append((self.command, name))
            with suppress(OSError):  # the client has had enough
                spoil(self._sought(self.files[name])[0])
            self.close_connection = True
        else:
            self._sound(body_too=True)

    def _parts(self) -> list[str]:
        path, _, query = self.path.partition("?")
        type(self).queries.add(query)
        return path.lstrip("/").replace("%20", " ").split("/", 2)

    def _sought(self, data: bytes) -> tuple[bytes, int, dict[str, str]]:
        if not (wanted := self.headers.get("Range")):
            return data, 200, {}
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        return part, 206, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}

    def _sound(self, *, body_too: bool) -> None:
        files = self.files  # may be exchanged at any moment
        name = self._parts()[2]
        type(self).asked.append((self.command, name))
        if name not in files:
            self.send_error(404)
            return
        data, status, headers = self._sought(files[name])
        length = len(data)
        if type(self).spoil and headers:
            data, status, length = type(self).spoil(name, data)
        self._head(status, headers | {"Content-Length": str(length)}, files[name])
        if body_too:
            self.wfile.write(data)

    def _head(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        if self.tagged:
            headers["ETag"] = f'"{hashlib.md5(data).hexdigest()}"'
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _gzip(self, data: bytes) -> None:
        self._head(200, {"Content-Encoding": "gzip", "Content-Length": str(len(bomb()))})
        self.wfile.write(bomb())

    def _endless(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._head(status, headers or {})
        self.wfile.write(data)
        for _ in range(BOMB_BYTES // len(MEBIBYTE)):
            self.wfile.write(MEBIBYTE)

    def _range(self, data: bytes) -> None:
        """The right range, and no end."""
        _, status, headers = self._sought(self.files[self._parts()[2]])
        self._endless(data, status, headers)

    def _lies(self, data: bytes) -> None:
        self._endless(data, 200, {"Content-Length": str(10**12)})

    def _slow(self, data: bytes, step: int = 1) -> None:
        """A byte every tenth of a second, or `step` bytes."""
        whole = self.files[self._parts()[2]]
        _, status, headers = self._sought(whole)
        self._head(status, headers | {"Content-Length": str(len(data))}, whole)
        for at in range(0, len(data), step):
            self.wfile.write(data[at : at + step])
            time.sleep(0.1)

    def _silent(self, data: bytes) -> None:
        time.sleep(120)

    def _breaks(self, data: bytes) -> None:
        """Half a second, a byte, and gone."""
        time.sleep(0.5)
        self._head(200, {"Content-Length": "100"})
        self.wfile.write(data[:1])

    def _broken(self, data: bytes) -> None:
        self.send_error(500)

    def _steady(self, data: bytes) -> None:
        """About 2 kB/s."""
        self._slow(data, 200)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hostile_server(files: dict[str, bytes]) -> Iterator[tuple[str, type[Handler]]]:
    """(URL, handler) of a server of `files` on the loopback."""
    handler = type(
        "Here", (Handler,), {"files": files, "spoiled": {}, "asked": [], "encodings": set(), "queries": set()}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
