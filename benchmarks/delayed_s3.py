"""A read-only S3 endpoint over a directory that lets every request wait.

    python -m benchmarks.delayed_s3 ROOT --delay 0.02

GetObject with ranges, HeadObject and ListObjectsV2: what reading a cache takes. ROOT's directories are its buckets. It
prints its port, and serves until it is stopped. A full server (moto) spends more on a request than the client does, and
on a machine that both share it would be what is measured; that the client gets on with a full one, the tests show.
"""

import argparse
import asyncio
from email.utils import formatdate
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web


class Endpoint:
    """Answers `delay` seconds late. `requests` and `sent` count what was asked for and the bytes given."""

    def __init__(self, root: Path, delay: float) -> None:
        self.root, self.delay = root, delay
        self.requests = self.sent = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(self.delay)
        path = request.match_info["path"]
        if path == "counters":
            return web.json_response({"requests": self.requests, "sent": self.sent})
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
        """One folder: what stands under `prefix` up to the next slash."""
        folder = self.root / bucket / prefix
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        parts = [
            f"<Contents><Key>{escape(prefix + e.name)}</Key><Size>{e.stat().st_size}</Size><ETag>&quot;x&quot;</ETag>"
            "<LastModified>2000-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            if e.is_file()
            else f"<CommonPrefixes><Prefix>{escape(prefix + e.name)}/</Prefix></CommonPrefixes>"
            for e in entries
        ]
        head = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>"
        return web.Response(text=f"{head}{''.join(parts)}</ListBucketResult>", content_type="application/xml")


async def serve(root: Path, delay: float) -> None:
    endpoint = Endpoint(root, delay)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", endpoint.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delayed_s3", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("root", type=Path)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds before each answer")
    options = parser.parse_args()
    asyncio.run(serve(options.root, options.delay))


if __name__ == "__main__":
    main()
