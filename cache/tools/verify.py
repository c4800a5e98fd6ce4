"""Verifies a cache: compares every file, index and chunk with the commit record."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from h2t.cache.errors import CacheError, numbered
from h2t.cache.format import shard as shard_layout
from h2t.cache.format.codecs import codec
from h2t.cache.format.rows import read_batches
from h2t.cache.format.spec import CARD, MAPS, MAX_RECORD_BYTES, RECORD, ROWS, STATISTICS, Commit, parse_record, sha256
from h2t.cache.machine import LITTER
from h2t.cache.read.elsewhere import check_fingerprint, elsewhere
from h2t.cache.read.files import files_at
from h2t.cache.read.gather import compiled
from h2t.cache.read.store import FileStore
from h2t.cache.read.stored_file import StoredFile, sha256_of
from h2t.cache.redaction import one_line
from h2t.cache.tools.row_order import KEYS, row_fault
from h2t.cache.write.parts import Part
from h2t.cache.write.writer import create_group

#: Shards checked in parallel; each is held in memory whole.
WORKERS = min(4, os.cpu_count() or 1)
SCRATCH_BYTES = 512 * 1024  # of chunks that are copied to be checked: they stay in the CPU's cache
WHOLE = Part(1, 1)
GROUP_KEYS = ("node_type", "zarr_format", "attributes")
ARRAY_KEYS = (
    *("node_type", "zarr_format", "shape", "data_type", "chunk_grid", "chunk_key_encoding"),
    *("fill_value", "codecs", "dimension_names"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `file` is a path relative to the cache; `chunks` and `rows` are (first, last), inclusive.

    Chunks are numbered within their shard, rows within the cache.
    """

    file: str
    what: str
    chunks: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = self.file
        if self.chunks and self.rows:
            text += f": {numbered('chunk', *self.chunks)} ({numbered('row', *self.rows)})"
        return one_line(f"{text}: {self.what}")


def verify(location: str | Path, *, quick: bool = False, part: Part = WHOLE) -> list[Fault]:
    """All faults of the cache at a path or URL; an empty list means that the cache is sound.

    Checks the bytes of every file against `cache.json`, the row table, the batch-norm statistics, the Zarr metadata,
    every shard index, and every chunk by decoding it; also looks for files that `cache.json` does not name, unless the
    store at a URL cannot list its files. `quick` does not read the maps: it checks sizes, `cache.json`, row table,
    metadata and shard indices. Of several parts, each checks its own shards, and the first also all that is not a
    shard: a cache is sound if no part finds a fault. Faults are returned, never raised.
    """
    opened: list[tuple[FileStore, Commit]] = []

    def record() -> list[Fault]:
        files = files_at(location)
        if not files.exists(RECORD):
            return [Fault(RECORD, f"missing, so {files} is not a finished cache")]
        commit = parse_record(files.read_all(RECORD, MAX_RECORD_BYTES))
        if there := elsewhere(location):
            check_fingerprint(files, commit.spec, there.fingerprint)
        opened.append((files, commit))
        return []

    faults = _guarded(RECORD, record)
    if faults:
        return faults
    files, commit = opened[0]
    try:
        faults = _run(_jobs(files, commit, quick, part))
        # If the cache was replaced meanwhile, these may be faults of neither the old nor the new one.
        return _guarded(RECORD, partial(_same_record, files)) or faults
    finally:
        files.close()


def _same_record(files: FileStore) -> list[Fault]:
    files.check_record()
    return []


def _run(jobs: Sequence[tuple[str, Callable[[], list[Fault]]]]) -> list[Fault]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return [fault for faults in pool.map(lambda job: _guarded(*job), jobs) for fault in faults]


def _guarded(name: str, job: Callable[[], list[Fault]]) -> list[Fault]:
    try:
        return job()
    except CacheError as error:
        return [Fault(name, error.detail.removeprefix(f"{name}: "))]
    except Exception as error:  # noqa: BLE001 - a damaged file can make Zarr, Arrow or a store raise anything
        return [Fault(name, f"cannot be read ({type(error).__name__}: {error})")]


def _jobs(files: FileStore, commit: Commit, quick: bool, part: Part) -> list[tuple[str, Callable[[], list[Fault]]]]:
    spec = commit.spec
    own = {spec.shard_file(e, s): (e, s) for e in range(spec.experts) for s in part.shards(spec)}
    listed = {name: size for name, size in files.listed_sizes(commit.files).items() if size is not None}
    jobs = _other_jobs(files, commit, quick, listed) if part.number == 1 else []
    return jobs + [(name, partial(_shard, files, commit, *place, quick, listed)) for name, place in own.items()]


def _other_jobs(
    files: FileStore, commit: Commit, quick: bool, listed: Mapping[str, int]
) -> list[tuple[str, Callable[[], list[Fault]]]]:
    """The checks of all that is not a shard."""
    spec = commit.spec
    shards = {spec.shard_file(e, s) for e in range(spec.experts) for s in range(spec.shards)}
    metadata = [f"{MAPS}/zarr.json", *(f"{MAPS}/expert_{e}/zarr.json" for e in range(spec.experts))]
    plain = [CARD, ROWS, STATISTICS, *metadata]
    jobs: list[tuple[str, Callable[[], list[Fault]]]] = [(RECORD, partial(_names, commit, {*plain, *shards}))]
    if not quick:
        jobs.append((RECORD, partial(_unnamed, files, commit)))
    jobs += [(name, partial(_file, files, commit, name, quick, listed)) for name in plain if name in commit.files]
    jobs.append((ROWS, partial(_row_table, files, commit)))
    jobs.append((f"{MAPS}/zarr.json", partial(_metadata, files, commit)))
    if not quick:
        jobs.append((STATISTICS, partial(_statistics, files, commit)))
    return jobs


def _names(commit: Commit, expected: set[str]) -> list[Fault]:
    faults = [Fault(name, f"not named in {RECORD}") for name in sorted(expected - set(commit.files))]
    return faults + [Fault(name, "not a file of format 1") for name in sorted(set(commit.files) - expected)]


def _unnamed(files: FileStore, commit: Commit) -> list[Fault]:
    named = {*commit.files, RECORD}
    unnamed = (name for name in files.names() - named if name.rpartition("/")[2] not in LITTER)
    return [Fault(name, f"not named in {RECORD}") for name in sorted(unnamed)]


def _size_fault(files: FileStore, commit: Commit, name: str, listed: Mapping[str, int]) -> str | None:
    """The fault in the size of `name`, or None; the store is asked for the size unless it is in `listed`."""
    if files.local and not files.exists(name):  # folders and named pipes count as missing, too
        return "file is missing"
    try:
        size = listed[name] if name in listed else files.size(name)
    except CacheError as error:
        return "file is missing" if error.reason == "missing" else error.detail
    expected = commit.files[name][0]
    return None if size == expected else f"{size} bytes, {RECORD} says {expected}"


def _file(files: FileStore, commit: Commit, name: str, quick: bool, listed: Mapping[str, int]) -> list[Fault]:
    what = _size_fault(files, commit, name, listed)
    if what is None and not quick and sha256_of(files, name, commit.files[name][0]) != commit.files[name][1]:
        what = f"sha256 differs from {RECORD}"
    return [Fault(name, what)] if what else []


def _row_table(files: FileStore, commit: Commit) -> list[Fault]:
    if ROWS not in commit.files or not files.exists(ROWS):
        return []
    rows, size = commit.spec.rows, commit.files[ROWS][0]
    what = row_fault(lambda: read_batches(StoredFile(files, ROWS, size), rows, KEYS), rows)
    return [Fault(ROWS, what)] if what else []


def _statistics(files: FileStore, commit: Commit) -> list[Fault]:
    """Checks the structure of the safetensors file: a header, then tensors that fill the rest without a gap."""
    if STATISTICS not in commit.files or not files.exists(STATISTICS):
        return []
    data = files.read_all(STATISTICS, commit.files[STATISTICS][0])
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    at = 0
    for start, stop in sorted(tuple(tensor["data_offsets"]) for tensor in header.values()):
        if start != at or stop < start:
            return [Fault(STATISTICS, "tensors leave a gap or overlap")]
        at = stop
    if len(data) != 8 + length + at:
        return [Fault(STATISTICS, f"{8 + length + at} bytes expected by its header; got {len(data)}")]
    return []


def _metadata(files: FileStore, commit: Commit) -> list[Fault]:
    """Compares the Zarr metadata with the metadata that follows from the commit record."""
    from zarr.storage import MemoryStore

    store: dict[str, Any] = {}
    create_group(MemoryStore(store), commit.spec)
    faults = []
    names = ["zarr.json", *(f"expert_{e}/zarr.json" for e in range(commit.spec.experts))]
    expected = {name: json.loads(store[name].to_bytes()) for name in names}
    stored: dict[str, Any] = {}
    for name in names:
        if f"{MAPS}/{name}" not in commit.files or not files.exists(f"{MAPS}/{name}"):
            continue  # another check reports it as missing
        try:
            stored[name] = json.loads(files.read_all(f"{MAPS}/{name}", commit.files[f"{MAPS}/{name}"][0]))
            keys = GROUP_KEYS if name == "zarr.json" else ARRAY_KEYS
            faults += _differences(f"{MAPS}/{name}", stored[name], expected[name], keys)
        except (ValueError, TypeError, AttributeError) as error:
            faults.append(Fault(f"{MAPS}/{name}", f"not Zarr metadata ({error})"))
    if isinstance(stored.get("zarr.json"), dict):
        try:
            arrays = stored["zarr.json"]["consolidated_metadata"]["metadata"]
            for name in names[1:]:
                faults += _differences(f"{MAPS}/zarr.json", arrays[name.split("/")[0]], expected[name], ARRAY_KEYS)
        except (KeyError, TypeError, AttributeError):
            faults.append(Fault(f"{MAPS}/zarr.json", "must have consolidated metadata of every expert"))
    return faults


def _differences(file: str, stored: Any, expected: Any, keys: Iterable[str]) -> list[Fault]:
    wrong = [key for key in keys if stored.get(key) != expected[key]]
    return [Fault(file, f"{key} is {stored.get(key)!r}; {RECORD} asks for {expected[key]!r}") for key in wrong]


def _shard(
    files: FileStore, commit: Commit, expert: int, shard: int, quick: bool, listed: Mapping[str, int]
) -> list[Fault]:
    spec = commit.spec
    name, rows, slots = spec.shard_file(expert, shard), spec.shard_range(shard), spec.chunks_per_shard
    used = -(-len(rows) // spec.chunk_rows)
    size, digest = commit.files[name]

    def fault(what: str, first: int = 0, last: int = used - 1) -> Fault:
        last_row = min(rows.start + (last + 1) * spec.chunk_rows, rows.stop) - 1
        return Fault(name, what, (first, last), (rows.start + first * spec.chunk_rows, last_row))

    wrong_size = _size_fault(files, commit, name, listed)
    if wrong_size and (quick or wrong_size == "file is missing"):
        return [fault(wrong_size)]
    length = shard_layout.index_bytes(slots)
    try:
        data = files.read_ranges(name, [(0, length)])[0] if quick else files.read_all(name, size)
    except CacheError as error:
        return [fault(wrong_size or error.detail)]  # a file longer than recorded is never read
    try:
        offsets, sizes = shard_layout.parse_index(data[:length], slots, used, size, spec.chunk_bytes(expert))
    except CacheError as error:
        return [fault(error.detail)]
    if quick:
        return []
    if spec.codec == "none" and len(data) == size and _plain_chunks_hold(data, offsets, spec.chunk_bytes(expert)):
        return [fault(f"sha256 differs from {RECORD}")] if sha256(data) != digest else []
    decode = codec(spec.codec).decode
    chunk = np.empty((spec.chunk_rows, *spec.maps[expert]), spec.stored_dtype)
    view = memoryview(data)
    bad: list[tuple[int, str]] = []
    for i, (start, stop) in enumerate(zip(offsets.tolist(), (offsets + sizes).tolist(), strict=True)):
        if stop > len(data):
            bad.append((i, f"the file ends before it ({len(data)} bytes, {RECORD} says {size})"))
        elif not shard_layout.holds(view[start:stop]):
            bad.append((i, "crc32c mismatch"))
        else:
            try:
                decode(view[start : stop - shard_layout.CRC_BYTES], chunk)
            except (ValueError, RuntimeError) as error:
                bad.append((i, f"cannot be decoded ({error})"))
    faults = [fault(what, first, last) for what, first, last in _runs(bad)]
    if wrong_size and not faults:
        faults.append(fault(wrong_size))
    if not faults and sha256(data) != digest:
        faults.append(fault(f"sha256 differs from {RECORD}"))
    return faults


def _plain_chunks_hold(data: bytes | memoryview, offsets: np.ndarray, chunk_bytes: int | None) -> bool:
    """True if compiled code finds that every uncompressed chunk matches its crc32c; if not, look at each chunk."""
    gather = compiled()
    if gather is None or chunk_bytes is None:
        return False
    stored, at_once = np.frombuffer(data, np.uint8), max(1, SCRATCH_BYTES // chunk_bytes)
    scratch, slots = np.empty(at_once * chunk_bytes, np.uint8), np.arange(at_once) * chunk_bytes
    parts = (offsets[first : first + at_once] for first in range(0, len(offsets), at_once))
    return all(gather.unpack(stored, part, slots[: len(part)], scratch, chunk_bytes) is None for part in parts)


def _runs(bad: Iterable[tuple[int, str]]) -> list[tuple[str, int, int]]:
    """Joins neighbouring chunks with the same fault: (what, first, last)."""
    runs: list[tuple[str, int, int]] = []
    for chunk, what in bad:
        if runs and runs[-1][0] == what and runs[-1][2] == chunk - 1:
            runs[-1] = (what, runs[-1][1], chunk)
        else:
            runs.append((what, chunk, chunk))
    return runs
