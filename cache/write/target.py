"""Where a cache is written: a directory or a URL. What both have in common, so that stages need not tell them apart."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import CacheSpec
from h2t.cache.redaction import redacted
from h2t.cache.write import parts, remote
from h2t.cache.write.parts import Part, PartWriter
from h2t.cache.write.remote import RemoteCacheWriter, RemoteStaging, RemoteWriter
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter, committed

AnyStaging = Staging | RemoteStaging
Whole = CacheWriter | RemoteCacheWriter
OfPart = PartWriter | RemoteWriter


@dataclass(frozen=True)
class Target:
    """The place of a cache; `str()` of it names it in messages. Its functions raise CacheError.

    `staging(shared=False)`: the staging folder, see `Staging`. `committed()`: the spec of the cache that is there, or
    None; raises `exists` for anything else. `free()`: free bytes beside the cache, whose folder must exist; None if
    they cannot be known. `writer(staging, spec, rows, token, read=True)`: see `CacheWriter`. `part(staging, spec,
    token, part)`: (its writer, the shards it has to write), see `cache.write.parts.opened`.
    """

    name: str
    staging: Callable[..., Any]
    committed: Callable[[], CacheSpec | None]
    free: Callable[[], int | None]
    writer: Callable[..., Whole]
    part: Callable[..., tuple[OfPart, list[int]]]

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def held(self, part: Part | None) -> Iterator[Any]:
        """The staging folder, held alone or, for a `part`, beside processes that write others."""
        with self.staging(shared=part is not None) as staging, staging.holding(part.label) if part else nullcontext():
            yield staging

    def opened(
        self, staging: Any, spec: CacheSpec, rows: Any, token: Mapping[str, Any], part: Part | None, *, commit: bool
    ) -> tuple[Whole | OfPart, list[int]]:
        """(writer, the shards it has to write), of the `part` or of the whole cache.

        With `commit`, parts have written them: raises CacheError `incomplete` if one is missing.
        """
        if part is not None:
            return self.part(staging, spec, token, part)
        whole = self.writer(staging, spec, rows, token, read=not commit)  # parts have read theirs
        pending = whole.pending
        if commit and pending:
            raise parts.missing(staging, spec, pending)
        return whole, pending


def target_at(location: str | Path) -> Target:
    """The target at a path, or at a URL `s3://bucket/path` or `ssh://user@host:port/path`.

    Raises CacheError `unwritable` for a URL to which caches cannot be written.
    """
    if "://" not in str(location):
        path = Path(location)

        def free() -> int:
            return shutil.disk_usage(path.parent).free

        return Target(str(path), partial(Staging, path), partial(committed, path), free, CacheWriter, parts.opened)
    url = str(location)
    try:
        there = RemoteStaging(url).committed
    except ValueError as error:
        raise CacheError("unwritable", f"{location}: {error}; choose another place") from None
    return Target(redacted(url), partial(RemoteStaging, url), there, lambda: None, RemoteCacheWriter, remote.opened)
