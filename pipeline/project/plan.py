"""What a number of images will take: bytes, files, hours, the cost of an epoch, and what breaks first."""

from dataclasses import dataclass, replace
from typing import Any

from h2t.cache.format.spec import MAX_RECORD_BYTES, CacheSpec, canonical_json, shard_rows_for
from h2t.cache.sizes import sized
from h2t.pipeline.base.text import counted
from h2t.pipeline.project.rehearsal import TEST_SHARE, Rehearsal
from h2t.pipeline.project.stacks import BATCH
from h2t.pipeline.stages import extract

PREPARE_IMAGE_BYTES = 130  # of memory that prepare holds for an image: 70 and its name, here of up to 60 characters
EXTRACT_ROW_BYTES = 50  # of memory that extract holds for each row, at most; measured with 10 million: 23 to 35
PLAN_ROW_BYTES = 16  # of memory that stage II holds for each row, beside features; measured by bench_rows
DVC_FILES = 100_000  # beyond these, DVC's own list of files takes minutes
LARGE_SHARD = 4 * 2**30  # bytes


@dataclass(frozen=True)
class Limit:
    """Something that breaks from a number of images on, and the way around it."""

    images: int
    what: str
    instead: str


@dataclass(frozen=True)
class Machine:
    """What one machine has, in bytes: memory that is available, and free space where caches are written."""

    memory: int
    disk: int


def plan(images: int, machines: int, known: Rehearsal, machine: Machine) -> dict[str, Any]:
    """The plan for `images` on so many machines like this one, as a JSON object; sizes in bytes, times in seconds.

    Extraction and verify are divided among machines; pooling and stage II run on one. One image in ten is taken to be
    a test image.
    """
    of_image = known.spec.rows / known.images
    spec, pooled = (replace(each, rows=max(1, round(images * of_image))) for each in (known.spec, known.pooled))
    train = images - images // TEST_SHARE
    steps = -(-train // BATCH)
    spec = replace(spec, shard_rows=extract.layout(known.params, spec.largest_row_bytes, spec.rows)[1])
    costs = known.costs
    share = images / machines
    return {
        "images": images,
        "machines": machines,
        "rows": spec.rows,
        "maps": ["x".join(map(str, shape)) for shape in spec.maps],
        "bytes": {
            "maps": spec.value_bytes,
            "row_table": round(spec.rows * known.table_bytes),
            "record": _record_bytes(spec),
            "pooled": pooled.value_bytes,
        },
        "files": {"maps": _files(spec), "pooled": _files(pooled)},
        "seconds": {
            "extract": costs["extract"].of(share),
            "verify": costs["verify"].of(share),
            "pool": costs["pool"].of(share),
        },
        "epoch": {
            "steps": steps,
            "seconds": costs["step"].of(steps),
            "bytes_pooled": 2 * train * pooled.value_bytes // pooled.rows,
            "bytes_maps": 2 * train * spec.row_bytes_in_all,
        },
        "breaks": [vars(limit) for limit in limits(known, machine)],
        "measured": known.as_dict(),
    }


def limits(known: Rehearsal, machine: Machine) -> list[Limit]:
    """What breaks as images become more, first things first."""
    spec = known.spec
    of_image = spec.rows / known.images
    _, largest = extract.layout(known.params, spec.largest_row_bytes, 2**62)  # rows of a shard that grows no more
    in_shard = largest / of_image / spec.experts  # images for each file
    larger = shard_rows_for(spec.row_bytes(), spec.chunk_rows, LARGE_SHARD) / of_image / spec.experts
    wider = f"set extract.shard_bytes: {LARGE_SHARD}, which moves this to"
    image_bytes = spec.value_bytes / known.images
    entry = _entry_bytes(replace(spec, shard_rows=largest), 100_000)
    found = [
        Limit(
            machine.memory // PREPARE_IMAGE_BYTES,
            "prepare holds names and digests of the images",
            "give prepare more memory, or make several caches",
        ),
        Limit(
            int(machine.memory / (EXTRACT_ROW_BYTES * of_image)),
            "extract holds a few numbers for each row",
            "give extract more memory, or make several caches",
        ),
        Limit(
            int(machine.disk / image_bytes),
            "the disk is full",
            "write to a larger one; h2t cache pool, then share the copy",
        ),
        Limit(int(DVC_FILES * in_shard), "DVC lists each file", f"{wider} {_words(DVC_FILES * larger)} images"),
        Limit(
            int(MAX_RECORD_BYTES / entry * in_shard),
            "cache.json may have no more shards",
            f"{wider} {_words(MAX_RECORD_BYTES / entry * larger)} images",
        ),
        Limit(
            int(machine.memory / 2 / (known.pooled.value_bytes / known.images)),
            "pooled features exceed half of the memory",
            "stage II streams them by itself",
        ),
        Limit(
            int(machine.memory / (PLAN_ROW_BYTES * of_image)),
            "stage II holds an index of the rows",
            "give it more memory",
        ),
    ]
    return sorted(found, key=lambda limit: limit.images)


def _files(spec: CacheSpec) -> int:
    """Shards, metadata of the group and of each expert, record, row table, statistics, card."""
    return spec.shards * spec.experts + spec.experts + 5


def _entry_bytes(spec: CacheSpec, shard: int) -> int:
    """Bytes of `shard` in the commit record."""
    name = spec.shard_file(spec.experts - 1, shard)
    return len(canonical_json({name: {"bytes": spec.shard_rows * spec.row_bytes(), "sha256": "0" * 64}}))


def _record_bytes(spec: CacheSpec) -> int:
    return spec.shards * spec.experts * _entry_bytes(spec, spec.shards) + len(canonical_json(spec.provenance)) + 1000


def _words(count: float) -> str:
    """A large number in words: 12 thousand, 3.4 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:.0f}"


def shown(result: dict[str, Any]) -> list[str]:
    """The plan as lines for the terminal."""
    sizes, files, seconds, epoch = (result[name] for name in ("bytes", "files", "seconds", "epoch"))
    ours = [limit for limit in result["breaks"] if limit["images"] <= result["images"]]
    beyond = [limit for limit in result["breaks"] if limit["images"] > result["images"]][:1]
    lines = [
        f"{result['images']:,} images, {result['rows']:,} rows of {' + '.join(result['maps'])}, "
        f"{result['machines']} x this machine",
        f"maps         {sized(sizes['maps'])} in {files['maps']:,} files; row table {sized(sizes['row_table'])}, "
        f"cache.json {sized(sizes['record'])}",
        f"pooled copy  {sized(sizes['pooled'])} in {files['pooled']:,} files",
        f"extract      {_time(seconds['extract'])} on each machine",
        f"verify       {_time(seconds['verify'])} on each machine, with --part",
        f"pool         {_time(seconds['pool'])} on each machine, with --part",
        f"an epoch     {_time(epoch['seconds'])} of two classifiers, {counted(epoch['steps'], 'step')}, features in "
        f"memory; streamed, {sized(epoch['bytes_pooled'])} pooled or {sized(epoch['bytes_maps'])} of maps are drawn",
    ]
    for what, found in (("breaks     ", ours), ("breaks next", beyond)):
        lines += [f"{what}  from {_words(at['images'])} images: {at['what']}; {at['instead']}" for at in found]
    return lines


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
