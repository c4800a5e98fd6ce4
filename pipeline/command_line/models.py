"""`h2t export` and `h2t predict`: a head given back, and used on new images."""

from pathlib import Path

import click

from h2t.pipeline.command_line.caches import opened

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("heads", type=PATH)
@click.argument("cache")
@click.argument("backbone", type=PATH)
@click.argument("out", type=PATH)
@click.option("--head", type=int, help="Number of the head, as in heads.parquet.")
@click.option("--ratio", type=float, help="Its ratio.")
@click.option("--seed", type=int, help="Its seed.")
@click.option("--donor", help="Its donor.")
@click.option("--selection", help="Its selection.")
@click.option("--onnx", is_flag=True, help="Write model.onnx too.")
@click.option("--without-images", is_flag=True, help="Check the head on cached maps alone; no image is read.")
@click.option("--params", "params_file", type=PATH, default=Path("params.yaml"), show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one parameter.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or cuda:N.")
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
    onnx: bool,
    without_images: bool,
    params_file: Path,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Write one head, alone and merged with its BACKBONE. It is one of HEADS, and OUT a directory.

    Example: h2t export data/train_classifier/dr data/extract/ce_mixup data/train_backbone/ce_mixup model --ratio 0.3
    --seed 0
    """
    from h2t.pipeline.base import device as devices
    from h2t.pipeline.base import params
    from h2t.pipeline.models import export as room

    prepare = params.section(params.load(params_file, overrides), "prepare")
    choice = room.Choice(head, ratio, seed, donor, selection)
    with opened(cache) as found:
        room.run(
            found,
            heads,
            backbone,
            choice,
            prepare,
            devices.choose(device),
            out,
            click.echo,
            onnx=onnx,
            with_images=not without_images,
        )


@click.command()
@click.argument("model", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Classes per image.")
@click.option("--out", type=PATH, help="Write to this .csv or .json file instead.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of CSV.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def predict(model: Path, images: tuple[Path, ...], top: int, out: Path | None, as_json: bool, device: str) -> None:
    """Name the class of IMAGES by an exported MODEL. IMAGES are files or directories.

    Example: h2t predict model photos/ --top 3 --out classes.csv
    """
    from h2t.pipeline.base import device as devices
    from h2t.pipeline.models import predict as room

    unread: list[str] = []

    def complain(line: str) -> None:
        unread.append(line)
        click.echo(f"left out: {line}", err=True)

    lines = room.predict(model, images, devices.choose(device), complain, top=top)
    if out is None:
        click.echo(room.as_text(lines, "json" if as_json else "csv"), nl=False)
    else:
        room.save(out, lines)
    if unread:
        raise SystemExit(1)
