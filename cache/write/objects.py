"""Writes and lists objects below a URL: a bucket (`s3://`) or a folder of another machine (`ssh://`).

`put` is atomic: an object has its old bytes or all of the new ones. `claim` stores an object only if there is none.
fsspec finds the credentials; failed requests are repeated (`read.asking`), and no message contains a login.
"""

import asyncio
import base64
import hashlib
import io
import os
import posixpath
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from h2t.cache.errors import CacheError
from h2t.cache.read.asking import ask
from h2t.cache.read.protocols import file_system, is_s3, is_sshfs
from h2t.cache.read.stores import store_of
from h2t.cache.read.transfer import Pace, Patience
from h2t.cache.redaction import redacted, secrets_in, without

T = TypeVar("T")

PROTOCOLS = ("s3", "s3a", "ssh", "sftp")
AT_ONCE = 16  # requests at a time: enough to hide latency
SECONDS = 300.0  # time limit of requests whose bytes cannot be counted: listings, copies on the server, deletions
LARGEST = 5 * 10**9  # bytes of one object that S3 takes in one request, and copies in one
LARGEST_READ = 2**30  # bytes of an object that is read back
DELETED_AT_ONCE = 1000  # S3's limit
PIECE_BYTES = 64 * 1024
PIECES = 32  # of an object that are sent over SFTP before the first is confirmed


class Found(NamedTuple):
    """An object in a listing: its size in bytes, and when it was written, in seconds by the server's clock."""

    size: int
    modified: float


class Objects:
    """The objects below `url`, by their path relative to it. Can be pickled and used from several threads.

    Raises ValueError for other protocols. Methods raise CacheError: `unreachable` if the store fails or refuses,
    `missing` if there is no such bucket.
    """

    def __init__(self, url: str) -> None:
        if url.partition("://")[0] not in PROTOCOLS:
            raise ValueError("caches are written to directories and to s3:// and ssh:// only")
        self._given, self._url, self._secrets = url.rstrip("/"), redacted(url).rstrip("/"), secrets_in(url)
        self._pace = Pace()
        self._lock = threading.RLock()
        self._process: int | None = None
        self._store: Any = None

    def __reduce__(self) -> tuple[type["Objects"], tuple[str]]:
        return Objects, (self._given,)

    def __str__(self) -> str:
        return self._url

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Stores `data` under `name`, in the place of what is there."""
        self._put(name, data, only_new=False)

    def claim(self, name: str, data: bytes) -> bytes:
        """Stores `data` under `name` unless there is an object; returns what is stored."""
        while True:
            if self._put(name, data, only_new=True):
                return data
            if (have := self.get(name)) is not None:  # None: removed meanwhile
                return have

    def get(self, name: str) -> bytes | None:
        """The bytes of a small object, or None if there is none."""

        def read(patience: Patience) -> bytes:
            store = self._connected()
            return store_of(store.fs).whole(self._path(store, name), LARGEST_READ, patience).data

        try:
            return ask(f"{self}/{name}", read, self._pace, self._secrets, self._reconnect)
        except CacheError as error:
            if error.reason != "missing":
                raise
            return None

    def copy(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Copies objects on the server, source -> target, in the place of what is there.

        Raises CacheError `missing` if there is no source.
        """

        def copied(pair: tuple[str, str]) -> None:
            source, target = pair
            self._ask(target, lambda store, path: store.copy(self._path(store, source), path), SECONDS)

        with ThreadPoolExecutor(AT_ONCE, "copy") as threads:
            list(threads.map(copied, pairs))

    def below(self, folder: str) -> dict[str, Found]:
        """Every object below `folder`, by its path relative to it."""

        async def listed(store: Any, path: str) -> dict[str, Found]:
            return {name[len(path) :].lstrip("/"): found for name, found in (await store.below(path)).items()}

        return self._ask(folder, listed, SECONDS)

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are missing do no harm."""
        listed = list(names)
        for start in range(0, len(listed), DELETED_AT_ONCE):
            self._remove(listed[start : start + DELETED_AT_ONCE])

    def discard(self, folder: str) -> None:
        """Removes `folder` with all objects below it."""
        self.remove(f"{folder}/{name}" for name in self.below(folder))
        self._ask(folder, lambda store, path: store.remove_folder(path), SECONDS)

    def _remove(self, names: list[str]) -> None:
        self._ask(names[0], lambda store, _: store.remove([self._path(store, name) for name in names]), SECONDS)

    def _put(self, name: str, data: bytes | memoryview, *, only_new: bool) -> bool:
        """Whether `data` was stored, which can only be False with `only_new`."""
        if len(data) > LARGEST:
            raise CacheError("mismatch", f"{self}/{name}: must have at most {LARGEST:,} bytes; got {len(data):,}")
        try:
            return self._ask(name, lambda store, path: store.put(path, data, self._pace, only_new=only_new))
        except CacheError as error:
            if error.reason != "missing":
                raise
            raise CacheError(
                "missing", f"{self}: no such bucket or folder, or it was removed meanwhile; create it, then run again"
            ) from None

    def _path(self, store: Any, name: str) -> str:
        return f"{store.root}/{name}"

    def _connected(self) -> Any:
        """The store; connects first, also in a forked process."""
        with self._lock:
            if self._process != os.getpid():
                try:
                    fs, root = file_system(self._given)
                except (ImportError, ValueError) as error:  # the package of the protocol is not installed
                    raise CacheError("unreachable", f"{self}: {without(str(error), self._secrets)}") from None
                kind = _S3 if is_s3(fs) else _Sftp
                self._store, self._process = kind(fs, root.rstrip("/")), os.getpid()
            return self._store

    def _ask(self, name: str, question: Callable[[Any, str], Any], seconds: float | None = None) -> Any:
        def asked(patience: Patience) -> Any:
            store = self._connected()
            return patience.result(store.fs, question(store, self._path(store, name)), seconds=seconds)

        return ask(f"{self._url}/{name}", asked, self._pace, self._secrets, self._reconnect)

    def _reconnect(self) -> None:
        """Lets the next request connect again; a broken connection of sshfs stays broken."""
        with self._lock:
            if self._store is not None and is_sshfs(self._store.fs):
                self._process = None


class _Counted(io.BytesIO):
    """A body whose bytes count as progress when they are sent."""

    def __init__(self, data: bytes | memoryview, pace: Pace) -> None:
        super().__init__(data)
        self._pace = pace

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self._pace.came(len(piece))
        return piece


class _S3:
    """A bucket of S3, or of a store with its interface. Paths begin with the bucket."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root

    async def put(self, path: str, data: bytes | memoryview, pace: Pace, *, only_new: bool) -> bool:
        bucket, key, _ = self.fs.split_path(path)
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()  # the store refuses bytes that differ
        condition = {"IfNoneMatch": "*"} if only_new else {}
        body = _Counted(data, pace)
        try:
            await self.fs._call_s3("put_object", Bucket=bucket, Key=key, Body=body, ChecksumSHA256=digest, **condition)
        except OSError as error:
            told = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
            if only_new and told.get("HTTPStatusCode") == 412:
                return False
            raise
        return True

    async def copy(self, source: str, target: str) -> None:
        (bucket, key, _), (to, as_key, _) = self.fs.split_path(source), self.fs.split_path(target)
        await self.fs._call_s3("copy_object", Bucket=to, Key=as_key, CopySource={"Bucket": bucket, "Key": key})

    async def below(self, path: str) -> dict[str, Found]:
        found = await self.fs._find(path, detail=True)
        return {
            name: Found(int(about["size"]), about["LastModified"].timestamp())
            for name, about in found.items()
            if name.startswith(f"{path}/")
        }

    async def remove(self, paths: list[str]) -> None:
        bucket = self.fs.split_path(paths[0])[0]
        keys = [{"Key": self.fs.split_path(path)[1]} for path in paths]
        answer = await self.fs._call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        if errors := answer.get("Errors"):
            raise PermissionError(f"{errors[0].get('Code')}: {errors[0].get('Message')}")

    async def remove_folder(self, path: str) -> None:
        """Nothing: a bucket has no folders."""


class _Sftp:
    """A folder of a machine behind SSH, whose server knows OpenSSH's `hardlink` and `posix-rename`."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root

    async def put(self, path: str, data: bytes | memoryview, pace: Pace, *, only_new: bool) -> bool:
        async def sent(sftp: Any) -> bool:
            partial = f"{path}.{uuid.uuid4().hex}.partial"
            await sftp.makedirs(posixpath.dirname(path), exist_ok=True)
            try:
                async with sftp.open(partial, "wb") as file:
                    await _written(file, memoryview(data), pace)
                    await file.fsync()
                if only_new:
                    return await _linked(sftp, partial, path)
                await sftp.posix_rename(partial, path)
            finally:
                await _gone(sftp, partial)
            return True

        stored: bool = await self._asked(sent)
        return stored

    async def copy(self, source: str, target: str) -> None:
        async def copied(sftp: Any) -> None:
            await sftp.makedirs(posixpath.dirname(target), exist_ok=True)
            await _gone(sftp, target)
            if not await _linked(sftp, source, target):
                raise OSError(f"{posixpath.basename(target)} was written by another process meanwhile")

        await self._asked(copied)

    async def below(self, path: str) -> dict[str, Found]:
        try:
            entries = await self.fs._ls(path, detail=True)
        except FileNotFoundError:
            return {}
        found: dict[str, Found] = {}
        for entry in entries:
            name = f"{path}/{posixpath.basename(str(entry['name']).rstrip('/'))}"
            if entry["type"] == "directory":
                found |= await self.below(name)
            else:
                changed = entry["mtime"]
                seconds = changed.timestamp() if isinstance(changed, datetime) else float(changed)
                found[name] = Found(int(entry["size"]), seconds)
        return found

    async def remove(self, paths: list[str]) -> None:
        async def removed(sftp: Any) -> None:
            for start in range(0, len(paths), AT_ONCE):
                await asyncio.gather(*(_gone(sftp, path) for path in paths[start : start + AT_ONCE]))

        await self._asked(removed)

    async def remove_folder(self, path: str) -> None:
        async def removed(sftp: Any) -> None:
            with suppress(FileNotFoundError):
                await sftp.rmtree(path, ignore_errors=True)

        await self._asked(removed)

    async def _asked(self, work: Callable[[Any], Any]) -> Any:
        from sshfs.utils import wrap_exceptions

        async def asked() -> Any:
            async with self.fs._pool.get() as sftp:
                return await work(sftp)

        return await wrap_exceptions(asked)()


async def _written(file: Any, data: memoryview, pace: Pace) -> None:
    """Writes `data` in pieces, several of them at a time."""

    async def piece(at: int) -> None:
        part = bytes(data[at : at + PIECE_BYTES])
        await file.write(part, at)
        pace.came(len(part))

    step = PIECES * PIECE_BYTES
    for start in range(0, len(data), step):
        await asyncio.gather(*(piece(at) for at in range(start, min(start + step, len(data)), PIECE_BYTES)))


async def _linked(sftp: Any, source: str, target: str) -> bool:
    """Makes `target` a hard link to `source`; False if there is a file. SFTP does not tell why a link failed."""
    from asyncssh import SFTPError

    try:
        await sftp.link(source, target)
    except SFTPError:
        if not await sftp.lexists(target):
            raise
        return False
    return True


async def _gone(sftp: Any, path: str) -> None:
    from asyncssh import SFTPNoSuchFile

    with suppress(SFTPNoSuchFile):
        await sftp.remove(path)
