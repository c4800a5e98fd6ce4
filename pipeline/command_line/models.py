"""`h2t export` and `h2t predict`: export a trained head as a model, and classify new images with it."""

from pathlib import Path

import click

from h2t.pipeline.command_line import options
from h2t.pipeline.command_line.caches import opened
from h2t.pipeline.command_line.one_line import Command
from h2t.pipeline.command_line.options import PATH


@click.command(
    cls=Command,
    epilog="h2t export data/train_classifier/dr data/extract/ce_mixup \\\n"
    "  data/train_backbone/ce_mixup model --ratio 0.3 --seed 0",
)
@click.argument("heads", type=PATH, help="Directory that train-classifier wrote.")
@click.argument("cache", help="Path or URL of the cache that the heads were trained on.")
@click.argument("backbone", type=PATH, help="Directory that train-backbone wrote.")
@click.argument("out", type=PATH, help="Directory to write.")
@click.option("--head", type=int, metavar="N", help="Choose the head by its number in heads.parquet.")
@click.option("--ratio", type=float, metavar="R", help="Choose a head of this fusion ratio.")
@click.option("--seed", type=int, metavar="N", help="Choose a head of this seed.")
@click.option("--donor", metavar="NAME", help="Choose a head of this donor sampler.")
@click.option("--selection", metavar="NAME", help="Choose a head of this selection of channels.")
@click.option(
    "--constant", "constants", multiple=True, metavar="NAME=VALUE", help="Choose a head by a constant of its grid."
)
@click.option("--onnx", is_flag=True, help="Also write model.onnx.")
@click.option("--without-images", is_flag=True, help="Check the model on cached maps only, without reading images.")
@options.params_file
@options.overrides
@options.device("cpu")
def export(
    heads: Path,
    cache: str,
    backbone: Path,
    out: Path,
    head: int | None,
    ratio: float | None,
    seed: int | None,
    donor: str | None,
    selection: str | None,
    constants: tuple[str, ...],
    onnx: bool,
    without_images: bool,
    params_file: Path,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Export one trained head, alone and with its backbone.

    Together, the options --head, --ratio, --seed, --donor, --selection and
    --constant must leave one head.
    """
    from h2t.pipeline.base import device as devices
    from h2t.pipeline.base import params
    from h2t.pipeline.base.run import Run
    from h2t.pipeline.models import export as room

    prepare = params.section(params.load(params_file, overrides), "prepare")
    own = dict(params.assignment("--constant", text) for text in constants)
    choice = room.Choice(head, ratio, seed, donor, selection, own)
    with opened(cache) as maps:
        run = Run("export", out, devices.choose(device), say=click.echo)
        room.run(run, maps, heads, backbone, choice, prepare, onnx=onnx, with_images=not without_images)


@click.command(cls=Command, epilog="h2t predict model photos/ --top 3 --out classes.csv")
@click.argument("model", type=PATH, help="Directory that h2t export wrote.")
@click.argument("images", type=PATH, nargs=-1, required=True, help="Image files, or directories of them.")
@click.option(
    "--top",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Print the N most probable classes of each image.",
)
@click.option("--out", type=PATH, metavar="FILE", help="Write to this .csv or .json file instead of stdout.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of CSV.")
@options.device("auto")
def predict(model: Path, images: tuple[Path, ...], top: int, out: Path | None, as_json: bool, device: str) -> None:
    """Classify images with an exported model."""
    from h2t.pipeline.base import device as devices
    from h2t.pipeline.models import predict as room

    unread: list[str] = []

    def complain(line: str) -> None:
        unread.append(line)
        click.echo(f"skipped: {line}", err=True)

    lines = room.predict(model, images, devices.choose(device), complain, top=top)
    if out is None:
        click.echo(room.as_text(lines, "json" if as_json else "csv"), nl=False)
    else:
        room.save(out, lines)
    if unread:
        raise SystemExit(1)
