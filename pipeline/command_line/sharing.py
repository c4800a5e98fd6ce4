"""`h2t cache import | why | publish | pull | gc`, `h2t doctor`, `h2t upgrade`: beyond one machine or program."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from h2t.cache.redaction import printable
from h2t.pipeline.command_line import names
from h2t.pipeline.command_line.caches import opened, previous

PATH = click.Path(path_type=Path)


@click.command("import")
@click.argument("out", type=PATH)
@click.option("--train", type=PATH, required=True, help="Training features: .npy, .npz, .safetensors or .parquet.")
@click.option("--train-labels", type=PATH, help="Their labels, where they are in another file.")
@click.option("--val", type=PATH, help="Validation features.")
@click.option("--val-labels", type=PATH, help="Their labels.")
@click.option("--test", type=PATH, help="Test features.")
@click.option("--test-labels", type=PATH, help="Their labels.")
@click.option("--features-key", help="Name of the features in the file; by default features, embeddings, x, ...")
@click.option("--labels-key", help="Name of the labels in the file; by default labels, label, y, ...")
@click.option("--classes", type=PATH, help="A text file with the name of label 0, 1, ... on its lines.")
@click.option("--replace", is_flag=True, help="Replace another cache at OUT.")
def import_command(
    out: Path,
    train: Path,
    train_labels: Path | None,
    val: Path | None,
    val_labels: Path | None,
    test: Path | None,
    test_labels: Path | None,
    features_key: str | None,
    labels_key: str | None,
    classes: Path | None,
    replace: bool,
) -> None:
    """Make a cache OUT of features from another program.

    Example: h2t cache import features --train train.npz --test test.npz
    """
    from h2t.pipeline.sharing import importing

    keys = importing.Keys(features_key, labels_key)
    given = {"train": (train, train_labels), "val": (val, val_labels), "test": (test, test_labels)}
    parts = {split: importing.read_part(f, y, keys) for split, (f, y) in given.items() if f is not None}
    names = importing.read_names(classes) if classes is not None else None
    importing.run(parts, out, click.echo, names=names, replace=replace)


@click.command("why")
@click.argument("location", metavar="CACHE")
@click.option("--name", help="The backbone's name in the parameters; by default that of the directory.")
@click.option("--samples", type=PATH, help="What prepare wrote; by default ../../prepare beside CACHE.")
@click.option("--backbone", type=PATH, help="What train-backbone wrote; by default ../../train_backbone/NAME.")
@click.option("--params", "params_file", type=PATH, default=Path("params.yaml"), show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one parameter.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def why_command(
    location: str,
    name: str | None,
    samples: Path | None,
    backbone: Path | None,
    params_file: Path,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say in what CACHE differs from the parameters. Tells also what would be extracted again.

    Example: h2t cache why data/extract/ce_mixup --set extract.max_views=2
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
    with opened(location) as found, previous(section.statistics_from, name) as kept:
        verdict = why(
            found,
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


@click.command("publish")
@click.option("--remote", help="The remote's name; by default DVC's default remote.")
@click.option("--uncommitted", is_flag=True, help="Push even though git does not hold this configuration.")
@click.option("--quick", is_flag=True, help="Compare the lengths of what the remote holds, not its content.")
@click.option("--repair", is_flag=True, help="Send again what the remote does not hold whole.")
def publish_command(remote: str | None, uncommitted: bool, quick: bool, repair: bool) -> None:
    """Push results by DVC and prove that the remote holds them. Those of the configuration that is checked out.

    Example: h2t cache publish --remote store
    """
    from h2t.pipeline.sharing.publish import publish

    publish(Path(), click.echo, remote=remote, uncommitted=uncommitted, quick=quick, repair=repair)


@click.command("pull")
@click.argument("url", metavar="GIT_URL[@REV]")
@click.option("--rev", help="Branch, tag or commit; for branches with a / in their name.")
@click.option("--name", help="The backbone whose cache it is; needed where there are several.")
@click.option("--pooled", is_flag=True, help="The pooled copy, 25 to 64 times smaller.")
@click.option("--into", type=PATH, default=Path("data"), show_default=True, help="Directory for the outputs.")
def pull_command(url: str, rev: str | None, name: str | None, pooled: bool, into: Path) -> None:
    """Fetch and check a cache from another repository. Its backbone comes along.

    Example: h2t cache pull https://example.org/lab/project.git@v1 --pooled
    """
    from h2t.pipeline.sharing.pull import pull

    pull(url, click.echo, rev=rev, name=name, pooled=pooled, into=into)


@click.command("gc")
@click.option("--apply", is_flag=True, help="Remove; without it the command only says what would go.")
@click.option(
    "--alone", is_flag=True, help="Nobody else links into this DVC cache: remove from it although it is shared."
)
def gc_command(apply: bool, alone: bool) -> None:
    """Remove unfinished runs and unused DVC objects. Used is what a branch, tag, experiment or the workspace names.

    Example: h2t cache gc --apply
    """
    from h2t.pipeline.sharing.garbage import collect_garbage

    collect_garbage(Path(), click.echo, apply=apply, alone=alone)


@click.command()
@click.option("--params", "params_file", type=PATH, default=Path("params.yaml"), show_default=True)
@click.option("--full", is_flag=True, help="Read every byte of every output.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def doctor(params_file: Path, full: bool, as_json: bool) -> None:
    """Say what is wrong here and what to type. Exit 1 if anything is.

    Example: h2t doctor
    """
    from h2t.pipeline.inspection.doctor import examine

    found = examine(Path(), params_file, full=full)
    if as_json:
        click.echo(json.dumps([asdict(f) for f in found], indent=1))
    else:
        for finding in found:
            click.echo(str(finding))
    if any(f.state == "fault" for f in found):
        raise SystemExit(1)


@click.command()
@click.option("--apply", is_flag=True, help="Write stages.yaml and dvc.lock; without it the command only says what.")
def upgrade(apply: bool) -> None:
    """Say what this version of h2t would run again, and why. Results that it would make alike are taken over.

    Example: h2t upgrade --apply
    """
    from h2t.pipeline.inspection.upgrade import upgrade as run

    run(Path(), click.echo, apply=apply)


COMMANDS = (import_command, why_command, publish_command, pull_command, gc_command)
