"""The bytes of a cache behind a URL: ranges side by side, asked for again where a store falters, kept on the disk.

fsspec speaks the protocols (`read.protocols`) and finds the credentials; `read.transfer` bounds what an answer may
hold and how long it may take. A store that does not answer is asked again a few times, waiting longer each time. Ranges
are fetched together, so that waiting for one of them is waiting for all. Shards go through the local block cache
(`cache.read.blocks`) as soon as the commit record says what they hold.

An open cache is pinned: each answer says which version of a file it is from (an ETag, or size and time), and another
version than the first one seen is CacheError `replaced`. A file that is seen for the first time may already be of
another cache, so the commit record is looked at once more after it.
"""

import os
import threading
import time
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from h2t.cache.errors import CacheError, CacheWarning
from h2t.cache.format.spec import MAX_RECORD_BYTES, RECORD, sha256
from h2t.cache.memory import available_memory
from h2t.cache.read.blocks import BLOCK_BYTES, BlockCache, arriving, from_environment
from h2t.cache.read.protocols import behind, file_system, is_sshfs, may_pass
from h2t.cache.read.transfer import (
    Answer,
    Pace,
    Patience,
    TooSlow,
    Unasked,
    Version,
    about,
    below,
    listing,
    read_spans,
    read_whole,
    version_of,
)
from h2t.cache.redaction import redacted, secrets_in, without

T = TypeVar("T")

TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 0.4, 10.0  # seconds between two tries: up to the first, doubled, up to the second
BLOCKS_AT_ONCE = 16  # blocks asked for side by side by one thread: what hides the latency, and how much memory it takes
#: A request costs about as much as these bytes, and a span is asked for by one.
MAX_GAP_BYTES, MAX_SPAN_BYTES = 64 * 1024, 4 * 1024 * 1024
RECORD_SECONDS = 30.0  # the commit record is looked at again after this time, also where no new file is read
SMALL_BYTES = 64 * 1024 * 1024  # so much memory is always taken without asking whether there is any

_connected: "weakref.WeakSet[RemoteFiles]" = weakref.WeakSet()
_left_behind: list[Any] = []


class RemoteFiles:
    """Files below an fsspec URL (`s3://`, `ssh://`, `https://`, `memory://`), read by ranges.

    What a store raises becomes CacheError: `missing`, `damaged` where it sends other than the bytes asked for,
    `replaced` where it sends those of another file than before, else `unreachable`. No message holds a login, a token
    or a query of the URL. Safe in threads and in forked processes; a pickled one knows the versions it was opened with.
    """

    def __init__(self, url: str) -> None:
        self._start(url)
        self._connect()

    def _start(self, url: str) -> None:
        self._given, self._url, self._secrets = url, redacted(url), secrets_in(url)
        self._blocks: BlockCache | None = None
        self._shards: Mapping[str, tuple[int, str]] = {}
        self._versions: dict[str, Version] = {}
        self._record: str | None = None  # sha256 of the commit record that was read
        self._placed: set[str] = set()  # files whose version is known to be that of the record's cache
        self._looked = time.monotonic()
        self._pace = Pace()
        self._store: Any = None
        self._process = os.getpid()
        self._new_locks()
        _connected.add(self)

    def _new_locks(self) -> None:
        self._connecting = threading.RLock()
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def _connect(self) -> None:
        base, _, query = self._given.partition("?")
        self._query = f"?{query}" if query else ""
        try:
            self._store, self._root = self._ask("", lambda _: file_system(base))
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise type(error)(without(str(error), self._secrets)) from None

    @property
    def _fs(self) -> Any:
        """The file system; connected anew in a forked child."""
        with self._connecting:
            if self._store is None:
                self._connect()
            return self._store

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (type(self), self._given, self._shards, self._opened())

    def _opened(self) -> dict[str, Any]:
        """What is known of the files, for another process."""
        return {"_versions": dict(self._versions), "_record": self._record, "_placed": set(self._placed)}

    def after_fork(self) -> None:
        """In a forked child: forgets the connection, whose thread stayed in the parent, and locks of other threads."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._new_locks()
        if self._blocks:
            self._blocks.after_fork()
        _left_behind.append(self._store)  # ending it here would take its sockets from the parent's loop
        self._store = None

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
            self._spans(name, [(0, 1)])
        except CacheError as error:
            if error.reason in ("unreachable", "replaced"):
                raise
            return error.reason != "missing"
        return True

    def size(self, name: str) -> int:
        """Bytes of `name`; CacheError `missing`, or `replaced` if they differ because the cache was."""
        found = self._about(name)
        size = found.get("size")
        if size is None:
            expected = self._shards.get(name, (MAX_RECORD_BYTES, ""))[0]
            size = len(self.read_all(name, expected))
        if name in self._shards and size != self._shards[name][0]:
            self._check_record(content=True)
        return int(size)

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of `names` that a listing of their folder tells, one request a folder and not one a file.

        Where a listing gives no sizes (web servers), its folder's files are left out. CacheError `missing` for a file
        that is not there.
        """
        found = self.listed_sizes(names)
        # Asked for by itself before it counts as missing: some listings lag behind.
        sizes = {name: self.size(name) if size is None else size for name, size in found.items()}
        if sizes:
            self._check_record()
            self._placed.update(sizes)
        return sizes

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
            return {str(name)[len(root) :].lstrip("/") for name in below(self._fs, root, Patience(self._pace))}
        except (OSError, NotImplementedError, TooSlow):
            return set()

    def read_all(self, name: str, at_most: int) -> bytes:
        """All bytes of `name`; CacheError `damaged` if there are more than `at_most`."""
        self._check_memory(name, at_most)
        data, version = self._ask(name, lambda patience: read_whole(self._fs, self._path(name), at_most, patience))
        self._pin(name, version)
        if name == RECORD:
            self._pin_record(data, version)
        return data

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start` to `stop` of each range; fewer or more of them are CacheError `damaged`."""
        self._check_memory(name, sum(stop - start for start, stop in ranges))
        if self._blocks is None or name not in self._shards:
            return self._fetch(name, ranges)
        size, digest = self._shards[name]
        if any(stop > size for _, stop in ranges):  # what lies beyond the end, the store shall say
            return self._fetch(name, ranges)
        key = self._kept(name, size, digest, ranges)
        kept = [self._blocks.read(key, start, stop) if key else None for start, stop in ranges]
        others = iter(self._fetch(name, [r for r, data in zip(ranges, kept, strict=True) if data is None]))
        return [next(others) if data is None else data for data in kept]

    def forget(self, name: str) -> None:
        """Drops what is kept of `name`: it did not hold. CacheError `replaced` if that is the reason."""
        if self._blocks is not None and name in self._shards:
            digest = self._shards[name][1]
            self._blocks.forget(digest)
            if name in self._versions:
                self._blocks.forget(self._arriving(name, digest))
        self._check_record(content=True)

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}{self._query}"

    def _about(self, name: str) -> dict[str, Any]:
        found = self._ask(name, lambda patience: about(self._fs, self._path(name), patience))
        self._pin(name, version_of(found))
        return found

    def _pin(self, name: str, version: Version) -> None:
        """Remembers the version of a file, or raises CacheError `replaced` if it is not the one remembered."""
        held = self._versions.setdefault(name, version)
        if held.differs(version):
            raise self._replaced(f"{name} is another file than before")
        if version.known and not held.known:
            self._versions[name] = version

    def _pin_record(self, data: bytes, version: Version) -> None:
        digest = sha256(data)
        if self._record is None:
            self._record = digest
            if not version.known:
                warnings.warn(
                    f"{self._url}: the store tells neither ETag nor time of a file, so a cache that is replaced while "
                    "it is open is noticed only where its bytes do not fit",
                    CacheWarning,
                    stacklevel=4,
                )
        elif digest != self._record:
            raise self._replaced(f"{RECORD} is another one than before")

    def _check_record(self, *, content: bool = False) -> None:
        """Raises CacheError `replaced` unless the record that was read is still there: by version, or by `content`."""
        if self._record is None or not (content or self._versions[RECORD].known):
            return
        try:
            if content:
                self.read_all(RECORD, MAX_RECORD_BYTES)
            else:
                self._about(RECORD)
        except CacheError as error:
            if error.reason in ("missing", "damaged"):
                raise self._replaced(f"{RECORD} is gone") from None
            raise
        self._looked = time.monotonic()

    def _replaced(self, what: str) -> CacheError:
        return CacheError("replaced", f"{self._url}: was replaced while it was open ({what}); open it again")

    def _check_memory(self, name: str, size: int) -> None:
        if size > SMALL_BYTES and size > available_memory():
            raise CacheError("full", f"{self._url}/{name}: {size / 1e9:.1f} GB are to be read, more than memory holds")

    def _listing(self, folder: str) -> dict[str, int]:
        """Sizes of the files in `folder`; empty where the store cannot tell those of all of them."""
        path = self._path(folder).rstrip("/")
        try:
            found = [entry for entry in listing(self._fs, path, Patience(self._pace)) if entry["type"] == "file"]
            entries = {f"{folder}/{str(entry['name']).rpartition('/')[2]}".lstrip("/"): entry for entry in found}
            versions = {name: version_of(entry) for name, entry in entries.items()}
        except Exception:  # noqa: BLE001 - each store refuses in its own words; the files are asked for one by one then
            return {}
        if any(version.size is None for version in versions.values()):
            return {}
        for name, version in versions.items():
            self._pin(name, version)
        return {name: version.size for name, version in versions.items() if version.size is not None}

    def _kept(self, name: str, size: int, digest: str, ranges: Sequence[tuple[int, int]]) -> str | None:
        """The key of the blocks of `ranges`, once those that were missing are fetched as far as there is room."""
        blocks = self._blocks
        assert blocks is not None
        every = range(-(-size // BLOCK_BYTES))
        with self._fetching[name]:
            if len(every) <= BLOCKS_AT_ONCE:  # comes whole, and so is known to be the right one
                if not (blocks.is_whole(digest) and all(blocks.holds(digest, block) for block in every)):
                    if not blocks.room(size):
                        return None
                    data = b"".join(self._spans(name, _spans_of(every, size)))
                    if sha256(data) != digest:
                        raise self._another(name)
                    blocks.put_whole(digest, data)
                return digest
            if blocks.is_whole(digest):
                key = digest
            elif self._versions.get(name, Version()).known or version_of(self._about(name)).known:
                key = self._arriving(name, digest)
            else:  # blocks of a file that nothing tells from the one in its place are not kept
                return None
            parts = (range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) for start, stop in ranges)
            missing = iter([block for block in sorted(set().union(*parts)) if not blocks.holds(key, block)])
            while group := list(islice(missing, BLOCKS_AT_ONCE)):
                spans = _spans_of(group, size)
                if not blocks.room(sum(stop - start for start, stop in spans)):
                    return key
                for block, data in zip(group, self._spans(name, spans), strict=True):
                    blocks.put(key, block, data)
            whole = key == digest or blocks.found_whole(key, digest, len(every))
            if whole is False:
                raise self._another(name)
            return digest if whole else key

    def _arriving(self, name: str, digest: str) -> str:
        return arriving(digest, f"{self._url}/{name} {self._versions[name]}")

    def _another(self, name: str) -> CacheError:
        return CacheError("damaged", f"{self._url}/{name}: sha256 differs from the record; another object is there")

    def _fetch(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each range from the store; neighbours in one request."""
        spans, inside = merged(ranges)
        came = self._spans(name, spans)
        return [came[span][start : start + size] for span, start, size in inside]

    def _spans(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span, one request each; where some do not come, these alone are asked for again."""
        found: list[Answer | None] = [None] * len(spans)

        def absent(patience: Patience) -> None:
            todo = [i for i, answer in enumerate(found) if answer is None]
            failed = None
            answers = read_spans(self._fs, self._path(name), [spans[i] for i in todo], patience)
            for i, answer in zip(todo, answers, strict=True):
                if isinstance(answer, BaseException):
                    failed = answer
                else:
                    found[i] = answer
            if failed:
                raise failed

        if not spans:
            return []
        self._ask(name, absent)
        answers = [answer for answer in found if answer]
        for answer, (start, stop) in zip(answers, spans, strict=True):
            self._pin(name, answer.version)
            if len(answer.data) != stop - start:
                raise CacheError(
                    "damaged",
                    f"{self._url}/{name}: bytes {start} to {stop} were asked for, {len(answer.data)} bytes came",
                )
        if name not in self._placed or time.monotonic() - self._looked > RECORD_SECONDS:
            self._check_record()
            self._placed.add(name)
        return [answer.data for answer in answers]

    def _ask(self, name: str, question: Callable[[Patience], T]) -> T:
        """The store's answer, after as many tries as it takes, `TRIES` at most, and only while it keeps to the pace."""
        where = f"{self._url}/{name}".rstrip("/")
        tries = Retrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(FIRST_WAIT, LONGEST_WAIT),
            retry=retry_if_exception(may_pass),
            before_sleep=lambda _: self._reconnect(),
            reraise=True,
        )
        patience = Patience(self._pace)
        try:
            return tries(lambda: question(patience))
        except Exception as raised:  # each store fails in its own words
            error = behind(raised)
            if isinstance(error, CacheError) or (not name and isinstance(error, (ImportError, ValueError))):
                raise
            if isinstance(error, Unasked):
                raise CacheError("damaged", f"{where}: {error}") from None
            if isinstance(error, TooSlow):
                raise CacheError(
                    "unreachable",
                    f"{where}: the store is too slow ({error}); try again later, or copy the cache nearer",
                ) from None
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                if name != RECORD:
                    self._check_record()
                raise CacheError("missing", f"{where}: file is missing") from None
            if getattr(error, "status", None) == 416:  # HTTP: the range lies beyond the end
                raise CacheError("damaged", f"{where}: is shorter than its index or record says") from None
            said = without(" ".join(str(error).split()), self._secrets) or type(error).__name__
            after = f" {TRIES} times" if may_pass(error) else ""
            raise CacheError("unreachable", f"{where}: the store did not answer{after} ({said}); try again") from None

    def _reconnect(self) -> None:
        """A connection that broke stays broken with sshfs; others make their own for each request."""
        if is_sshfs(self._store):
            with suppress(Exception):
                self._store, _ = file_system(self._given)


def _reopened(
    kind: type[RemoteFiles], url: str, shards: Mapping[str, tuple[int, str]], opened: dict[str, Any]
) -> RemoteFiles:
    files = kind.__new__(kind)
    files._start(url)
    files.__dict__.update(opened)
    files._connect()
    files.expect(shards)
    return files


def _forked() -> None:
    for files in list(_connected):
        files.after_fork()


os.register_at_fork(after_in_child=_forked)


def _spans_of(blocks: Iterable[int], size: int) -> list[tuple[int, int]]:
    """First and last byte of `blocks` of a file of `size` bytes."""
    return [(block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, size)) for block in blocks]


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
