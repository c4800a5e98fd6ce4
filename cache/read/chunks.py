"""The chunks of an open cache: where each lies, how it is decoded, and the errors of damaged ones."""

from collections.abc import Callable, Collection
from typing import TypeVar

import numpy as np

from h2t.cache.errors import CacheError, numbered
from h2t.cache.format import shard as shard_layout
from h2t.cache.format.codecs import codec
from h2t.cache.format.spec import RECORD, CacheSpec, Commit, sha256
from h2t.cache.read.store import FileStore
from h2t.cache.read.stored_file import sha256_of

T = TypeVar("T")


class Chunks:
    """The shard indices of the cache in `files`, each read once, when it is first needed.

    `unchecked`: shards whose size is still to be checked, when their index is read.
    """

    def __init__(self, files: FileStore, commit: Commit, unchecked: Collection[str]) -> None:
        self.files, self.commit, self.unchecked = files, commit, set(unchecked)
        self.spec: CacheSpec = commit.spec
        self.codec = codec(self.spec.codec)
        chunks = -(-self.spec.rows // self.spec.chunk_rows)
        try:
            self._indexed = np.zeros((self.spec.experts, self.spec.shards), bool)
            self.offsets = np.zeros((self.spec.experts, chunks), np.int64)
            self.sizes = np.zeros((self.spec.experts, chunks), np.int64)
        except (MemoryError, ValueError):  # a hostile record, on a store whose sizes could not be checked against it
            raise CacheError(
                "full", f"{files}: not enough memory for the index of {chunks} chunks; check where this cache is from"
            ) from None

    def ranges(self, chunks: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, offset and stored size in bytes of each of `chunks`, int64 (n,), whose shard indices were read."""
        shards = chunks // self.spec.chunks_per_shard
        return shards, self.offsets[expert, chunks], self.sizes[expert, chunks]

    def without_index(self, chunks: np.ndarray, expert: int) -> list[int]:
        """The shards of `chunks`, int64 (n,), whose index was not read yet."""
        shards = chunks // self.spec.chunks_per_shard
        found: list[int] = np.unique(shards[~self._indexed[expert, shards]]).tolist()
        return found

    def fault(self, expert: int, chunk: int, what: str) -> CacheError:
        """The error for a damaged chunk; names its file, its number within the shard, and its rows."""
        shard, within = divmod(chunk, self.spec.chunks_per_shard)
        first = chunk * self.spec.chunk_rows
        last = min(first + self.spec.chunk_rows, self.spec.rows) - 1
        name = self.spec.shard_file(expert, shard)
        rows = numbered("row", first, last)
        return CacheError("damaged", f"{self.files}/{name}: chunk {within} ({rows}): {what}; run h2t cache verify")

    def once_more(self, name: str, job: Callable[[], T]) -> T:
        """The result of `job`, which reads the file `name`; behind a URL, damaged bytes are fetched a second time."""
        try:
            return job()
        except CacheError as error:
            if error.reason != "damaged" or self.files.local:
                raise
        self.files.forget(name)
        return job()

    def whole_file(self, name: str) -> bytes:
        """The bytes of `name`, checked against the commit record. Raises CacheError `damaged`, and as `Cache.read`."""
        size, digest = self._recorded(name)

        def whole() -> bytes:
            data = self.files.read_all(name, size)
            self._same(name, sha256(data), digest)
            return data

        return self.once_more(name, whole)

    def check_file(self, name: str) -> None:
        """Compares the bytes of `name` with the commit record, a piece at a time. Raises as `whole_file`."""
        size, digest = self._recorded(name)
        self.once_more(name, lambda: self._same(name, sha256_of(self.files, name, size), digest))

    def _recorded(self, name: str) -> tuple[int, str]:
        if name not in self.commit.files:
            raise CacheError("damaged", f"{self.files}/{name}: is not named in {RECORD}; run h2t cache verify")
        return self.commit.files[name]

    def _same(self, name: str, digest: str, recorded: str) -> None:
        if digest != recorded:
            raise CacheError("damaged", f"{self.files}/{name}: sha256 differs from {RECORD}; run h2t cache verify")

    def read_index(self, expert: int, shard: int) -> None:
        """Reads the index of a shard. Raises CacheError."""
        spec = self.spec
        name, rows, slots = spec.shard_file(expert, shard), spec.shard_range(shard), spec.chunks_per_shard
        first = shard * slots
        used = -(-len(rows) // spec.chunk_rows)
        if name in self.unchecked:
            check_size(self.files, self.commit, name, self.files.size(name))
            self.unchecked.discard(name)

        def parsed() -> tuple[np.ndarray, np.ndarray]:
            data = self.files.read_ranges(name, [(0, shard_layout.index_bytes(slots))])[0]
            shard_bytes, _ = self.commit.files[name]
            try:
                return shard_layout.parse_index(data, slots, used, shard_bytes, spec.chunk_bytes(expert))
            except CacheError as error:
                held = numbered("row", rows.start, rows.stop - 1)
                says = f"{self.files}/{name}: {error.detail} ({held}); run h2t cache verify"
                raise CacheError(error.reason, says) from None

        self.offsets[expert, first : first + used], self.sizes[expert, first : first + used] = self.once_more(
            name, parsed
        )
        self._indexed[expert, shard] = True


def check_size(files: FileStore, commit: Commit, name: str, size: int) -> None:
    """Raises CacheError `damaged` unless `size` is the recorded size of `name`."""
    expected = commit.files[name][0]
    if size != expected:
        raise CacheError("damaged", f"{files}/{name}: {size} bytes, {RECORD} says {expected}; run h2t cache verify")
