"""`h2t cache`: what a cache holds, whether it is sound, its values, and its pooled copy."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from h2t.cache.redaction import one_line, printable, redacted
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.command_line.one_line import OneLineErrors, refuse

if TYPE_CHECKING:
    from h2t.cache.reader import Cache


FOLDER = click.Path(path_type=Path)


class CacheCommands(OneLineErrors):
    """Whatever the disk or the network says is one line, too."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output left; click knows what to do
            raise
        except (OSError, ImportError) as error:  # ImportError: fsspec names the package that a protocol needs
            refuse(ctx, one_line(redacted(" ".join(str(error).split()))))


@contextmanager
def opened(location: str) -> Iterator["Cache"]:
    """The cache at a path or URL."""
    from h2t.cache.reader import open_cache

    try:
        cache = open_cache(location)
    except ValueError as error:  # fsspec: unknown protocol
        raise UserError(f"{location}: {' '.join(str(error).split())}") from None
    with cache:
        yield cache


@contextmanager
def previous(location: str | None, name: str) -> Iterator["Cache | None"]:
    """The cache that `extract.statistics_from` names for the backbone `name`: itself, or NAME in that folder."""
    from h2t.cache.format.spec import RECORD
    from h2t.cache.read.files import files_at

    if location is None:
        yield None
        return
    places = [location, f"{location.rstrip('/')}/{name}"]
    try:
        found = [place for place in places if files_at(place).exists(RECORD)]
    except (ValueError, ImportError) as error:  # fsspec: unknown protocol, or the package it needs
        raise UserError(f"extract.statistics_from: {location}: {' '.join(str(error).split())}") from None
    if not found:
        raise UserError(
            f"extract.statistics_from: {location} is no cache and no folder with a cache called {name!r}; name one "
            "that DVC does not remove before it runs (cp -r data/extract kept, or h2t cache pull), or set it to null"
        )
    with opened(found[0]) as cache:
        yield cache


def human(size: float) -> str:
    """`size` bytes in the largest unit that keeps it at 1 or more."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


@click.group(cls=CacheCommands)
def cache() -> None:
    """Look at, check and compare caches. CACHE is a path or a URL."""


@cache.command()
@click.argument("location", metavar="CACHE")
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def info(location: str, as_json: bool) -> None:
    """Show what CACHE holds.

    Example: h2t cache info data/extract/ce_mixup
    """
    from h2t.cache.tools.audit import describe

    with opened(location) as found:
        about = describe(found)
    if as_json:
        click.echo(json.dumps(about, sort_keys=True))
        return
    shapes = ", ".join(" x ".join(str(n) for n in expert["shape"]) for expert in about["experts"])
    click.echo(f"rows         {about['rows']} of {about['samples']} samples, {about['views']} views")
    for part in about["splits"]:
        click.echo(printable(f"             {part['rows']} {part['split']} rows under {part['statistics']} statistics"))
    click.echo(f"classes      {about['classes']}")
    click.echo(f"experts      {len(about['experts'])}: {shapes}, {about['dtype']}")
    click.echo(
        f"layout       codec {about['codec']}, {about['chunk_rows']} rows per chunk, {about['shard_rows']} per shard"
    )
    click.echo(
        f"size         {human(about['bytes'])} in {about['shards']} shards, {human(about['value_bytes'])} of values"
    )
    click.echo(f"format       {about['format']}")
    click.echo(f"fingerprint  {about['fingerprint']}")
    for name in ("fingerprint_inputs", "provenance"):
        click.echo(name.replace("_", " "))
        for key, value in sorted(about[name].items()):
            told = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            click.echo(f"             {printable(f'{key}: {told}')}")


@cache.command("verify")
@click.argument("location", metavar="CACHE")
@click.option("--quick", is_flag=True, help="Sizes, cache.json, row table, metadata and shard indices only.")
@click.option("--recompute", "count", type=click.IntRange(1), metavar="N", help="Extract N random rows again, too.")
@click.option("--samples", type=FOLDER, default=Path("data/prepare"), show_default=True, help="For --recompute.")
@click.option("--backbone", type=FOLDER, help="For --recompute: the backbone that made CACHE.")
@click.option("--params", "params_file", type=FOLDER, default=Path("params.yaml"), show_default=True)
@click.option("--seed", default=0, show_default=True, help="Which rows --recompute draws.")
@click.option("--device", default="auto", show_default=True, help="Where --recompute runs.")
def verify_command(location: str, quick: bool, count: int | None, **given: Any) -> None:
    r"""Check CACHE; exit 1 with one line for each fault.

    \b
    Example: h2t cache verify --quick s3://bucket/cache
             h2t cache verify data/extract/b --recompute 100 --backbone data/train_backbone/b
    """
    from h2t.cache.tools.audit import describe, verify

    if count is not None and given["backbone"] is None:
        raise click.UsageError("--recompute needs --backbone, the directory of the backbone that made CACHE")

    faults = verify(location, quick=quick)
    for fault in faults:
        click.echo(str(fault))
    if faults:
        raise SystemExit(1)
    with opened(location) as found:
        about = describe(found)
    checked = "sizes, row table, metadata and shard indices" if quick else "every byte"
    click.echo(f"sound: {about['rows']} rows, {about['files']} files, {human(about['bytes'])}; checked {checked}")
    if count is not None:
        _recompute(location, count, **given)


def _recompute(
    location: str, count: int, samples: Path, backbone: Path, params_file: Path, seed: int, device: str
) -> None:
    from h2t.pipeline.base import params
    from h2t.pipeline.base.device import choose
    from h2t.pipeline.data.samples import load_samples
    from h2t.pipeline.inspection.recompute import recompute

    section = params.section(params.load(params_file), "prepare")
    known = load_samples(samples)
    with opened(location) as found:
        result = recompute(found, known, known.images(section), backbone, count, seed, choose(device))
    for fault in result.faults:
        click.echo(fault)
    click.echo(
        f"recomputed {result.rows} rows: {result.same_bits} have the same bits, {len(result.faults)} faults; "
        f"largest deviation {result.worst:.2g} of a map's largest value, allowed {result.tolerance:g}"
    )
    if result.faults:
        raise SystemExit(1)


@cache.command("stats")
@click.argument("location", metavar="CACHE")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON, with the mean norm of every class.")
def stats_command(location: str, as_json: bool) -> None:
    """Show sparsity, range, NaN and class norms of CACHE.

    Example: h2t cache stats data/extract/ce_mixup
    """
    from h2t.cache.tools.audit import stats

    with opened(location) as found:
        table = stats(found)
    if as_json:
        click.echo(json.dumps(table, sort_keys=True))
        return
    for line in table:
        norms = sorted(line["classes"], key=lambda c: c["mean_l2"])
        click.echo(
            f"expert {line['expert']}: {line['values']} values, {line['sparsity']:.1%} zeros, "
            f"min {_number(line['min'])}, max {_number(line['max'])}, mean {_number(line['mean'])}, "
            f"{line['nan']} NaN, {line['inf']} Inf"
        )
        low, high = norms[0], norms[-1]
        click.echo(
            f"  mean L2 norm of a class: {low['mean_l2']:.4g} (class {low['label']}) to "
            f"{high['mean_l2']:.4g} (class {high['label']})"
        )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


@cache.command("pool")
@click.argument("location", metavar="CACHE")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--pool", "name", default="gap", show_default=True, help="One of h2t list pools.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the pool.")
@click.option("--codec", default="none", show_default=True)
@click.option("--replace", is_flag=True, help="Replace another cache at OUT.")
def pool_command(location: str, out: Path, name: str, options: tuple[str, ...], codec: str, replace: bool) -> None:
    """Write the copy OUT of CACHE with a vector per row. Each is a row's map, pooled.

    Example: h2t cache pool data/extract/ce_mixup ce_mixup-gap --pool gem --option exponent=3.0
    """
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import pool

    chosen = dict(params.assignment("--option", option) for option in options)
    section = params.build(pool.Params, "pool", {"pool": name, "pool_options": chosen, "codec": codec})
    with opened(location) as found:
        pool.run(section, out.name, found, out, click.echo, replace=replace)
