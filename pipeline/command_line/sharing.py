"""`h2t cache import | why | publish | pull | gc`, `h2t doctor` and `h2t upgrade`: sharing and inspecting results."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from h2t.cache.redaction import printable, redacted
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted
from h2t.pipeline.command_line import names, options
from h2t.pipeline.command_line.caches import CACHE, cache, named_elsewhere, opened, previous
from h2t.pipeline.command_line.one_line import Command
from h2t.pipeline.command_line.options import PATH


@cache.command(
    "import",
    epilog="h2t cache import features --train train.npz --test test.npz",
)
@click.argument("out", type=PATH, help="Cache to write.")
@click.option(
    "--train",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Training features: .npy, .npz, .safetensors, .parquet, .pt or .h5.",
)
@click.option("--train-labels", type=PATH, metavar="FILE", help="Training labels in another file: also .csv, .txt.")
@click.option("--val", type=PATH, metavar="FILE", help="Validation features.")
@click.option("--val-labels", type=PATH, metavar="FILE", help="Validation labels, if they are in another file.")
@click.option("--test", type=PATH, metavar="FILE", help="Test features.")
@click.option("--test-labels", type=PATH, metavar="FILE", help="Test labels, if they are in another file.")
@click.option(
    "--features-key",
    metavar="NAME",
    help="Name of the features in the file; by default features, embeddings, x, or f* for columns f0, f1, ...",
)
@click.option("--labels-key", metavar="NAME", help="Name of the labels in the file; by default labels, label, y, ...")
@click.option(
    "--axes",
    metavar="LETTERS",
    help="Axes of the features' array: N rows, C channels, H and W of maps, T tokens, e.g. NTC or NHWC.",
)
@click.option("--classes", type=PATH, metavar="FILE", help="Text file with one class name per line, label 0 first.")
@options.replace
def import_command(
    out: Path,
    features_key: str | None,
    labels_key: str | None,
    axes: str | None,
    classes: Path | None,
    replace: bool,
    **files: Path | None,
) -> None:
    """Make a cache of features from another program."""
    from h2t.pipeline.base.outputs import check_place
    from h2t.pipeline.sharing import feature_files, importing

    check_place(out)
    keys = feature_files.Keys(features_key, labels_key, axes)
    parts = {
        split: feature_files.read_part(file, files[f"{split}_labels"], keys)
        for split in ("train", "val", "test")
        if (file := files[split]) is not None
    }
    class_names = feature_files.read_names(classes) if classes is not None else None
    importing.run(parts, out, click.echo, names=class_names, replace=replace)


@cache.command(
    "why",
    epilog="h2t cache why data/extract/ce_mixup --set extract.max_views=2",
)
@CACHE
@click.option(
    "--name",
    metavar="NAME",
    shell_complete=options.entries("backbones"),
    help="Name of the backbone in the parameters; by default the name of the directory CACHE.",
)
@click.option(
    "--samples", type=PATH, metavar="DIR", help="Directory that prepare wrote; by default CACHE/../../prepare."
)
@options.backbone_of_cache
@options.params_file
@options.overrides
@options.as_json
def why_command(
    location: str,
    name: str | None,
    samples: Path | None,
    backbone: Path | None,
    params_file: Path,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say why a cache would be extracted again.

    Lists the differences between CACHE and the parameters, and the rows that would be extracted again.
    """
    from h2t.pipeline.base import device, params
    from h2t.pipeline.data.samples import load_samples
    from h2t.pipeline.extraction import forward
    from h2t.pipeline.inspection import settings
    from h2t.pipeline.inspection.why import why
    from h2t.pipeline.stages import extract

    values = params.load(params_file, overrides)
    settings.check(values)
    place = Path(location)
    samples = samples or place.parent.parent / "prepare"
    name = name or place.name
    backbone = backbone or place.parent.parent / "train_backbone" / name
    names.check_folders(values, "backbones", name, location, backbone)
    section = params.build(extract.Params, "extract", params.section(values, "extract"))
    if there := named_elsewhere(values, location):
        raise UserError(
            f"{location}: stands for the cache at {there.url}, which extract never computes; to compare that one with "
            "the parameters, give its path or URL"
        )
    with opened(location) as maps, previous(section.statistics_from, name) as kept:
        verdict = why(
            maps,
            section,
            load_samples(samples) if (samples / "samples.parquet").is_file() else None,
            backbone if (backbone / "backbone.safetensors").is_file() else None,
            values["seed"],
            kept,
            forward.settings(section.batch_size, section.precision, device.choose(values["device"])),
        )
    if as_json:
        click.echo(json.dumps(asdict(verdict), sort_keys=True))
        return
    for line in verdict.lines():
        click.echo(printable(line))


@cache.command(
    "publish",
    epilog="h2t cache publish --remote store\nh2t cache publish data/extract/ce_mixup s3://bucket/ce_mixup",
)
@click.argument("location", metavar="CACHE", required=False, help="A cache to copy to URL instead.")
@click.argument("url", metavar="URL", required=False, help="Where the copy goes: s3://... or ssh://...")
@click.option("--remote", metavar="NAME", help="DVC remote to push to; by default DVC's default remote.")
@click.option("--uncommitted", is_flag=True, help="Push even if this configuration is not committed to git.")
@click.option("--quick", is_flag=True, help="Check only the sizes of the files on the remote, not their content.")
@click.option("--repair", is_flag=True, help="Push files again that are incomplete on the remote.")
@click.option("--replace", is_flag=True, help="Replace another cache at URL.")
def publish_command(
    location: str | None,
    url: str | None,
    remote: str | None,
    uncommitted: bool,
    quick: bool,
    repair: bool,
    replace: bool,
) -> None:
    """Push the results to a DVC remote and check them there.

    Pushes the results of the configuration that is checked out. With CACHE and URL, copies that cache to URL, without
    DVC: it appears there at once, when it is complete.
    """
    if location is not None:
        if url is None or "://" not in url:
            raise click.UsageError("CACHE needs URL, s3://... or ssh://..., to which it is copied")
        if remote or uncommitted or quick or repair:
            raise click.UsageError("--remote, --uncommitted, --quick and --repair do not go with CACHE and URL")
        _copy(location, url, replace)
        return
    if replace:
        raise click.UsageError("--replace goes with CACHE and URL")
    from h2t.pipeline.sharing.publish import publish

    publish(Path(), click.echo, remote=remote, uncommitted=uncommitted, quick=quick, repair=repair)


def _copy(location: str, url: str, replace: bool) -> None:
    from h2t.cache.tools.copied import copied
    from h2t.pipeline.base.progress import progress

    with opened(location) as maps:
        try:
            with progress(None, "publish", unit="row", total=maps.spec.rows, unit_scale=True) as bar:
                sent = copied(maps, url, replace=replace, progress=bar.update)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        click.echo(f"{redacted(url)}: {counted(maps.spec.shards, 'shard')}, {sent:,} of them sent now")


@cache.command("pull", epilog="h2t cache pull https://example.org/lab/project.git@v1 --pooled")
@click.argument(
    "url", metavar="GIT_URL[@REV]", help="Git repository of a project; REV is a branch, tag or commit of it."
)
@click.option("--rev", metavar="REV", help="Branch, tag or commit; needed for branches with a / in their name.")
@click.option("--name", metavar="NAME", help="Backbone of the cache; needed if the project has several.")
@click.option("--pooled", is_flag=True, help="Fetch the pooled copy, which is 25 to 64 times smaller.")
@click.option(
    "--into", type=PATH, default=Path("data"), show_default=True, metavar="DIR", help="Directory for the outputs."
)
def pull_command(url: str, rev: str | None, name: str | None, pooled: bool, into: Path) -> None:
    """Fetch a cache and its backbone from another repository.

    Checks what it fetched.
    """
    from h2t.pipeline.sharing.pull import pull

    pull(url, click.echo, rev=rev, name=name, pooled=pooled, into=into)


@cache.command("gc", epilog="h2t cache gc --apply")
@click.option("--apply", is_flag=True, help="Remove them. Without this option the command only lists them.")
@click.option(
    "--alone", is_flag=True, help="Remove from a shared DVC cache as well; only if no other clone links into it."
)
def gc_command(apply: bool, alone: bool) -> None:
    """Remove unfinished runs and unused DVC objects.

    An object is unused if no branch, tag, experiment or the workspace refers to it.
    """
    from h2t.pipeline.sharing.garbage import collect_garbage

    collect_garbage(Path(), click.echo, apply=apply, alone=alone)


@click.command(cls=Command, epilog="h2t doctor --full")
@options.params_file
@click.option("--full", is_flag=True, help="Read every byte of every input and output.")
@options.as_json
def doctor(params_file: Path, full: bool, as_json: bool) -> None:
    """Find problems in this project and say how to fix them.

    Exits with 1 if there are any.
    """
    from h2t.pipeline.inspection.doctor import examine

    findings = examine(Path(), params_file, full=full)
    if as_json:
        click.echo(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        for finding in findings:
            click.echo(str(finding))
    if any(f.state == "fault" for f in findings):
        raise SystemExit(1)


@click.command(cls=Command, epilog="h2t upgrade --apply")
@click.option("--apply", is_flag=True, help="Write stages.yaml and dvc.lock. Without this option nothing is written.")
def upgrade(apply: bool) -> None:
    """Say what this version of h2t would run again, and why.

    Results that would stay the same are kept.
    """
    from h2t.pipeline.inspection.upgrade import upgrade as run

    run(Path(), click.echo, apply=apply)
