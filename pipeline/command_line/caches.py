"""`h2t cache`: commands that describe, check and pool caches."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from h2t.cache.redaction import one_line, printable, redacted
from h2t.cache.sizes import sized
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted
from h2t.pipeline.command_line import names, options
from h2t.pipeline.command_line.one_line import OneLineErrors, refuse
from h2t.pipeline.command_line.options import PATH

if TYPE_CHECKING:
    from h2t.cache.read.elsewhere import Elsewhere
    from h2t.cache.reader import Cache
    from h2t.pipeline.heads.replicate import Replicate

LONGEST = 1000  # characters of one fact that `cache info` prints


class CacheCommands(OneLineErrors):
    """A group whose errors of disk and network are one line as well."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click handles a closed pipe
            raise
        except (OSError, ImportError) as error:  # ImportError: fsspec names the missing package of a protocol
            refuse(ctx, one_line(redacted(" ".join(str(error).split()))))


@contextmanager
def opened(
    location: str, values: Mapping[str, Any] | None = None, *, fingerprint: str | None = None
) -> Iterator["Cache"]:
    """Opens the cache at a path or URL for the block; `fingerprint`: the one it must have.

    A directory that stands for a cache elsewhere has the URL of the day when it was written, so with the parameters
    `values` theirs counts. Raises UserError for a URL of an unknown protocol.
    """
    from h2t.cache.reader import open_cache

    place = location
    if values and (there := named_elsewhere(values, location)):
        location, fingerprint = there.url, there.fingerprint
    try:
        cache = open_cache(location, fingerprint=fingerprint)
    except ValueError as error:  # fsspec: unknown protocol
        raise UserError(f"{location}: {' '.join(str(error).split())}") from None
    with cache:
        if values:
            _check_named(values, place, cache)
        yield cache


def _check_named(values: Mapping[str, Any], location: str, cache: "Cache") -> None:
    """Raises UserError if `backbones.NAME.cache` names another cache than this one or the one it was pooled from."""
    name, spec = names.folder_name(location), cache.spec
    asked = (values["backbones"].get(name) or {}).get("cache")
    if asked and asked["fingerprint"] not in (spec.fingerprint, spec.fingerprint_inputs.get("parent")):
        raise UserError(
            f"{location}: must be the cache that backbones.{name}.cache names, or a pooled copy of it; got another; "
            f"run h2t extract {name} again (dvc repro)"
        )


def named_elsewhere(values: Mapping[str, Any], location: str) -> "Elsewhere | None":
    """The cache elsewhere that `location` stands for, at its URL in the parameters; None if it does for none.

    Raises UserError if the parameters have another fingerprint, or name no cache for this backbone.
    """
    from h2t.cache.read.elsewhere import Elsewhere, elsewhere

    found, name = elsewhere(location), names.folder_name(location)
    asked = (values["backbones"].get(name) or {}).get("cache")
    if found is not None and asked is None and name in values["backbones"]:
        raise UserError(
            f"{location}: stands for a cache elsewhere, but backbones.{name}.cache names none; run h2t extract {name} "
            "again (dvc repro)"
        )
    if found is None or asked is None:
        return found
    if asked["fingerprint"] != found.fingerprint:
        raise UserError(
            f"{location}: must stand for the cache with fingerprint {asked['fingerprint'][:12]}, as in "
            f"backbones.{name}.cache; got {found.fingerprint[:12]}; run h2t extract {name} again (dvc repro)"
        )
    return Elsewhere(asked["url"], found.fingerprint)


@contextmanager
def further_replicates(values: Mapping[str, Any], location: str, backbone: Path) -> Iterator[list["Replicate"]]:
    """Opens the caches of the replicates but 0 of the parameters, in `replicates` beside the folders of replicate 0.

    `location` and `backbone` are those of replicate 0. Raises UserError if one is missing, or for a place that can have
    none: a cache at a URL, or features that were imported.
    """
    from h2t.pipeline.base import replicates
    from h2t.pipeline.heads.replicate import Replicate
    from h2t.pipeline.networks.trained import NONE

    numbers = replicates.further(values)
    alone = "to use this cache alone, add --set replicates=[0]"
    if numbers and ("://" in location or str(backbone) == NONE):
        raise UserError(f"{location}: must be a cache that was extracted here to have replicates; {alone}")
    if backbone.parent.name == "probe":  # a probe is fitted to each replicate's own cache
        backbone = backbone.parent.with_name("train_backbone") / backbone.name
    with ExitStack() as stack:
        found = []
        for number in numbers:
            cache = replicates.place(Path(location), number)
            if not cache.is_dir():
                raise UserError(f"{cache}: replicate {number} is missing; run h2t replicates, or {alone}")
            opened_cache = stack.enter_context(opened(str(cache)))
            found.append(Replicate(number, opened_cache, replicates.place(backbone, number)))
        yield found


@contextmanager
def previous(location: str | None, name: str) -> Iterator["Cache | None"]:
    """Opens the cache that `extract.statistics_from` names for the backbone `name`; None if it is not set.

    `location` is the cache itself, or a folder with a cache called `name`. Raises UserError if there is neither.
    """
    from h2t.cache.format.spec import RECORD
    from h2t.cache.read.files import files_at

    if location is None:
        yield None
        return
    places = [location, f"{location.rstrip('/')}/{name}"]
    try:
        caches = [place for place in places if files_at(place).exists(RECORD)]
    except (ValueError, ImportError) as error:  # fsspec: unknown protocol, or the package it needs
        raise UserError(f"extract.statistics_from: {location}: {' '.join(str(error).split())}") from None
    if not caches:
        raise UserError(
            f"extract.statistics_from: must be a cache or a folder with a cache called {name!r}; got {location}; "
            "give one outside data/extract, which DVC removes before the stage runs (cp -r data/extract kept, or "
            "h2t cache pull), or set it to null"
        )
    with opened(caches[0]) as cache:
        yield cache


@click.group(cls=CacheCommands)
def cache() -> None:
    """Describe, check, share and import caches."""


CACHE = click.argument("location", metavar="CACHE", help="Path or URL of the cache.")


@cache.command(epilog="h2t cache info data/extract/ce_mixup")
@CACHE
@options.as_json
def info(location: str, as_json: bool) -> None:
    """Describe a cache: rows, classes, layout, origin."""
    from h2t.cache.format.spec import TEST_GROUPS
    from h2t.cache.tools.audit import describe

    with opened(location) as maps:
        about = describe(maps)
    if as_json:
        click.echo(json.dumps(about, sort_keys=True))
        return
    shapes = ", ".join(" x ".join(str(n) for n in expert["shape"]) for expert in about["experts"])
    samples, views = counted(about["samples"], "sample"), counted(about["views"], "view")
    click.echo(f"rows         {about['rows']:,} of {samples}, {views}")
    for part in about["splits"]:
        rows = counted(part["rows"], f"{part['split']} row")
        click.echo(printable(f"             {rows} with {part['statistics']} statistics"))
    click.echo(f"classes      {about['classes']}")
    click.echo(f"experts      {len(about['experts'])}: {shapes}, {about['dtype']}")
    rows = counted(about["chunk_rows"], "row")
    click.echo(f"layout       codec {about['codec']}, {rows} per chunk, {about['shard_rows']:,} per shard")
    shards = counted(about["shards"], "shard")
    click.echo(f"size         {sized(about['bytes'])} in {shards}, {sized(about['value_bytes'])} before compression")
    click.echo(f"format       {about['format']}")
    click.echo(f"fingerprint  {about['fingerprint']}")
    for name in ("fingerprint_inputs", "provenance"):
        click.echo(name.replace("_", " "))
        for key, value in sorted(about[name].items()):
            if key == TEST_GROUPS and isinstance(value, list):
                value = f"{counted(len(set(map(str, value))), 'group')} of {counted(len(value), 'test image')}"
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            if len(text) > LONGEST:  # names of thousands of classes
                text = f"{text[:LONGEST]}... (--json shows all {len(text):,} characters)"
            click.echo(f"             {printable(f'{key}: {text}')}")


@cache.command(
    "verify",
    epilog="h2t cache verify --quick s3://bucket/cache\n"
    "h2t cache verify data/extract/b --recompute 100 \\\n  --backbone data/train_backbone/b",
)
@CACHE
@click.option("--quick", is_flag=True, help="Check sizes, cache.json, row table, metadata and shard indices only.")
@click.option("--recompute", "count", type=click.IntRange(1), metavar="N", help="Also extract N random rows again.")
@click.option(
    "--samples",
    type=PATH,
    default=Path("data/prepare"),
    show_default=True,
    metavar="DIR",
    help="With --recompute: directory that prepare wrote.",
)
@click.option("--backbone", type=PATH, metavar="DIR", help="With --recompute: directory of the backbone of CACHE.")
@options.params_file
@click.option("--seed", default=0, show_default=True, metavar="N", help="With --recompute: seed of the random rows.")
@options.device("auto", "; with --recompute")
@click.option(
    "--part", type=options.PART, default="1/1", metavar="K/N", help="Take part K of N alone; run all N, at once or not."
)
def verify_command(location: str, quick: bool, count: int | None, part: tuple[int, int], **given: Any) -> None:
    """Check a cache. Print one line per fault and exit 1 if there are any.

    With --part on several machines, the cache is sound if every part is.
    """
    from h2t.cache.tools.audit import describe
    from h2t.cache.tools.verify import verify
    from h2t.cache.write.parts import Part

    if count is not None and given["backbone"] is None:
        raise click.UsageError("--recompute needs --backbone DIR, the backbone that CACHE was extracted with")

    faults = verify(location, quick=quick, part=Part(*part))
    for fault in faults:
        click.echo(str(fault))
    if faults:
        raise SystemExit(1)
    checked = "sizes, row table, metadata and shard indices" if quick else "every byte"
    if part == (1, 1):
        with opened(location) as maps:
            about = describe(maps)
        size = f"{counted(about['rows'], 'row')}, {counted(about['files'], 'file')}, {sized(about['bytes'])}"
        click.echo(f"sound: {size}; checked {checked}")
    else:  # the files of other parts may be missing
        click.echo(f"sound: part {part[0]} of {part[1]}; checked {checked} of it")
    if count is not None:
        _recompute(location, count, part=part, **given)


def _recompute(
    location: str,
    count: int,
    samples: Path,
    backbone: Path,
    params_file: Path,
    seed: int,
    device: str,
    part: tuple[int, int],
) -> None:
    from h2t.pipeline.base import params
    from h2t.pipeline.base.device import choose
    from h2t.pipeline.data.samples import load_samples
    from h2t.pipeline.inspection.recompute import recompute

    section = params.section(params.load(params_file), "prepare")
    prepared = load_samples(samples)
    with opened(location) as maps:
        result = recompute(maps, prepared, prepared.images(section), backbone, count, seed, choose(device), part)
    for fault in result.faults:
        click.echo(fault)
    click.echo(
        f"recomputed {counted(result.rows, 'row')}: {result.same_bits:,} bit for bit equal, "
        f"{counted(len(result.faults), 'fault')}; largest difference {result.worst:.2g} of a map's largest value, "
        f"allowed {result.tolerance:g}"
    )
    if result.faults:
        raise SystemExit(1)


@cache.command(
    "stats",
    epilog="h2t cache stats data/extract/ce_mixup\n"
    "h2t cache stats CACHE --part 2/4 > 2.json\n"
    "h2t cache stats CACHE --merge 1.json --merge 2.json ...",
)
@CACHE
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the mean norm of each class.")
@click.option("--part", type=options.PART, metavar="K/N", help="Print part K of N alone, as JSON for --merge.")
@click.option("--merge", "files", type=PATH, multiple=True, metavar="FILE", help="What a part printed. Give all parts.")
def stats_command(location: str, as_json: bool, part: tuple[int, int] | None, files: tuple[Path, ...]) -> None:
    """Print statistics of the values in a cache.

    They are the share of zeros, minimum, maximum, mean, NaN and infinite values, and the mean L2 norm by class.
    """
    from h2t.cache.tools.audit import merged_stats, partial_stats, stats
    from h2t.cache.write.parts import Part

    if part and files:
        raise click.UsageError("--part and --merge exclude each other: run every part, then merge")
    with opened(location) as maps:
        if part:
            click.echo(json.dumps(partial_stats(maps, Part(*part)), sort_keys=True))
            return
        table = merged_stats([_part_of(path, maps.spec.fingerprint) for path in files]) if files else stats(maps)
        names = dict(enumerate(maps.spec.provenance.get("classes") or ()))
    if as_json:
        click.echo(json.dumps(table, sort_keys=True))
        return
    for line in table:
        norms = sorted(line["classes"], key=lambda c: c["mean_l2"])
        click.echo(
            f"expert {line['expert']}: {counted(line['values'], 'value')}, {line['sparsity']:.1%} zeros, "
            f"min {_number(line['min'])}, max {_number(line['max'])}, mean {_number(line['mean'])}, "
            f"{line['nan']} NaN, {line['inf']} Inf"
        )
        low, high = (f"{c['mean_l2']:.4g} (class {names.get(c['label'], c['label'])})" for c in (norms[0], norms[-1]))
        click.echo(f"  mean L2 norm by class: {low} to {high}")


def _part_of(path: Path, fingerprint: str) -> dict[str, Any]:
    """What `h2t cache stats --part` printed into the file `path`, for the cache with this fingerprint."""
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
        if part["fingerprint"] == fingerprint:
            return dict(part)
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path}: must be what h2t cache stats CACHE --part K/N printed for this cache; it is not")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


@cache.command(
    "pool", epilog="h2t cache pool data/extract/ce_mixup ce_mixup-gem \\\n  --pool gem --option exponent=3.0"
)
@CACHE
@options.cache_output
@click.option(
    "--pool",
    "name",
    default="gap",
    show_default=True,
    metavar="NAME",
    shell_complete=options.completed(lambda context: plugins.names("pools")),
    help="The pool; h2t list pools lists them.",
)
@click.option("--option", "given", multiple=True, metavar="KEY=VALUE", help="An option of the pool. Can be repeated.")
@click.option("--codec", default="none", show_default=True, metavar="CODEC", help="Codec of the copy: none, zstd, ...")
@options.replace
@options.in_parts
def pool_command(
    location: str,
    out: Path | str,
    name: str,
    given: tuple[str, ...],
    codec: str,
    replace: bool,
    part: tuple[int, int] | None,
    commit: bool,
) -> None:
    """Copy a cache with each map pooled to a vector."""
    one = options.chosen_part(part, commit)
    from h2t.pipeline.base import params
    from h2t.pipeline.base.run import Run
    from h2t.pipeline.stages import pool

    chosen = dict(params.assignment("--option", option) for option in given)
    section = params.build(pool.Params, "pool", {"pool": name, "pool_options": chosen, "codec": codec})
    with opened(location) as maps:
        run = Run(names.folder_name(out), Path(out), say=click.echo)
        pool.run(section, run, maps, replace=replace, part=one, commit=commit, to=out)
