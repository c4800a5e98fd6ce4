"""`h2t init`: looks at images and labels, reports on them, and writes a project that fits them."""

import shlex
import sys
from pathlib import Path

import click

from h2t.pipeline.command_line.one_line import Command
from h2t.pipeline.command_line.options import PATH


@click.command(cls=Command, epilog="h2t init birds --data ~/photos\nh2t init --data labels.csv --label species")
@click.argument(
    "folder", type=PATH, default=Path(), metavar="[DIR]", help="Folder of the project; by default this one."
)
@click.option(
    "--data",
    type=PATH,
    required=True,
    metavar="PATH",
    help="A folder of class folders, or of images with a table; a CSV, TSV, JSON Lines or Parquet file.",
)
@click.option("--label", metavar="COLUMN", help="Column of the labels in a table.")
@click.option(
    "--backbone",
    metavar="NAME",
    help="A pretrained backbone that is not trained further, by plug-in or PLUG-IN:MODEL: resnet50, "
    "timm:convnext_tiny; one without pretrained weights is trained. By default a small ResNet is trained.",
)
@click.option(
    "--weights",
    type=PATH,
    metavar="FILE",
    help="Weights of the backbone in a checkpoint of yours (.safetensors, .pth), used as they are.",
)
@click.option(
    "--check",
    type=click.Choice(["all", "headers"]),
    default="all",
    show_default=True,
    help="Read every byte of each image, or the beginning only, which finds neither damage nor copies.",
)
def init(folder: Path, data: Path, label: str | None, backbone: str | None, weights: Path | None, check: str) -> None:
    """Write a project for images of your own.

    Prints what the images are, and writes params.yaml, dvc.yaml and all that `dvc repro` needs.
    """
    from h2t.pipeline.project import choose, describe, detect, survey, write

    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"{folder}: must be a folder; got a file")
    if (folder / "params.yaml").exists():
        raise click.UsageError(f"{folder / 'params.yaml'}: exists already; remove it, or give another folder as DIR")
    try:  # before minutes of reading images; what a killed run wrote is no obstacle
        write.check_free(folder, write.for_any_images(folder))
    except write.Exists as error:
        raise click.UsageError(str(error)) from None
    choose.check_backbone(backbone, weights)
    if backbone is not None and weights is not None:
        choose.check_weights(backbone, weights)
    found = detect.detect(data, label)
    write.check_places(folder, found, data, weights)
    seen = survey.survey(found, headers=check == "headers")
    for line in describe.lines(found, seen, bar=_bar()):
        click.echo(line)
    settings = choose.choose(found, seen, backbone, weights)
    for note in settings.notes:
        click.echo(note)
    files = write.project(folder, found, settings, data.expanduser().absolute().stem or "images")
    try:
        for line in write.write(folder, files, found, weights):
            click.echo(line)
    except write.Exists as error:
        raise click.UsageError(str(error)) from None
    if not settings.pretrained:
        what = "a small ResNet" if backbone is None else f"{backbone} has no pretrained weights, so it"
        click.echo(f"note: {what} will be trained; a pretrained one is usually better: --backbone resnet50")
    click.echo("next: " + ("dvc repro" if folder == Path() else f"cd {shlex.quote(str(folder))} && dvc repro"))


def _bar() -> str:
    """A full block, or # where the terminal's encoding has none."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"
