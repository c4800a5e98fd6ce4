"""Writes a cache below a URL, where there is no rename of folders and no lock (docs/cache-format.md, section 9).

    with RemoteStaging("s3://bucket/caches/b") as staging:
        writer = RemoteCacheWriter(staging, spec, rows, token)
        for shard in writer.pending:
            writer.write(shard, [maps_of_expert_0, ...])
        writer.commit(statistics, card)

Shards go to `.b.staging/parts.T/` and are named after their content, as those of several writers in a directory
(`cache.write.parts`). The commit copies them to their final names on the server and puts `cache.json` last, so readers
see no cache or all of it.
"""

import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.format.rows import write_table
from h2t.cache.format.spec import (
    CARD,
    MAPS,
    MAX_RECORD_BYTES,
    RECORD,
    ROWS,
    STATISTICS,
    CacheSpec,
    canonical_json,
    parse_record,
    sha256,
)
from h2t.cache.write.encoding import encoded
from h2t.cache.write.lease import Lease, busy, live
from h2t.cache.write.objects import PROTOCOLS, Found, Objects
from h2t.cache.write.parts import TOKEN, Part, claim_token, missing, named, other_settings, token_bytes, token_folder
from h2t.cache.write.writer import Rows, check_rows, create_group, row_groups

CHOSEN = "chosen.json"  # in staging: the files that a commit has chosen, so that another one copies the same
_SHARD_OR_METADATA = rf"{re.escape(MAPS)}/(expert_\d+/)?(zarr\.json|c\.\d+\.0\.0\.0)"
_FILE = "|".join([_SHARD_OR_METADATA, *map(re.escape, (RECORD, ROWS, STATISTICS, CARD))])
_OF_A_CACHE = re.compile(rf"(?:{_FILE})(\.[0-9a-f]{{32}}\.partial)?")  # partial: of an SFTP writer that was killed
_PART = re.compile(r"part-\d+-of-\d+")
_NO_LOCK = (".clock", ".partial")  # ends of names that begin like those of locks

#: Files of the cache -> (object, bytes, sha256); of one shard, unless something else is said.
Shard = dict[str, tuple[str, int, str]]


class RemoteStaging:
    """The staging folder `.NAME.staging` beside the cache NAME at the URL `target`; holds its lock as `Staging` does.

    With `shared`, processes that each write a part work beside each other; each then holds the lock of its part. Raises
    CacheError `busy` if another process is writing the cache, and what `Objects` raises.
    """

    def __init__(self, target: str, *, shared: bool = False) -> None:
        scheme, _, place = target.rstrip("/").partition("://")
        if scheme in PROTOCOLS and ("/" not in place or set(place) & set("?#")):
            raise ValueError("must be s3://bucket/NAME or ssh://host/path/NAME, without ? and #")
        parent, _, self.name = target.rstrip("/").rpartition("/")
        self.shared = shared
        self.objects = Objects(parent)
        self._folder = f".{self.name}.staging"
        self._leases: list[Lease] = []

    @property
    def root(self) -> str:
        """The URL of the staging folder, for messages."""
        return f"{self.objects}/{self._folder}"

    @property
    def target(self) -> str:
        """The URL of the cache, for messages."""
        return f"{self.objects}/{self.name}"

    def __enter__(self) -> "RemoteStaging":
        if not self.shared:
            self._take("lock", "cache")
            try:
                self._refuse_others("lock.part-")
            except BaseException:
                self._leases.pop().release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._leases:
            self._leases.pop().release()

    @contextmanager
    def holding(self, label: str) -> Iterator[None]:
        """Holds the lock of the part `label` for the block. Raises CacheError `busy` if another process does."""
        self._take(f"lock.{label}", "part")
        try:
            self._refuse_others("lock", whole=True)
            self.keep(label, b"")  # the latest one tells in how many parts the cache is written
            yield
        finally:
            self._leases.pop().release()

    def _take(self, name: str, what: str) -> None:
        lease = Lease(self.objects, f"{self._folder}/{name}", what)
        lease.take()
        self._leases.append(lease)

    def _refuse_others(self, prefix: str, *, whole: bool = False) -> None:
        """Raises CacheError `busy` if a lock with this prefix, or of this name, is held."""
        for name in self.objects.below(self._folder):
            if (name == prefix or (not whole and name.startswith(prefix))) and not name.endswith(_NO_LOCK):
                path = f"{self._folder}/{name}"
                if (have := self.objects.get(path)) is not None and live(self.objects, path, have):
                    raise busy(self.objects, path, have, "cache")

    def check(self) -> None:
        """Raises CacheError `busy` if another process has taken the lock meanwhile."""
        for lease in self._leases:
            lease.check()

    def labels(self) -> list[str]:
        """The parts that have been begun, the latest one first."""
        found = {n: f.modified for n, f in self.objects.below(self._folder).items() if _PART.fullmatch(n)}
        return sorted(found, key=lambda name: found[name], reverse=True)

    def claim(self, name: str, data: bytes) -> bytes:
        """Stores `data` under `name` unless another process has stored something there; returns what is stored."""
        return self.objects.claim(f"{self._folder}/{name}", data)

    def keep(self, name: str, data: bytes) -> None:
        """Stores `data` under `name` for later attempts."""
        self.objects.put(f"{self._folder}/{name}", data)

    def kept(self, name: str) -> bytes | None:
        """The data that an earlier attempt stored under `name`, or None."""
        return self.objects.get(f"{self._folder}/{name}")

    def drop(self, name: str) -> None:
        """Removes what is stored under `name`, if anything is."""
        self.objects.remove([f"{self._folder}/{name}"])

    def folder_of(self, spec: CacheSpec, token: Mapping[str, Any]) -> str:
        """The folder of the finished shards of this token, relative to `objects`."""
        return f"{self._folder}/{token_folder(spec, token)}"

    def discard_parts(self, but: str) -> None:
        """Deletes finished shards, except those in the folder `but`, and what a commit has chosen."""
        remains = [f"{self._folder}/{name}" for name in self.objects.below(self._folder)]
        shards = [n for n in remains if n.startswith(f"{self._folder}/parts.") and not n.startswith(f"{but}/")]
        self.objects.remove([*shards, f"{self._folder}/{CHOSEN}"])

    def discard(self) -> None:
        """Removes the staging folder with everything in it."""
        for lease in self._leases:
            lease.leave()
        self.objects.discard(self._folder)

    def discard_if_alone(self) -> None:
        """Removes the staging folder unless another process works there too."""
        locks = [n for n in self.objects.below(self._folder) if n.startswith("lock") and not n.endswith(_NO_LOCK)]
        if len(locks) <= len(self._leases):
            self.discard()

    def clear_remains(self) -> None:
        """Removes what is left by a run that was killed right after its commit; skips a folder in use."""
        with suppress(CacheError):
            if self.objects.below(self._folder):
                with self:
                    self.discard()

    def committed(self) -> CacheSpec | None:
        """The spec of the cache at the target; None if there is none, or an unfinished commit of one.

        Raises CacheError `exists` if there is anything else; also what `parse_record` raises.
        """
        if (record := self.record()) is not None:
            return parse_record(record[: MAX_RECORD_BYTES + 1]).spec
        self._no_strangers(self.objects.below(self.name))
        return None

    def record(self) -> bytes | None:
        """The commit record at the target, if there is one."""
        return self.objects.get(f"{self.name}/{RECORD}")

    def _no_strangers(self, names: Iterable[str]) -> None:
        if strangers := sorted(name for name in names if not _OF_A_CACHE.fullmatch(name)):
            raise CacheError(
                "exists",
                f"{self.target}: holds {strangers[0]}, which is no part of a cache; choose another place or move it",
            )

    def publish(
        self, shards: Mapping[str, str], small: Mapping[str, bytes], record: bytes, *, replace: bool = False
    ) -> None:
        """Makes the cache of `record` appear: `shards` by copies (final name -> object), then `small`, then the record.

        If there is an earlier cache and `replace`, its record is removed first, so nobody takes a mixture for a cache.
        Raises CacheError `exists`.
        """
        self.check()
        there, end = self.objects.below(self.name), f"{self.name}/{RECORD}"
        have = self.record()
        if have != record:
            if have is not None and not replace:
                raise CacheError("exists", f"{self.target}: holds another cache; remove it or pass --replace")
            self._no_strangers(there)
            if have is not None:
                self.objects.remove([end])
            kept = {RECORD, *shards, *small}
            self.objects.remove([f"{self.name}/{name}" for name in there if name not in kept])
            try:
                self.objects.copy([(source, f"{self.name}/{name}") for name, source in sorted(shards.items())])
            except CacheError as error:
                # Another commit of the same shards may have ended and removed them.
                if error.reason != "missing" or self.record() != record:
                    raise
            else:
                for name, data in small.items():
                    self.objects.put(f"{self.name}/{name}", data)
                self.check()
                if self.objects.claim(end, record) != record:
                    raise CacheError(
                        "exists", f"{self.target}: another process has written another cache there meanwhile"
                    )
        self.discard()


@dataclass(frozen=True)
class RemoteWriter:
    """Writes shards of `spec` below `folder` of `objects`. It can be pickled; several threads may call `write`."""

    objects: Objects
    folder: str
    spec: CacheSpec

    def beside(self) -> "RemoteWriter":
        """A writer into the same folder for another process."""
        return self

    def write(self, shard: int, maps: Sequence[np.ndarray]) -> None:
        """Writes `shard`, given as one array per expert: see `CacheWriter.write`."""
        self.put(shard, encoded(self.spec, shard, maps))

    def put(self, shard: int, files: Iterable[bytes | memoryview]) -> None:
        """Writes `shard`, given as its bytes for each expert."""
        for expert, data in enumerate(files):
            self.objects.put(f"{self.folder}/{expert}.{shard}.{len(data)}.{sha256(data)}", data)

    def listed(self) -> dict[str, Found]:
        """The objects in the folder by name."""
        return self.objects.below(self.folder)

    def finished(self, listed: Mapping[str, Found]) -> dict[int, Shard]:
        """The finished shards among `listed`, by number.

        Sizes are compared, not bytes: puts are atomic, and S3 has checked each sha256. SFTP has no such check; there
        `h2t cache verify URL` finds damage.
        """
        found: dict[int, Shard] = {}
        for name in sorted(listed):
            if (of := named(name)) and of.size == listed[name].size and of.shard < self.spec.shards:
                file = self.spec.shard_file(of.expert, of.shard)
                found.setdefault(of.shard, {}).setdefault(file, (name, of.size, of.digest))
        return {shard: files for shard, files in found.items() if len(files) == self.spec.experts}


def opened(
    staging: RemoteStaging, spec: CacheSpec, token: Mapping[str, Any], part: Part
) -> tuple[RemoteWriter, list[int]]:
    """(writer of `part`, the shards it has to write): see `cache.write.parts.opened`."""
    claim_token(staging, spec, token)
    writer = RemoteWriter(staging.objects, staging.folder_of(spec, token), spec)
    done = writer.finished(writer.listed())
    return writer, [shard for shard in part.shards(spec) if shard not in done]


class RemoteShards:
    """All shards of a cache, written by this process and others: what `CacheWriter` does for them, at a URL.

    There is no journal, as the listing tells what is finished. Raises CacheError `mismatch` if parts were written with
    another token; what one process left with another token is deleted.
    """

    def __init__(self, staging: RemoteStaging, spec: CacheSpec, token: Mapping[str, Any]) -> None:
        self.spec = spec
        self._staging = staging
        self._writer = RemoteWriter(staging.objects, staging.folder_of(spec, token), spec)
        ours = token_bytes(spec, token)
        have = staging.claim(TOKEN, ours)
        if have != ours:
            if staging.labels():
                raise other_settings(staging, have, ours)
            staging.discard_parts(but=self._writer.folder)
            staging.keep(TOKEN, ours)
        self.take_over(read=False)

    def beside(self) -> RemoteWriter:
        """A writer for other processes, here or on other machines; `take_over` then adds the shards that they wrote."""
        return self._writer

    @property
    def pending(self) -> list[int]:
        """Numbers of the shards that were not finished at the last `take_over`, ascending."""
        return [shard for shard in range(self.spec.shards) if shard not in self._done]

    def write(self, shard: int, maps: Sequence[np.ndarray]) -> None:
        """Writes `shard` of every expert: see `CacheWriter.write`."""
        self._writer.write(shard, maps)

    def put(self, shard: int, contents: Iterable[bytes | memoryview]) -> None:
        """Writes `shard`, given as its bytes for each expert."""
        self._writer.put(shard, contents)

    def take_over(self, *, read: bool) -> None:
        """Counts the shards that are finished now, by this process and by others. `read` has no effect here."""
        self._listed = self._writer.listed()
        self._done = self._writer.finished(self._listed)

    def chosen(self) -> Shard:
        """One finished object for each shard file of the cache. Two commits at once choose the same ones.

        Raises CacheError `incomplete` if there is a shard without.
        """
        self.take_over(read=False)
        if self.pending:
            raise missing(self._staging, self.spec, self.pending)
        ours = canonical_json([source for files in self._done.values() for source, _, _ in files.values()])
        names = json.loads(self._staging.claim(CHOSEN, ours))
        done = self._writer.finished({name: self._listed[name] for name in names if name in self._listed})
        if len(done) < self.spec.shards:  # a choice of another attempt, whose objects were removed since
            self._staging.keep(CHOSEN, ours)
            done = self._done
        return {
            name: (f"{self._writer.folder}/{source}", size, digest)
            for files in done.values()
            for name, (source, size, digest) in files.items()
        }


class RemoteCacheWriter(RemoteShards):
    """Writes one cache to a URL: see `CacheWriter`."""

    def __init__(
        self,
        staging: RemoteStaging,
        spec: CacheSpec,
        rows: pa.Table | Rows,
        token: Mapping[str, Any],
        *,
        read: bool = True,  # has no effect here: see `RemoteWriter.finished`
    ) -> None:
        check_rows(spec, rows)
        self._rows = rows
        super().__init__(staging, spec, token)

    def commit(self, statistics: bytes, card: bytes, *, replace: bool = False) -> None:
        """Adds row table, statistics, card and commit record, and makes the cache appear: see `CacheWriter.commit`."""
        shards = self.chosen()
        table = io.BytesIO()
        write_table(row_groups(self._rows), table)
        small = {**metadata(self.spec), ROWS: table.getvalue(), STATISTICS: statistics, CARD: card}
        files = {name: (size, digest) for name, (_, size, digest) in shards.items()}
        files |= {name: (len(data), sha256(data)) for name, data in small.items()}
        sources = {name: source for name, (source, _, _) in shards.items()}
        self._staging.publish(sources, small, self.spec.record(files), replace=replace)


def metadata(spec: CacheSpec) -> dict[str, bytes]:
    """The Zarr metadata of a cache by file name, consolidated: the bytes that a cache in a directory has."""
    import zarr

    stored: dict[str, Any] = {}
    store = zarr.storage.MemoryStore(stored)
    create_group(store, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)  # see `CacheWriter.commit`
        zarr.consolidate_metadata(store, zarr_format=3)
    return {f"{MAPS}/{name}": buffer.to_bytes() for name, buffer in stored.items()}
