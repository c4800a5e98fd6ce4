"""Writes a cache one whole shard at a time, then publishes it by one rename.

    with Staging(target) as staging:
        writer = CacheWriter(staging, spec, rows, token)
        for shard in writer.pending:
            writer.write(shard, [maps_of_expert_0, ...])
        writer.commit(statistics, card)

Each finished shard is recorded in a journal with its size and sha256. After a kill, shards that still match the
journal are kept, everything else is deleted, and `pending` lists the shards to write. An unfinished cache is resumed
only if the `token` is unchanged: it holds everything besides the spec that determines the bytes.
"""

import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.format.codecs import zarr_codecs
from h2t.cache.format.rows import groups_of, write_table
from h2t.cache.format.spec import (
    CARD,
    FORMAT,
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
from h2t.cache.machine import flush
from h2t.cache.write.encoding import encoded
from h2t.cache.write.parts import TOKEN, PartWriter, finished, other_settings, token_bytes, token_folder
from h2t.cache.write.staging import Staging, bad_disk_is_one_line, durable_file, file_sha256, sync, write_durably


def committed(target: Path) -> CacheSpec | None:
    """The spec of the cache committed at `target`; None if `target` does not exist or is an empty directory.

    Raises CacheError `exists` for anything else, which must never be replaced; also what `parse_record` raises.
    """
    record = target / RECORD
    if record.is_file():
        with record.open("rb") as file:
            return parse_record(file.read(MAX_RECORD_BYTES + 1)).spec  # a longer record is cut here and does not parse
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CacheError("exists", f"{target}: exists and is not a cache; remove it or choose another path")
    return None


def check_rows(spec: CacheSpec, rows: "pa.Table | Rows") -> None:
    """Raises CacheError `mismatch` if `rows` and `spec` differ in length, `spec` if the record would be too long."""
    if len(rows) != spec.rows:
        raise CacheError("mismatch", f"row table: must have {spec.rows} rows, like the cache; got {len(rows)}")
    shards = (spec.shard_file(e, s) for e in range(spec.experts) for s in range(spec.shards))
    spec.record(dict.fromkeys(shards, (0, sha256(b""))))  # fails now, not at commit, if there are too many shards


def _dimension_names(spec: CacheSpec, expert: int) -> tuple[str, ...]:
    """`row, channel, y, x`. An axis whose size differs between experts gets the expert's number (format rule 4.5)."""
    sizes = zip(*spec.maps, strict=True)
    axes = [
        axis if len(set(size)) == 1 else f"{axis}_{expert}"
        for axis, size in zip(("channel", "y", "x"), sizes, strict=True)
    ]
    return ("row", *axes)


def create_group(store: Any, spec: CacheSpec) -> None:
    """Creates the Zarr group of `spec` and its arrays in `store`: metadata only, no shards."""
    import zarr

    with warnings.catch_warnings():
        # Zarr warns about codecs that only Python reads; this project lists them in `cache.format.codecs.PYTHON_ONLY`.
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        attributes = {"h2t_cache_format": FORMAT, "dtype": spec.dtype}
        group = zarr.create_group(store, zarr_format=3, attributes=attributes)
        for expert, shape in enumerate(spec.maps):
            group.create_array(
                f"expert_{expert}",
                shape=(spec.rows, *shape),
                dtype=spec.stored_dtype,
                chunks=(spec.chunk_rows, *shape),
                shards={"shape": (spec.shard_rows, *shape), "index_location": "start"},
                fill_value=0,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=_dimension_names(spec, expert),
                **zarr_codecs(spec.codec, spec.stored_dtype.itemsize),
            )


class Rows(Protocol):
    """A row table that is made in pieces, so that it need not fit into memory."""

    def __len__(self) -> int: ...

    def groups(self) -> Iterator[pa.Table]:
        """The table in pieces of `cache.format.rows.GROUP_ROWS` rows."""
        ...


def row_groups(rows: pa.Table | Rows) -> Iterable[pa.Table]:
    """The row table in the pieces in which it is written."""
    return groups_of(rows) if isinstance(rows, pa.Table) else rows.groups()


class CacheWriter:
    """Writes one cache into its staging directory. Several threads may call `write`, once per shard.

    `rows` is the row table (`cache.format.rows`), which `commit` writes, `token` a JSON object (see above). Finished
    shards of an earlier attempt and of parts are read and compared with their sha256; without `read`, only their sizes
    are compared, which suits shards whose writers have compared them. Raises CacheError `mismatch` if `rows` and `spec`
    differ in the number of rows or parts were written with another token, `spec` if the commit record would be too
    long.
    """

    def __init__(
        self, staging: Staging, spec: CacheSpec, rows: pa.Table | Rows, token: Mapping[str, Any], *, read: bool = True
    ) -> None:
        check_rows(spec, rows)
        self.spec = spec
        self._staging = staging
        self._rows = rows
        self._lock = threading.Lock()
        self._journal = staging.root / "journal"
        self._parts = staging.root / token_folder(spec, token)
        self._resume(token, read=read)

    def beside(self) -> PartWriter:
        """A writer for other processes, here or on other machines; `take_over` then adds the shards that they wrote."""
        return PartWriter(self._parts, self.spec)

    @property
    def pending(self) -> list[int]:
        """Numbers of the shards not yet written, ascending."""
        return [s for s in range(self.spec.shards) if s not in self._done]

    def write(self, shard: int, maps: Sequence[np.ndarray]) -> None:
        """Writes `shard` of every expert and records it in the journal.

        `maps` holds one array per expert, (rows of the shard, C, H, W), in the spec's dtype (bfloat16 as uint16 bits).
        Raises CacheError: `out-of-range`, `mismatch`, `full`, `unwritable`. Shards written before are kept.
        """
        self.put(shard, encoded(self.spec, shard, maps))

    def put(self, shard: int, contents: Iterable[bytes | memoryview]) -> None:
        """Writes `shard`, given as its bytes for each expert (`cache.format.shard`), and records it in the journal."""
        files = {}
        for expert, data in enumerate(contents):
            name = self.spec.shard_file(expert, shard)
            write_durably(self._staging.cache / name, data)
            files[name] = (len(data), sha256(data))
        with self._lock, bad_disk_is_one_line(self._journal), self._journal.open("ab") as journal:
            journal.write(_journal_line(shard, files))
            journal.flush()
            flush(journal.fileno())
            self._done[shard] = files

    def commit(self, statistics: bytes, card: bytes, *, replace: bool = False) -> None:
        """Adds the row table, batch-norm statistics, card and commit record, then publishes the cache.

        `statistics` is a safetensors file, `card` a UTF-8 Markdown file. Raises CacheError: `incomplete` if shards are
        pending, `exists` if the target exists (see `Staging.publish`), `full`, `unwritable`.
        """
        if self.pending:
            raise CacheError(
                "incomplete",
                f"commit: every shard must be written first; {len(self.pending)} of {self.spec.shards} missing",
            )
        import zarr

        root = self._staging.cache
        with bad_disk_is_one_line(root), warnings.catch_warnings():
            # Zarr warns that consolidated metadata is an extension; format 1 has it so that xarray opens faster.
            warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
            zarr.consolidate_metadata(str(root / MAPS), zarr_format=3)
        with durable_file(root / ROWS) as file:
            write_table(row_groups(self._rows), file)
        for name, data in ((STATISTICS, statistics), (CARD, card)):
            write_durably(root / name, data)
        files = {name: entry for done in self._done.values() for name, entry in done.items()}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and name not in files and name != RECORD:
                sync(path)  # zarr-python does not sync its files
                files[name] = (path.stat().st_size, file_sha256(path))
        write_durably(root / RECORD, self.spec.record(files))
        for directory in [root, *(p for p in root.rglob("*") if p.is_dir())]:
            sync(directory)
        self._staging.publish(replace=replace)

    def _resume(self, token: Mapping[str, Any], *, read: bool) -> None:
        """Keeps intact shards of an earlier attempt and of parts with the same token; deletes everything else.

        Raises CacheError `mismatch` if parts have written shards with another token.
        """
        staging = self._staging
        ours, have = token_bytes(self.spec, token), staging.kept(TOKEN)
        self._done: dict[int, dict[str, Any]] = {}
        if have != ours or not (staging.cache / MAPS / "zarr.json").is_file():
            if have is not None and have != ours and staging.labels():
                raise other_settings(staging, have, ours)
            staging.discard_cache(but=self._parts if have == ours else None)
            staging.keep(TOKEN, ours)
        else:
            self._done = {shard: files for shard, files in self._journalled() if self._intact(files, read=read)}
            keep = {name for files in self._done.values() for name in files}
            for path in [p for p in staging.cache.rglob("*") if p.is_file()]:
                if path.relative_to(staging.cache).as_posix() not in keep:
                    path.unlink()
        for path in self._parts.glob("*.partial"):
            path.unlink(missing_ok=True)
        self._create_arrays()
        self.take_over(read=read)

    def take_over(self, *, read: bool) -> None:
        """Adds the pending shards that parts or workers have finished (`cache.write.parts`).

        `read` compares their bytes with their sha256; otherwise only their sizes are compared.
        """
        for shard, files in finished(self._parts, self.spec, set(self.pending), read=read):
            for name, (path, _, _) in files.items():
                # Linked, not moved: a kill before the journal is written loses nothing.
                with bad_disk_is_one_line(path):
                    (self._staging.cache / name).unlink(missing_ok=True)
                    os.link(path, self._staging.cache / name)
            self._done[shard] = {name: (size, digest) for name, (_, size, digest) in files.items()}
        for expert in range(self.spec.experts):
            sync((self._staging.cache / self.spec.shard_file(expert, 0)).parent)
        write_durably(self._journal, b"".join(_journal_line(*done) for done in sorted(self._done.items())))

    def _journalled(self) -> list[tuple[int, dict[str, Any]]]:
        entries = []
        if self._journal.is_file():
            for line in self._journal.read_bytes().splitlines():
                check, _, body = line.partition(b" ")
                if check == sha256(body)[:16].encode():  # skips an incomplete last line
                    entry = json.loads(body)
                    entries.append((entry["shard"], {k: tuple(v) for k, v in entry["files"].items()}))
        return entries

    def _intact(self, files: Mapping[str, Sequence[Any]], *, read: bool) -> bool:
        for name, (size, digest) in files.items():
            path = self._staging.cache / name
            if not path.is_file() or path.stat().st_size != size or (read and file_sha256(path) != digest):
                return False
        return True

    def _create_arrays(self) -> None:
        maps = self._staging.cache / MAPS
        with bad_disk_is_one_line(maps):
            for array in [maps, *(maps / f"expert_{expert}" for expert in range(self.spec.experts))]:
                array.mkdir(parents=True, exist_ok=True)
                (array / "zarr.json").unlink(missing_ok=True)
            create_group(str(maps), self.spec)


def _journal_line(shard: int, files: Mapping[str, Sequence[Any]]) -> bytes:
    """A finished shard as a line of the journal, after 16 hexadecimal digits of the line's sha256."""
    line = canonical_json({"shard": shard, "files": files})
    return sha256(line)[:16].encode() + b" " + line + b"\n"
