"""Where a cache is written: a directory or a URL. What both have in common, so that stages need not tell them apart."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import CacheSpec
from h2t.cache.redaction import redacted
from h2t.cache.write import parts, remote
from h2t.cache.write.parts import Part, PartWriter
from h2t.cache.write.remote import RemoteCacheWriter, RemoteStaging, RemoteWriter
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter, Rows, committed

AnyStaging = Staging | RemoteStaging
Whole = CacheWriter | RemoteCacheWriter
OfPart = PartWriter | RemoteWriter


class Target(Protocol):
    """The place of a cache; `str()` of it names it in messages. Methods raise CacheError."""

    def staging(self, *, shared: bool = False) -> Any:
        """The staging folder: see `Staging`."""

    def committed(self) -> CacheSpec | None:
        """The spec of the cache that is there; None if there is none. Raises `exists` for anything else."""

    def free(self) -> int | None:
        """Free bytes; None if they cannot be known. The folder must exist."""

    def writer(
        self, staging: Any, spec: CacheSpec, rows: pa.Table | Rows, token: Mapping[str, Any], *, read: bool = True
    ) -> Whole:
        """The writer of the whole cache: see `CacheWriter`."""

    def part(self, staging: Any, spec: CacheSpec, token: Mapping[str, Any], part: Part) -> tuple[OfPart, list[int]]:
        """(writer of `part`, the shards it has to write): see `cache.write.parts.opened`."""


class Directory:
    """A directory on a file system of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def staging(self, *, shared: bool = False) -> Staging:
        return Staging(self._path, shared=shared)

    def committed(self) -> CacheSpec | None:
        return committed(self._path)

    def free(self) -> int:
        return shutil.disk_usage(self._path.parent).free

    def writer(
        self, staging: Staging, spec: CacheSpec, rows: pa.Table | Rows, token: Mapping[str, Any], *, read: bool = True
    ) -> CacheWriter:
        return CacheWriter(staging, spec, rows, token, read=read)

    def part(
        self, staging: Staging, spec: CacheSpec, token: Mapping[str, Any], part: Part
    ) -> tuple[PartWriter, list[int]]:
        return parts.opened(staging, spec, token, part)


class Url:
    """A URL: `s3://bucket/path` or `ssh://user@host:port/path`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._staging = RemoteStaging(url)

    def __str__(self) -> str:
        return redacted(self._url)

    def staging(self, *, shared: bool = False) -> RemoteStaging:
        return RemoteStaging(self._url, shared=shared)

    def committed(self) -> CacheSpec | None:
        return self._staging.committed()

    def free(self) -> None:
        return None

    def writer(
        self,
        staging: RemoteStaging,
        spec: CacheSpec,
        rows: pa.Table | Rows,
        token: Mapping[str, Any],
        *,
        read: bool = True,
    ) -> RemoteCacheWriter:
        return RemoteCacheWriter(staging, spec, rows, token)

    def part(
        self, staging: RemoteStaging, spec: CacheSpec, token: Mapping[str, Any], part: Part
    ) -> tuple[RemoteWriter, list[int]]:
        return remote.opened(staging, spec, token, part)


def target_at(location: str | Path) -> Target:
    """The target at a path or URL. Raises CacheError `unwritable` for a URL to which caches cannot be written."""
    if "://" not in str(location):
        return Directory(Path(location))
    try:
        return Url(str(location))
    except ValueError as error:
        raise CacheError("unwritable", f"{location}: {error}; choose another place") from None
