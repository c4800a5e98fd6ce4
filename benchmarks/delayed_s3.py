"""A read-only S3 endpoint over a directory that answers every request late.

GetObject with ranges, HeadObject and ListObjectsV2: all that reading a cache takes. The directories below the root are
the buckets. A full server (moto) would spend more time on a request than the client does; the tests show that the
client works with a full one.

    python -m benchmarks.delayed_s3 DIR 0.02     # prints the variables that a client needs, serves until its input ends
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web


class Endpoint:
    """Answers `delay` seconds late. Counts `requests`, `most` of them at a time, and the bytes of bodies `sent`."""

    def __init__(self, root: Path, delay: float) -> None:
        self.root, self.delay = root, delay
        self.requests = self.sent = self.port = 0
        self.most = self._now = 0

    @property
    def environment(self) -> dict[str, str]:
        """What an S3 client needs to find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Closes all connections, also those with an answer under way."""
        await self._runner.cleanup()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(self.delay)
        self._now -= 1
        path = request.match_info["path"]
        self.requests += 1
        if "list-type" in request.query:
            return self.listing(path.strip("/"), request.query.get("prefix", ""))
        file = self.root / path
        if not file.is_file():
            body = "<Error><Code>NoSuchKey</Code><Message>The key does not exist.</Message></Error>"
            return web.Response(
                status=404, text="" if request.method == "HEAD" else body, content_type="application/xml"
            )
        about = file.stat()
        headers = {"Last-Modified": formatdate(about.st_mtime, usegmt=True), "ETag": f'"{about.st_size:x}"'}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(about.st_size)})
        wanted, status = request.http_range, 200
        start, stop = wanted.start or 0, min(about.st_size, about.st_size if wanted.stop is None else wanted.stop)
        if "Range" in request.headers:
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{about.st_size}"
        with file.open("rb") as opened:
            opened.seek(start)
            body_bytes = opened.read(stop - start)
        self.sent += len(body_bytes)
        return web.Response(status=status, headers=headers, body=body_bytes, content_type="binary/octet-stream")

    def listing(self, bucket: str, prefix: str) -> web.Response:
        """The entries of one folder: what starts with `prefix`, up to the next slash."""
        folder = self.root / bucket / prefix
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        parts = [
            f"<Contents><Key>{escape(prefix + e.name)}</Key><Size>{e.stat().st_size}</Size>"
            f"<ETag>&quot;{e.stat().st_size:x}&quot;</ETag>"  # as `answer` gives it: a cache is pinned by it
            f"<LastModified>{datetime.fromtimestamp(int(e.stat().st_mtime), UTC):%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            if e.is_file()
            else f"<CommonPrefixes><Prefix>{escape(prefix + e.name)}/</Prefix></CommonPrefixes>"
            for e in entries
        ]
        head = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>"
        return web.Response(text=f"{head}{''.join(parts)}</ListBucketResult>", content_type="application/xml")


@contextmanager
def endpoint(root: Path, delay: float, kind: type[Endpoint] = Endpoint) -> Iterator[Endpoint]:
    """The endpoint, served by a thread of this process until the end of the block."""
    served, loop = kind(root, delay), asyncio.new_event_loop()
    loop.run_until_complete(served.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(served.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextmanager
def separate(root: Path, delay: float) -> Iterator[tuple[dict[str, str], Callable[[], float]]]:
    """The endpoint, served by a process of its own until the end of the block.

    Gives the environment of its clients, and a function that returns the processor seconds it has taken so far.
    """
    command = [sys.executable, "-m", "benchmarks.delayed_s3", str(root), str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ticks = os.sysconf("SC_CLK_TCK")
        about = Path(f"/proc/{process.pid}/stat")
        yield (
            json.loads(process.stdout.readline()),
            lambda: sum(map(int, about.read_text().rpartition(")")[2].split()[11:13])) / ticks,
        )
        process.stdin.close()


def main() -> None:
    with endpoint(Path(sys.argv[1]), float(sys.argv[2])) as served:
        print(json.dumps(served.environment), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
