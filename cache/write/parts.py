"""Shards written by several processes at once, on one machine or many, without a scheduler and without a journal.

    part = Part(3, 16)
    with Staging(target, shared=True) as staging, staging.holding(part.label):
        writer, pending = opened(staging, spec, token, part)
        for shard in pending:
            writer.write(shard, [maps_of_expert_0, ...])

A file is named after its expert, shard, size and sha256, and gets that name once it is on the disk. So the listing of
the folder says what is finished, and processes that write the same shard cannot harm each other: equal names mean equal
bytes, and of files with different bytes (GPUs round differently) the commit takes one, whose digest it records.
`CacheWriter` of the same token takes the finished shards over.
"""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import CacheSpec, canonical_json, sha256
from h2t.cache.write.encoding import encoded
from h2t.cache.write.staging import Staging, bad_disk_is_one_line, file_sha256, write_durably

TOKEN = "token.json"
SHOWN = 8  # parts named in a message
_NAME = re.compile(r"(\d+)\.(\d+)\.(\d+)\.([0-9a-f]{64})")


class Named(NamedTuple):
    """What the name of a finished file says of it."""

    expert: int
    shard: int
    size: int
    digest: str


def named(name: str) -> Named | None:
    """What `name` says; None if it is not the name of a finished file."""
    match = _NAME.fullmatch(name)
    return Named(int(match[1]), int(match[2]), int(match[3]), match[4]) if match else None


#: Of a finished shard: the file of each expert in the cache -> (path here, bytes, sha256).
Finished = dict[str, tuple[Path, int, str]]


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, from 1."""

    number: int
    of: int

    @property
    def label(self) -> str:
        """The name of the lock file of the process that writes this part."""
        return f"part-{self.number}-of-{self.of}"

    def shards(self, spec: CacheSpec) -> range:
        """The shards of this part: neighbours, as many as other parts have, up to one."""
        return range(spec.shards * (self.number - 1) // self.of, spec.shards * self.number // self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class StagingFolder(Protocol):
    """The staging folder of a cache, in a directory or at a URL: what is asked of it about parts."""

    @property
    def target(self) -> Any:
        """The place of the cache, for messages."""

    @property
    def root(self) -> Any:
        """The place of the folder, for messages."""

    def labels(self) -> list[str]:
        """Names of the lock files of the parts that have been begun, the latest one first."""

    def kept(self, name: str) -> bytes | None:
        """What is stored under `name`, or None."""

    def claim(self, name: str, data: bytes) -> bytes:
        """Stores `data` under `name` unless something is stored there; returns what is stored."""


def begun(staging: StagingFolder) -> int | None:
    """In how many parts the cache in `staging` is being written, by the part begun last; None if in no parts."""
    labels = staging.labels()
    return int(labels[0].rpartition("-")[2]) if labels else None


def written_with(staging: StagingFolder) -> dict[str, Any]:
    """The token that the parts in `staging` were written with, for a commit: its machine may have other versions.

    Raises CacheError `incomplete` if there are no parts, `damaged` if their token cannot be read.
    """
    stored = staging.kept(TOKEN)
    if stored is None:
        raise no_parts(staging)
    try:
        return dict(json.loads(stored)["token"])
    except (ValueError, KeyError, TypeError):
        raise CacheError(
            "damaged", f"{staging.root}: {TOKEN} cannot be read; remove it, and run the parts again"
        ) from None


def no_parts(staging: StagingFolder) -> CacheError:
    """The error of a commit that finds no parts."""
    return CacheError(
        "incomplete",
        f"{staging.target}: --commit needs parts written with the same parameters; got none; run the same command with "
        "--part 1/N to --part N/N first",
    )


def missing(staging: StagingFolder, spec: CacheSpec, pending: Sequence[int]) -> CacheError:
    """What a commit lacks: the parts with `pending` shards, or the shards if the cache is not written in parts."""
    lack = f"{staging.target}: --commit needs all of its shards; {len(pending):,} of {spec.shards:,} missing"
    of = begun(staging)
    if of is None:
        return CacheError("incomplete", f"{lack}; run the command without --commit")
    numbers = [k for k in range(1, of + 1) if not set(pending).isdisjoint(Part(k, of).shards(spec))]
    listed = ", ".join(f"{k}/{of}" for k in numbers[:SHOWN]) + (", ..." if len(numbers) > SHOWN else "")
    return CacheError(
        "incomplete",
        f"{lack}, of {len(numbers)} part{'s' * (len(numbers) > 1)} ({listed}); run these with --part, then "
        "--commit again",
    )


def token_bytes(spec: CacheSpec, token: Mapping[str, Any]) -> bytes:
    """The content of `token.json`: all that determines the bytes of the cache, as canonical JSON."""
    return canonical_json({"token": token, "fingerprint": spec.fingerprint, "layout": spec.layout})


def token_folder(spec: CacheSpec, token: Mapping[str, Any]) -> str:
    """The folder of finished shards in a staging directory.

    Another token has another folder, so a process left over from an earlier run cannot add to a later one.
    """
    return f"parts.{sha256(token_bytes(spec, token))[:16]}"


def claim_token(staging: StagingFolder, spec: CacheSpec, token: Mapping[str, Any]) -> None:
    """Makes `token` that of the staging folder. Raises CacheError `mismatch` if another part has another one."""
    ours = token_bytes(spec, token)
    have = staging.claim(TOKEN, ours)
    if have != ours:
        raise CacheError(
            "mismatch",
            f"{staging.root}: holds shards of other settings ({difference(have, ours)}), and all parts must have the "
            f"same; repeat with those settings, or remove {staging.root} to start anew",
        )


def other_settings(staging: StagingFolder, have: bytes, ours: bytes) -> CacheError:
    """The error of a writer of the whole cache whose `token.json` is not that of the parts in `staging`."""
    return CacheError(
        "mismatch",
        f"{staging.root}: holds parts written with other settings ({difference(have, ours)}); repeat with those "
        f"settings, or remove {staging.root} to start anew",
    )


def difference(have: bytes, ours: bytes) -> str:
    """What differs between two contents of `token.json`, for a message: `batch_size 128 -> 64`."""
    try:
        old, new = _flat(json.loads(have)), _flat(json.loads(ours))
    except (ValueError, AttributeError):
        return f"{TOKEN} cannot be read"
    return ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested objects by their last keys; a digest is cut to 12 digits."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {key: value[:12] if key == "fingerprint" else value}
    return flat


def opened(staging: Staging, spec: CacheSpec, token: Mapping[str, Any], part: Part) -> tuple["PartWriter", list[int]]:
    """(writer of `part`, the shards it has to write). `staging` is shared, and its lock `part.label` held.

    Finished shards are read and compared with their sha256. Raises CacheError `mismatch` if other parts have another
    token: all must have the same.
    """
    claim_token(staging, spec, token)
    writer = PartWriter(staging.root / token_folder(spec, token), spec, part.label)
    for path in writer.folder.glob(f"*.{part.label}.partial"):  # of an earlier process that was killed
        path.unlink(missing_ok=True)
    shards = part.shards(spec)
    done = {shard for shard, _ in finished(writer.folder, spec, set(shards), read=True)}
    return writer, [shard for shard in shards if shard not in done]


@dataclass(frozen=True)
class PartWriter:
    """Writes shards of `spec` into `folder`. It can be pickled, and several threads may call `write`, once per shard.

    Unfinished files have `label` in their names; None gives each a random name.
    """

    folder: Path
    spec: CacheSpec
    label: str | None = None

    def beside(self) -> "PartWriter":
        """A writer into the same folder for another process."""
        return PartWriter(self.folder, self.spec)

    def write(self, shard: int, maps: Sequence[np.ndarray]) -> dict[str, tuple[int, str]]:
        """Writes `shard`, given as one array per expert: see `CacheWriter.write`. Returns what `put` returns."""
        return self.put(shard, encoded(self.spec, shard, maps))

    def put(self, shard: int, files: Iterable[bytes | memoryview]) -> dict[str, tuple[int, str]]:
        """Writes `shard`, given as its bytes for each expert; returns (bytes, sha256) by the file's name in the cache.

        Raises CacheError `full`, `unwritable`, and `busy` if another process removes the folder or the unfinished file.
        """
        written = {}
        for expert, data in enumerate(files):
            size, digest = len(data), sha256(data)
            path = self.folder / f"{expert}.{shard}.{size}.{digest}"
            try:
                with bad_disk_is_one_line(self.folder):
                    self.folder.mkdir(exist_ok=True)
                write_durably(path, data, partial=f"{path.name}.{self.label or uuid.uuid4().hex}.partial")
            except FileNotFoundError:
                raise CacheError(
                    "busy",
                    f"{path}: was removed while it was written, so another process writes the same part or has "
                    "committed the cache; run one process for each part",
                ) from None
            written[self.spec.shard_file(expert, shard)] = (size, digest)
        return written


def finished(folder: Path, spec: CacheSpec, shards: set[int], *, read: bool) -> Iterator[tuple[int, Finished]]:
    """The finished ones of `shards` in `folder`, ascending.

    Files must have the size in their name and, with `read`, the sha256; those that do not are removed.
    """
    found: dict[int, dict[int, list[tuple[Path, int, str]]]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (of := named(path.name)) and of.shard in shards:
            candidates = found.setdefault(of.shard, {}).setdefault(of.expert, [])
            candidates.append((path, of.size, of.digest))
    for shard in sorted(found):
        files: Finished = {}
        for expert, candidates in found[shard].items():
            for path, size, digest in candidates:
                if path.stat().st_size == size and (not read or file_sha256(path) == digest):
                    files[spec.shard_file(expert, shard)] = (path, size, digest)
                    break
                path.unlink()
        if len(files) == spec.experts:
            yield shard, files
