"""Is a cache what was committed? Every file, index and chunk, held against the commit record."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from h2t.cache.errors import CacheError
from h2t.cache.format import shard as shard_layout
from h2t.cache.format.codecs import codec
from h2t.cache.format.rows import SCHEMA, from_bytes, make_rows
from h2t.cache.format.spec import CARD, MAPS, MAX_RECORD_BYTES, RECORD, ROWS, STATISTICS, Commit, parse_record, sha256
from h2t.cache.read.files import LocalFiles, files_at
from h2t.cache.read.remote import RemoteFiles
from h2t.cache.redaction import one_line
from h2t.cache.write.writer import create_group

Files = LocalFiles | RemoteFiles

#: Shards looked at side by side; each is held in memory whole.
WORKERS = min(4, os.cpu_count() or 1)
MAX_TASKS = 500  # a task costs dask a millisecond, which is more than a small shard does
GROUP_KEYS = ("node_type", "zarr_format", "attributes")
ARRAY_KEYS = (
    *("node_type", "zarr_format", "shape", "data_type", "chunk_grid", "chunk_key_encoding"),
    *("fill_value", "codecs", "dimension_names"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: `file` is relative to the cache, `chunks` and `rows` are first and last, inclusive.

    Chunks are counted within their shard, rows within the cache.
    """

    file: str
    what: str
    chunks: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = self.file
        if self.chunks and self.rows:
            first, last = self.chunks
            text += f": chunk {first}" if first == last else f": chunks {first} to {last}"
            text += f" (rows {self.rows[0]} to {self.rows[1]})"
        return one_line(f"{text}: {self.what}")


def verify(location: str | Path, *, quick: bool = False) -> list[Fault]:
    """All faults of the cache at a path or URL; an empty list means it is sound.

    Full: the bytes of every file against `cache.json`, files that it does not name, the row table, the batch-norm
    file, the Zarr metadata, every shard index and every chunk, decoded. `quick` leaves out what would read the maps:
    sizes, `cache.json`, row table, metadata and shard indices are looked at. Whatever is found, nothing is raised.
    Files that are not named cannot be found where a URL cannot be listed.
    """
    found: list[tuple[Files, Commit]] = []

    def record() -> list[Fault]:
        files = files_at(location)
        if not files.exists(RECORD):
            return [Fault(RECORD, f"missing, so {files} is not a finished cache")]
        found.append((files, parse_record(files.read_all(RECORD, MAX_RECORD_BYTES))))
        return []

    faults = _guarded(RECORD, record)
    if faults:
        return faults
    files, commit = found[0]
    try:
        found_faults = _run(_jobs(files, commit, quick))
        # A cache that was replaced meanwhile has faults that neither of the two has.
        return _guarded(RECORD, partial(_same_record, files)) or found_faults
    finally:
        files.close()


def _same_record(files: Files) -> list[Fault]:
    if isinstance(files, LocalFiles):
        files.size(RECORD)
    return []


def _run(jobs: Sequence[tuple[str, Callable[[], list[Fault]]]]) -> list[Fault]:
    import dask

    def portion(start: int, stop: int) -> list[Fault]:
        return [fault for name, job in jobs[start:stop] for fault in _guarded(name, job)]

    step = -(-len(jobs) // MAX_TASKS)
    tasks = [dask.delayed(portion, pure=False)(at, at + step) for at in range(0, len(jobs), step)]
    results = dask.compute(*tasks, scheduler="threads", num_workers=WORKERS)
    return [fault for result in results for fault in result]


def _guarded(name: str, job: Callable[[], list[Fault]]) -> list[Fault]:
    try:
        return job()
    except CacheError as error:
        return [Fault(name, error.detail)]
    # What a damaged file makes Zarr, Arrow or a remote store raise is not ours to list, and is the finding itself.
    except Exception as error:  # noqa: BLE001
        return [Fault(name, f"cannot be read ({type(error).__name__}: {error})")]


def _jobs(files: Files, commit: Commit, quick: bool) -> list[tuple[str, Callable[[], list[Fault]]]]:
    spec = commit.spec
    shards = {spec.shard_file(e, s): (e, s) for e in range(spec.experts) for s in range(spec.shards)}
    metadata = [f"{MAPS}/zarr.json", *(f"{MAPS}/expert_{e}/zarr.json" for e in range(spec.experts))]
    plain = [CARD, ROWS, STATISTICS, *metadata]
    jobs: list[tuple[str, Callable[[], list[Fault]]]] = [(RECORD, partial(_names, commit, {*plain, *shards}))]
    if not quick:
        jobs.append((RECORD, partial(_unnamed, files, commit)))
    told = files.listed_sizes(commit.files) if isinstance(files, RemoteFiles) else {}
    listed = {name: size for name, size in told.items() if size is not None}
    jobs += [(name, partial(_file, files, commit, name, quick, listed)) for name in plain if name in commit.files]
    jobs.append((ROWS, partial(_row_table, files, commit)))
    jobs.append((f"{MAPS}/zarr.json", partial(_metadata, files, commit)))
    if not quick:
        jobs.append((STATISTICS, partial(_statistics, files, commit)))
    jobs += [(name, partial(_shard, files, commit, *place, quick, listed)) for name, place in shards.items()]
    return jobs


def _names(commit: Commit, expected: set[str]) -> list[Fault]:
    faults = [Fault(name, f"not named in {RECORD}") for name in sorted(expected - set(commit.files))]
    return faults + [Fault(name, "no file of format 1") for name in sorted(set(commit.files) - expected)]


def _unnamed(files: Files, commit: Commit) -> list[Fault]:
    named = {*commit.files, RECORD}
    return [Fault(name, f"not named in {RECORD}") for name in sorted(_listing(files) - named)]


def _listing(files: Files) -> set[str]:
    if isinstance(files, LocalFiles):
        found = set()
        for folder, folders, names in os.walk(files.root):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
            found |= {Path(folder, name).relative_to(files.root).as_posix() for name in [*names, *links]}
        return found
    return files.names()


def _size_fault(files: Files, commit: Commit, name: str, listed: Mapping[str, int]) -> str | None:
    """What is wrong with the size of `name`, which is asked for unless a listing told it in `listed`."""
    if isinstance(files, LocalFiles) and not files.exists(name):  # also keeps us from waiting at a named pipe
        return "file is missing"
    try:
        size = listed[name] if name in listed else files.size(name)
    except CacheError as error:
        return "file is missing" if error.reason == "missing" else error.detail
    expected = commit.files[name][0]
    return None if size == expected else f"{size} bytes, {RECORD} says {expected}"


def _file(files: Files, commit: Commit, name: str, quick: bool, listed: Mapping[str, int]) -> list[Fault]:
    what = _size_fault(files, commit, name, listed)
    if what is None and not quick and sha256(files.read_all(name, commit.files[name][0])) != commit.files[name][1]:
        what = f"sha256 differs from {RECORD}"
    return [Fault(name, what)] if what else []


def _row_table(files: Files, commit: Commit) -> list[Fault]:
    if ROWS not in commit.files or not files.exists(ROWS):
        return []
    table = from_bytes(files.read_all(ROWS, commit.files[ROWS][0]), commit.spec.rows)
    if make_rows({name: table[name].combine_chunks() for name in SCHEMA.names}) != table:
        return [Fault(ROWS, "rows are not in the order of format 1")]
    return []


def _statistics(files: Files, commit: Commit) -> list[Fault]:
    """The structure of the safetensors file: a header, and tensors that fill the rest without a gap."""
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
        return [Fault(STATISTICS, "not as long as its header says")]
    return []


def _metadata(files: Files, commit: Commit) -> list[Fault]:
    """Zarr metadata as written against the metadata that the commit record asks for."""
    from zarr.storage import MemoryStore

    store: dict[str, Any] = {}
    create_group(MemoryStore(store), commit.spec)
    faults = []
    names = ["zarr.json", *(f"expert_{e}/zarr.json" for e in range(commit.spec.experts))]
    expected = {name: json.loads(store[name].to_bytes()) for name in names}
    found: dict[str, Any] = {}
    for name in names:
        if f"{MAPS}/{name}" not in commit.files or not files.exists(f"{MAPS}/{name}"):
            continue  # reported as missing
        try:
            found[name] = json.loads(files.read_all(f"{MAPS}/{name}", commit.files[f"{MAPS}/{name}"][0]))
            keys = GROUP_KEYS if name == "zarr.json" else ARRAY_KEYS
            faults += _differences(f"{MAPS}/{name}", found[name], expected[name], keys)
        except (ValueError, TypeError, AttributeError) as error:
            faults.append(Fault(f"{MAPS}/{name}", f"not Zarr metadata ({error})"))
    if isinstance(found.get("zarr.json"), dict):
        try:
            arrays = found["zarr.json"]["consolidated_metadata"]["metadata"]
            for name in names[1:]:
                faults += _differences(f"{MAPS}/zarr.json", arrays[name.split("/")[0]], expected[name], ARRAY_KEYS)
        except (KeyError, TypeError, AttributeError):
            faults.append(Fault(f"{MAPS}/zarr.json", "no consolidated metadata of every expert"))
    return faults


def _differences(file: str, found: Any, expected: Any, keys: Iterable[str]) -> list[Fault]:
    wrong = [key for key in keys if found.get(key) != expected[key]]
    return [Fault(file, f"{key} is {found.get(key)!r}; {RECORD} asks for {expected[key]!r}") for key in wrong]


def _shard(
    files: Files, commit: Commit, expert: int, shard: int, quick: bool, listed: Mapping[str, int]
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
        return [fault(wrong_size or error.detail)]  # a file longer than recorded is not read
    try:
        offsets, sizes = shard_layout.parse_index(data[:length], slots, used, size, spec.chunk_bytes(expert))
    except CacheError as error:
        return [fault(error.detail)]
    if quick:
        return []
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


def _runs(bad: Iterable[tuple[int, str]]) -> list[tuple[str, int, int]]:
    """Neighbouring chunks with the same fault, as one: (what, first, last)."""
    runs: list[tuple[str, int, int]] = []
    for chunk, what in bad:
        if runs and runs[-1][0] == what and runs[-1][2] == chunk - 1:
            runs[-1] = (what, runs[-1][1], chunk)
        else:
            runs.append((what, chunk, chunk))
    return runs
