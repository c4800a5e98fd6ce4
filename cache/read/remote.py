"""The files of a cache behind a URL: ranges are fetched in parallel, retried, and cached on the local disk.

fsspec handles protocols and credentials (`read.protocols`); `read.stores` asks each kind of store, within bounds of
size and time. A request that fails is retried a few times with growing pauses. Shards go through the local block cache
(`read.blocks`) once the commit record is known.

An open cache is pinned: each answer carries the version of its file (an ETag, or size and time), and a version other
than the first one seen raises CacheError `replaced`. A file seen for the first time may already belong to another
cache, so the version of the commit record is checked again after it.
"""

import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import MAPS, MAX_RECORD_BYTES, RECORD, sha256
from h2t.cache.memory import available_memory
from h2t.cache.read.asking import ask
from h2t.cache.read.blocks import BLOCK_BYTES, BlockCache, arriving, from_environment, spans_of
from h2t.cache.read.pins import Pins
from h2t.cache.read.protocols import file_system, is_sshfs
from h2t.cache.read.spans import merged
from h2t.cache.read.store import FileStore
from h2t.cache.read.stores import Store, store_of
from h2t.cache.read.transfer import Answer, Pace, Patience, Take, TooSlow, version_of
from h2t.cache.redaction import redacted, secrets_in, without
from h2t.cache.sizes import sized

T = TypeVar("T")

BLOCKS_AT_ONCE = 16  # blocks that one thread requests in parallel: enough to hide latency, few enough for its memory
RECORD_SECONDS = 30.0  # the commit record is checked again after this time, even if no new file is read
SMALL_BYTES = 64 * 1024 * 1024  # reads up to this size skip the check of available memory

_connected: "weakref.WeakSet[RemoteFiles]" = weakref.WeakSet()
_left_behind: list[Any] = []


class RemoteFiles(FileStore):
    """The files below an fsspec URL (`s3://`, `ssh://`, `https://`, `memory://`), read by ranges.

    Errors of a store become CacheError: `missing`, `damaged` if it sends bytes other than those requested, `replaced`
    if it sends another version of a file than before, else `unreachable`. Messages never contain a login, token or
    query of the URL. It can be used from threads and forked processes; pickling keeps the versions it was opened with.
    """

    local = False

    def __init__(self, url: str) -> None:
        self._start(url)
        self._connect()

    def _start(self, url: str) -> None:
        self._given, self._url, self._secrets = url, redacted(url), secrets_in(url)
        self._blocks: BlockCache | None = None
        self._shards: Mapping[str, tuple[int, str]] = {}
        self._pins = Pins(self._url)
        self._looked = time.monotonic()  # when the commit record was last checked
        self._pace = Pace()
        self._store: Any = None
        self._asked: Store | None = None
        self._process = os.getpid()
        self._new_locks()
        _connected.add(self)

    def _new_locks(self) -> None:
        self._connecting = threading.RLock()
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def _connect(self) -> None:
        base, _, query = self._given.partition("?")
        self._query = f"?{query}" if query else ""

        def connected(_: Patience) -> tuple[Any, str] | Exception:
            try:
                return file_system(base)
            except (ImportError, ValueError) as error:  # unknown protocol, or its package is not installed
                return type(error)(without(str(error), self._secrets))  # not raised, as the store refused nothing

        found = ask(self._url.rstrip("/"), connected, self._pace, self._secrets, self._reconnect)
        if isinstance(found, Exception):
            raise found
        self._store, self._root = found

    @property
    def _fs(self) -> Any:
        """The fsspec file system; a forked child connects again."""
        with self._connecting:
            if self._store is None:
                self._connect()
            return self._store

    @property
    def _at(self) -> Store:
        with self._connecting:
            fs = self._fs
            if self._asked is None or self._asked.fs is not fs:
                self._asked = store_of(fs, lasting=True)
            return self._asked

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (type(self), self._given, self._shards, self._opened())

    def _opened(self) -> dict[str, Any]:
        """What another process must know of the files that were opened: attribute -> value."""
        return {"_pins": self._pins.copy()}

    def after_fork(self) -> None:
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._new_locks()
        if self._blocks:
            self._blocks.after_fork()
        _left_behind.append((self._store, self._asked))  # deleting it here would close the parent's sockets
        self._store = self._asked = None

    def __str__(self) -> str:
        return self._url

    def expect(self, recorded: Mapping[str, tuple[int, str]]) -> None:
        """Takes name -> (bytes, sha256) from the commit record; its shards go through the block cache from now on."""
        shards = {name: entry for name, entry in recorded.items() if name.startswith(f"{MAPS}/expert_")}
        self._shards, self._blocks = shards, from_environment() if shards else None
        if self._blocks:
            self._blocks.claim([digest for _, digest in shards.values()])

    def exists(self, name: str) -> bool:
        # Not by fsspec's `exists`, which returns False if there is no answer.
        try:
            self._spans(name, [(0, 1)])
        except CacheError as error:
            if error.reason in ("unreachable", "replaced"):
                raise
            return error.reason != "missing"
        return True

    def size(self, name: str) -> int:
        size = self._about(name).get("size")
        if size is None:
            expected = self._shards.get(name, (MAX_RECORD_BYTES, ""))[0]
            size = len(self.read_all(name, expected))
        if name in self._shards and size != self._shards[name][0]:
            self._check_record(content=True)
        return int(size)

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes from listings, with one request per folder and not per file.

        Files in folders whose listing has no sizes (web servers) are left out. Raises CacheError `missing`, `replaced`.
        """
        listed = self.listed_sizes(names)
        # Some listings lag behind, so a file that they lack is requested itself before it counts as missing.
        sizes = {name: self.size(name) if size is None else size for name, size in listed.items()}
        if sizes:
            self._check_record()
            self._pins.placed.update(sizes)
        return sizes

    def listed_sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        sizes: dict[str, int | None] = {}
        listings: dict[str, dict[str, int]] = {}
        for name in names:
            folder = name.rpartition("/")[0]
            if folder not in listings:
                listings[folder] = self._listing(folder)
            if listings[folder]:
                sizes[name] = listings[folder].get(name)
        return sizes

    def names(self) -> set[str]:
        root = self._root.rstrip("/")
        try:
            return {str(name)[len(root) :].lstrip("/") for name in self._at.below(root, Patience(self._pace))}
        except (OSError, NotImplementedError, TooSlow):
            return set()

    def read_all(self, name: str, at_most: int) -> bytes:
        self._check_memory(name, at_most)
        data, version = self._ask(name, lambda patience: self._at.whole(self._path(name), at_most, patience))
        self._pins.pin(name, version)
        if name == RECORD:
            self._pins.pin_record(data, version)
        return data

    def read_unpinned(self, name: str, at_most: int) -> bytes:
        """All bytes of `name`, whatever its version, for callers that know its digest; errors as for `read_all`."""
        return self._ask(name, lambda patience: self._at.whole(self._path(name), at_most, patience)).data

    def copy(self, name: str, start: Callable[[], Take], at_most: int) -> None:
        """Passes all bytes of `name`, piece by piece, to the function that `start` returns.

        After a failure, `start` is called again and all bytes come again. CacheErrors of these functions pass as they
        are. Raises CacheError `damaged` if there are more than `at_most` bytes, `missing`, `replaced`, `unreachable`.
        """
        version = self._ask(name, lambda patience: self._at.copy(self._path(name), at_most, patience, start()))
        self._pins.pin(name, version)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        self._check_memory(name, sum(stop - start for start, stop in ranges))
        if self._blocks is None or name not in self._shards:
            return self._fetch(name, ranges)
        size, digest = self._shards[name]
        if any(stop > size for _, stop in ranges):  # beyond the recorded end: the store's answer decides
            return self._fetch(name, ranges)
        key = self._kept(name, size, digest, ranges)
        kept = [self._blocks.read(key, start, stop) if key else None for start, stop in ranges]
        others = iter(self._fetch(name, [r for r, data in zip(ranges, kept, strict=True) if data is None]))
        return [next(others) if data is None else data for data in kept]

    def forget(self, name: str) -> None:
        """Drops the cached blocks of `name`, which were wrong. Raises CacheError `replaced` if the cache was."""
        if self._blocks is not None and name in self._shards:
            digest = self._shards[name][1]
            self._blocks.forget(digest)
            if name in self._pins.versions:
                self._blocks.forget(self._arriving(name, digest))
        self._check_record(content=True)

    def close(self) -> None:
        if self._asked is not None:
            self._asked.close()

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}{self._query}"

    def _about(self, name: str) -> dict[str, Any]:
        details = self._ask(name, lambda patience: self._at.about(self._path(name), patience))
        self._pins.pin(name, version_of(details))
        return details

    def _check_record(self, *, content: bool = False) -> None:
        """Raises CacheError `replaced` unless the commit record is still the one read: same version, or `content`."""
        if self._pins.record is None or not (content or self._pins.known(RECORD)):
            return
        try:
            if content:
                self.read_all(RECORD, MAX_RECORD_BYTES)
            else:
                self._about(RECORD)
        except CacheError as error:
            if error.reason in ("missing", "damaged"):
                raise self._pins.replaced(f"{RECORD} is gone") from None
            raise
        self._looked = time.monotonic()

    def _check_memory(self, name: str, size: int) -> None:
        if size > SMALL_BYTES and size > available_memory():
            raise CacheError(
                "full",
                f"{self._url}/{name}: reading it needs {sized(size)} of memory, more than there is free; close other "
                "programs",
            )

    def _listing(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of the files in `folder`; empty unless the store lists the sizes of all of them."""
        path = self._path(folder).rstrip("/")
        try:
            files = [entry for entry in self._at.listing(path, Patience(self._pace)) if entry["type"] == "file"]
            entries = {f"{folder}/{str(entry['name']).rpartition('/')[2]}".lstrip("/"): entry for entry in files}
            versions = {name: version_of(entry) for name, entry in entries.items()}
        except Exception:  # noqa: BLE001 - stores raise anything; without a listing, files are requested one by one
            return {}
        if any(version.size is None for version in versions.values()):
            return {}
        for name, version in versions.items():
            self._pins.pin(name, version)
        return {name: version.size for name, version in versions.items() if version.size is not None}

    def _kept(self, name: str, size: int, digest: str, ranges: Sequence[tuple[int, int]]) -> str | None:
        """Fetches the missing blocks of `ranges` as far as there is room; returns their key, or None if not cached."""
        blocks = self._blocks
        assert blocks is not None
        every = range(-(-size // BLOCK_BYTES))
        with self._fetching[name]:
            if len(every) <= BLOCKS_AT_ONCE:  # fetched whole, so that its sha256 can be checked at once
                if not (blocks.is_whole(digest) and all(blocks.holds(digest, block) for block in every)):
                    if not blocks.room(size):
                        return None
                    whole_file = b"".join(self._fetch(name, spans_of(every, size)))
                    if sha256(whole_file) != digest:
                        raise self._another(name)
                    blocks.put_whole(digest, whole_file)
                return digest
            if blocks.is_whole(digest):
                key = digest
            elif self._pins.known(name) or version_of(self._about(name)).known:
                key = self._arriving(name, digest)
            else:  # without a version, blocks of different files could be mixed, so none are cached
                return None
            parts = (range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) for start, stop in ranges)
            missing = iter([block for block in sorted(set().union(*parts)) if not blocks.holds(key, block)])
            while group := list(islice(missing, BLOCKS_AT_ONCE)):
                spans = spans_of(group, size)
                if not blocks.room(sum(stop - start for start, stop in spans)):
                    return key
                for block, data in zip(group, self._fetch(name, spans), strict=True):
                    blocks.put(key, block, data)
            whole = key == digest or blocks.found_whole(key, digest, len(every))
            if whole is False:
                raise self._another(name)
            return digest if whole else key

    def _arriving(self, name: str, digest: str) -> str:
        return arriving(digest, f"{self._url}/{name} {self._pins.versions[name]}")

    def _another(self, name: str) -> CacheError:
        return CacheError(
            "damaged", f"{self._url}/{name}: sha256 differs from {RECORD}: another object is there; publish it again"
        )

    def _fetch(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """The bytes of each range from the store; neighbouring ranges share a request."""
        spans, inside = merged(ranges)
        data = self._spans(name, spans)
        return [data[span][start : start + size] for span, start, size in inside]

    def _spans(self, name: str, spans: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """The bytes of each span, one request per span; only spans that failed are requested again."""
        received: list[Answer | None] = [None] * len(spans)

        def request_missing(patience: Patience) -> None:
            todo = [i for i, answer in enumerate(received) if answer is None]
            failed = None
            answers = self._at.spans(self._path(name), [spans[i] for i in todo], patience)
            for i, answer in zip(todo, answers, strict=True):
                if isinstance(answer, BaseException):
                    failed = answer
                else:
                    received[i] = answer
            if failed:
                raise failed

        if not spans:
            return []
        self._ask(name, request_missing)
        answers = [answer for answer in received if answer]
        for answer, (start, stop) in zip(answers, spans, strict=True):
            self._pins.pin(name, answer.version)
            if len(answer.data) != stop - start:
                raise CacheError(
                    "damaged",
                    f"{self._url}/{name}: bytes {start} to {stop} were requested, {len(answer.data)} bytes came",
                )
        if name not in self._pins.placed or time.monotonic() - self._looked > RECORD_SECONDS:
            self._check_record()
            self._pins.placed.add(name)
        return [answer.data for answer in answers]

    def _ask(self, name: str, question: Callable[[Patience], T]) -> T:
        """The answer of the store to `question` about the file `name`; raises CacheError."""
        try:
            return ask(f"{self._url}/{name}", question, self._pace, self._secrets, self._reconnect)
        except CacheError as error:
            if error.reason == "missing" and name != RECORD:
                self._check_record()  # `replaced` explains it better
            raise

    def _reconnect(self) -> None:
        """Connects again with sshfs, whose broken connection stays broken; other stores connect for each request."""
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
