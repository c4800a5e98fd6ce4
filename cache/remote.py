"""The bytes of a cache behind a URL: ranges side by side, asked for again where a store falters, kept on the disk.

fsspec speaks the protocols (`cache.protocols`) and finds the credentials; what it leaves open is done here. A store
that does not answer is asked again a few times, waiting longer each time. Ranges are fetched together, so that waiting
for one of them is waiting for all. Shards go through the local block cache (`cache.blocks`) as soon as the commit
record says what they hold.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from cache.blocks import BLOCK_BYTES, BlockCache, from_environment
from cache.errors import CacheError
from cache.protocols import behind, file_system, is_sshfs, may_pass, sftp_ranges
from cache.redaction import redacted, secrets_in, without

T = TypeVar("T")

TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 0.4, 10.0  # seconds between two tries: up to the first, doubled, up to the second
BLOCKS_AT_ONCE = 16  # blocks asked for side by side by one thread: what hides the latency, and how much memory it takes
#: A request costs about as much as these bytes, and a span is asked for by one.
MAX_GAP_BYTES, MAX_SPAN_BYTES = 64 * 1024, 4 * 1024 * 1024


class RemoteFiles:
    """Files below an fsspec URL (`s3://`, `ssh://`, `https://`, `memory://`), read by ranges.

    What a store raises becomes CacheError: `missing`, `damaged` where it sends other than the bytes asked for, else
    `unreachable`. No message holds a login, a token or a query of the URL.
    """

    def __init__(self, url: str) -> None:
        self._start(url)
        self._connect()

    def _start(self, url: str) -> None:
        self._given, self._url, self._secrets = url, redacted(url), secrets_in(url)
        self._blocks: BlockCache | None = None
        self._shards: Mapping[str, tuple[int, str]] = {}
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def _connect(self) -> None:
        base, _, query = self._given.partition("?")
        self._query = f"?{query}" if query else ""
        try:
            self._fs, self._root = self._ask("", lambda: file_system(base))
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise type(error)(without(str(error), self._secrets)) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (type(self), self._given, self._shards)

    def after_fork(self) -> None:
        """Connects anew: what the parent opened, and the thread that served it, stayed there."""
        self._fetching.clear()
        self.expect(self._shards)
        self._connect()

    def __str__(self) -> str:
        return self._url

    def expect(self, shards: Mapping[str, tuple[int, str]]) -> None:
        """Says what the record knows of the shards, name -> (bytes, sha256): they go through the blocks from now on."""
        self._shards, self._blocks = shards, from_environment() if shards else None
        if self._blocks:
            self._blocks.claim([digest for _, digest in shards.values()])

    def exists(self, name: str) -> bool:
        """Whether `name` is there. Where fsspec's own `exists` gets no answer it says no; here that is an error."""
        try:
            self._ask(name, lambda: self._fs.cat_file(self._path(name), start=0, end=1))
        except CacheError as error:
            if error.reason == "unreachable":
                raise
            return error.reason != "missing"
        return True

    def size(self, name: str) -> int:
        found = self._ask(name, lambda: self._fs.size(self._path(name)))
        return len(self.read_all(name)) if found is None else int(found)

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of `names` that a listing of their folder tells, one request a folder and not one a file.

        Where a listing gives no sizes (web servers), its folder's files are left out. CacheError `missing` for a file
        that is not there.
        """
        found = self.listed_sizes(names)
        # Asked for by itself before it counts as missing: some listings lag behind.
        return {name: self.size(name) if size is None else size for name, size in found.items()}

    def listed_sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """As `known_sizes`, with None for a file that its folder's listing lacks."""
        found: dict[str, int | None] = {}
        listings: dict[str, dict[str, int]] = {}
        for name in names:
            folder = name.rpartition("/")[0]
            if folder not in listings:
                listings[folder] = self._listing(folder)
            if listings[folder]:
                found[name] = listings[folder].get(name)
        return found

    def names(self) -> set[str]:
        """Every file below the URL; empty where the store cannot list."""
        root = self._root.rstrip("/")
        try:
            return {str(name)[len(root) :].lstrip("/") for name in self._fs.find(root)}
        except (OSError, NotImplementedError):
            return set()

    def read_all(self, name: str) -> bytes:
        return self._ask(name, lambda: bytes(self._fs.cat_file(self._path(name))))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start` to `stop` of each range; fewer or more of them are CacheError `damaged`."""
        if self._blocks is None or name not in self._shards:
            return self._fetch(name, ranges)
        size, digest = self._shards[name]
        if any(stop > size for _, stop in ranges):  # what lies beyond the end, the store shall say
            return self._fetch(name, ranges)
        self._fill(name, size, digest, ranges)
        kept = [self._blocks.read(digest, start, stop) for start, stop in ranges]
        others = iter(self._fetch(name, [r for r, data in zip(ranges, kept, strict=True) if data is None]))
        return [next(others) if data is None else data for data in kept]

    def forget(self, name: str) -> None:
        """Drops what is kept of `name`: it did not hold."""
        if self._blocks is not None and name in self._shards:
            self._blocks.forget(self._shards[name][1])

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}{self._query}"

    def _listing(self, folder: str) -> dict[str, int]:
        """Sizes of the files in `folder`; empty where the store cannot tell those of all of them."""
        path = self._path(folder).rstrip("/")
        try:
            self._fs.invalidate_cache(path)
            entries = [entry for entry in self._fs.ls(path, detail=True) if entry["type"] == "file"]
        except Exception:  # noqa: BLE001 - each store refuses in its own words; the files are asked for one by one then
            return {}
        sizes = {str(entry["name"]).rpartition("/")[2]: entry.get("size") for entry in entries}
        if any(size is None for size in sizes.values()):
            return {}
        return {f"{folder}/{base}".lstrip("/"): int(size) for base, size in sizes.items() if size is not None}

    def _fill(self, name: str, size: int, digest: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetches the blocks of `ranges` that are not kept, as far as there is room. Each block once."""
        blocks = self._blocks
        assert blocks is not None
        every = range(-(-size // BLOCK_BYTES))
        wanted: Sequence[int] = every
        if len(every) > BLOCKS_AT_ONCE:  # a shard of a few blocks comes whole, and so is known to be the right one
            parts = (range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) for start, stop in ranges)
            wanted = sorted(set().union(*parts))
        with self._fetching[name]:
            missing = iter([block for block in wanted if not blocks.holds(digest, block)])
            while group := list(islice(missing, BLOCKS_AT_ONCE)):
                spans = [(block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, size)) for block in group]
                if not blocks.room(sum(stop - start for start, stop in spans)):
                    return
                for block, data in zip(group, self._spans(name, spans), strict=True):
                    blocks.put(digest, block, data)
            if blocks.found_whole(digest, len(every)) is False:
                raise CacheError(
                    "damaged", f"{self._url}/{name}: sha256 differs from the record; another object is there"
                )

    def _fetch(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each range from the store; neighbours in one request."""
        spans, inside = merged(ranges)
        came = self._spans(name, spans)
        return [came[span][start : start + size] for span, start, size in inside]

    def _spans(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span, one request each; where some do not come, these alone are asked for again."""
        found: list[Any] = [None] * len(spans)

        def absent() -> None:
            todo = [i for i, data in enumerate(found) if data is None]
            starts, stops = zip(*(spans[i] for i in todo), strict=True)
            failed = None
            for i, data in zip(todo, self._cat([self._path(name)] * len(todo), starts, stops), strict=True):
                if isinstance(data, Exception):  # fsspec gives errors in place of the bytes
                    failed = data
                else:
                    found[i] = data
            if failed:
                raise failed

        if spans:
            self._ask(name, absent)
        for data, (start, stop) in zip(found, spans, strict=True):
            if len(data) != stop - start:
                raise CacheError(
                    "damaged", f"{self._url}/{name}: bytes {start} to {stop} were asked for, {len(data)} bytes came"
                )
        return [bytes(data) for data in found]

    def _cat(self, paths: list[str], starts: Sequence[int], stops: Sequence[int]) -> list[Any]:
        if is_sshfs(self._fs):
            return sftp_ranges(self._fs, paths[0], starts, stops)
        found: list[Any] = self._fs.cat_ranges(paths, list(starts), list(stops))
        return found

    def _ask(self, name: str, question: Callable[[], T]) -> T:
        """The store's answer, after as many tries as it takes and `TRIES` at most."""
        where = f"{self._url}/{name}".rstrip("/")
        tries = Retrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(FIRST_WAIT, LONGEST_WAIT),
            retry=retry_if_exception(may_pass),
            before_sleep=lambda _: self._reconnect(),
            reraise=True,
        )
        try:
            return tries(question)
        except Exception as raised:  # each store fails in its own words
            error = behind(raised)
            if isinstance(error, CacheError) or (not name and isinstance(error, (ImportError, ValueError))):
                raise
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise CacheError("missing", f"{where}: file is missing") from None
            if getattr(error, "status", None) == 416:  # HTTP: the range lies beyond the end
                raise CacheError("damaged", f"{where}: is shorter than its index or record says") from None
            said = without(" ".join(str(error).split()), self._secrets) or type(error).__name__
            after = f" {TRIES} times" if may_pass(error) else ""
            raise CacheError("unreachable", f"{where}: the store did not answer{after} ({said}); try again") from None

    def _reconnect(self) -> None:
        """A connection that broke stays broken with sshfs; others make their own for each request."""
        if hasattr(self, "_fs") and is_sshfs(self._fs):
            with suppress(Exception):
                self._fs, _ = file_system(self._given)


def _reopened(kind: type[RemoteFiles], url: str, shards: Mapping[str, tuple[int, str]]) -> RemoteFiles:
    files = kind(url)
    files.expect(shards)
    return files


def merged(ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Spans that bridge gaps of `MAX_GAP_BYTES`; and for each range its span, its first byte in that, and its size."""
    spans: list[tuple[int, int]] = []
    inside = [(0, 0, 0)] * len(ranges)
    for i in sorted(range(len(ranges)), key=ranges.__getitem__):
        start, stop = ranges[i]
        if spans and start - spans[-1][1] <= MAX_GAP_BYTES and stop - spans[-1][0] <= MAX_SPAN_BYTES:
            spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
        else:
            spans.append((start, stop))
        inside[i] = (len(spans) - 1, start - spans[-1][0], stop - start)
    return spans, inside
