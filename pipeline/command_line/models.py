"""`h2t export` and `h2t predict`: export a trained head as a model, and classify new images with it."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from h2t.cache.redaction import printable
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.command_line import options
from h2t.pipeline.command_line.caches import opened
from h2t.pipeline.command_line.one_line import Command
from h2t.pipeline.command_line.options import PATH


@click.command(
    cls=Command,
    epilog="h2t export data/train_classifier/dr data/extract/ce_mixup \\\n"
    "  data/train_backbone/ce_mixup model --ratio 0.3 --seed 0",
)
@click.argument(
    "heads", type=PATH, help="Directory that train-classifier wrote; BACKBONE again for stage I's classifier."
)
@click.argument("cache", help="Path or URL of the cache that the heads were trained on.")
@click.argument("backbone", type=PATH, help="Directory that train-backbone wrote.")
@click.argument("out", type=PATH, help="Directory to write.")
@click.option("--head", "number", type=int, metavar="N", help="Choose the head by its number in heads.parquet.")
@click.option("--ratio", type=float, metavar="R", help="Choose a head of this fusion ratio.")
@click.option("--seed", type=int, metavar="N", help="Choose a head of this seed.")
@click.option("--donor", metavar="NAME", help="Choose a head of this donor sampler.")
@click.option("--selection", metavar="NAME", help="Choose a head of this selection of channels.")
@click.option(
    "--constant", "constants", multiple=True, metavar="NAME=VALUE", help="Choose a head by a constant of its grid."
)
@click.option("--onnx", is_flag=True, help="Also write model.onnx.")
@click.option("--without-images", is_flag=True, help="Check the model on cached maps only, without reading images.")
@click.option("--licence", metavar="TEXT", help="Licence of the model, for README.md.")
@click.option("--use", metavar="TEXT", help="What the model is meant for, and what not, for README.md.")
@options.params_file
@options.overrides
@options.device("cpu")
def export(
    heads: Path,
    cache: str,
    backbone: Path,
    out: Path,
    constants: tuple[str, ...],
    onnx: bool,
    without_images: bool,
    licence: str | None,
    use: str | None,
    params_file: Path,
    overrides: tuple[str, ...],
    device: str,
    **choice: Any,
) -> None:
    """Export one trained head, alone and with its backbone.

    Together, the options --head, --ratio, --seed, --donor, --selection and
    --constant must leave one head.
    """
    from h2t.pipeline.base import device as devices
    from h2t.pipeline.base import params
    from h2t.pipeline.base.outputs import check_place
    from h2t.pipeline.base.run import Run
    from h2t.pipeline.models import export as room
    from h2t.pipeline.models.card import Stated

    prepare = params.section(params.load(params_file, overrides), "prepare")
    own = dict(params.assignment("--constant", text) for text in constants)
    check_place(out)
    with opened(cache) as maps:
        run = Run("export", out, devices.choose(device), say=click.echo)
        stated, chosen = Stated(licence, use), room.Choice(**choice, constants=own)
        room.run(run, maps, heads, backbone, chosen, prepare, onnx=onnx, with_images=not without_images, stated=stated)


@click.command(
    cls=Command,
    epilog="h2t predict model photos/ --top 3 --out classes.csv\nfind photos -newer yesterday | h2t predict model -",
)
@click.argument("model", type=PATH, help="Directory that h2t export wrote.")
@click.argument(
    "images",
    type=PATH,
    nargs=-1,
    required=True,
    help="Image files, folders or tables of them; - reads paths from stdin, one a line.",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Print the N most probable classes of each image.",
)
@click.option("--column", metavar="NAME", help="Column of the paths in a table; by default file_name, path, image, ...")
@click.option(
    "--out", type=PATH, metavar="FILE", help="Write to this .csv, .json, .jsonl or .parquet file instead of stdout."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of CSV.")
@click.option("--jsonl", "as_lines", is_flag=True, help="Print JSON Lines instead of CSV.")
@options.device("auto")
def predict(
    model: Path,
    images: tuple[Path, ...],
    top: int,
    column: str | None,
    out: Path | None,
    as_json: bool,
    as_lines: bool,
    device: str,
) -> None:
    """Classify images with an exported model.

    Images that cannot be read are left out; then it exits with 1.
    """
    from h2t.pipeline.base import device as devices
    from h2t.pipeline.models import predict as room
    from h2t.pipeline.models import prediction_files

    if as_json and as_lines:
        raise click.UsageError("give --json or --jsonl, not both")
    if out is not None:
        if as_json or as_lines:
            raise click.UsageError("give --out, whose ending says the format, or --json or --jsonl, not both")
        prediction_files.check(out)
    unread = 0

    def complain(line: str) -> None:
        nonlocal unread
        unread += 1
        click.echo(printable(f"skipped: {line}"), err=True)

    made = room.open_model(model, devices.choose(device))
    found = room.find_images(_given(images), column)
    for note in found.notes:
        click.echo(printable(note), err=True)
    batches = room.predict(made, found, complain, top=top)
    kind = "json" if as_json else "jsonl" if as_lines else "csv"
    first = next(batches)  # if no image can be read, nothing is written
    with prediction_files.as_file(out) if out else prediction_files.as_text(sys.stdout, kind) as write:
        write(first)
        for lines in batches:
            write(lines)
    if unread:
        raise SystemExit(1)


def _given(images: tuple[Path, ...]) -> list[Path]:
    """The paths on the command line, with those of stdin in place of -."""
    if Path("-") not in images:
        return list(images)
    text = os.fsdecode(sys.stdin.buffer.read())
    lines = text.split("\0") if "\0" in text else text.splitlines()
    piped = [Path(line) for line in lines if line.strip()]
    if not piped and len(images) == 1:
        raise UserError("stdin: must name at least one image; got nothing; pipe paths, one a line")
    return [path for image in images for path in (piped if image == Path("-") else [image])]
