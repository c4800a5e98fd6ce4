"""`h2t plan`: what a number of images will take, from a short rehearsal on this machine."""

import json
from pathlib import Path
from typing import Any

import click

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.command_line import options
from h2t.pipeline.command_line.one_line import Command
from h2t.pipeline.command_line.options import PATH

SIZE = 224  # pixels; side of the input of most networks


@click.command(cls=Command, epilog="h2t plan --images 10000000 --backbone resnet50 --machines 8")
@click.option("--images", type=click.IntRange(1), required=True, metavar="N", help="Number of images.")
@click.option(
    "--backbone",
    "name",
    required=True,
    metavar="NAME",
    shell_complete=options.entries("backbones"),
    help="An entry of `backbones` in the parameter file, or a backbone plug-in.",
)
@click.option(
    "--machines", type=click.IntRange(1), default=1, show_default=True, metavar="M", help="Machines like this."
)
@click.option(
    "--size",
    type=click.IntRange(1, 16_384),  # as params.Side
    metavar="PIXELS",
    help="Side of the network's input; default: what the network, the entry or its dataset says, or 224.",
)
@options.params_file
@options.device("auto")
@click.option("--place", type=PATH, default=Path(), help="Folder whose disk the caches will be on; default: here.")
@options.as_json
def plan(
    images: int,
    name: str,
    machines: int,
    size: int | None,
    params_file: Path,
    device: str,
    place: Path,
    as_json: bool,
) -> None:
    """Say what N images take, and what breaks first.

    Rehearses the stages with random weights on a few made-up images, in a
    temporary folder below --place, then scales. Takes a minute or more.
    """
    import shutil
    from tempfile import TemporaryDirectory

    from h2t.cache.memory import available_memory
    from h2t.pipeline.base.device import choose
    from h2t.pipeline.base.outputs import creating
    from h2t.pipeline.project.plan import Machine, shown
    from h2t.pipeline.project.plan import plan as planned
    from h2t.pipeline.project.rehearsal import rehearse

    entry, params = _entry(name, params_file, size)
    if not place.is_dir():
        raise UserError(f"--place: must be a folder; got {place}")
    machine = Machine(available_memory(), shutil.disk_usage(place).free)
    with creating(place):
        made = TemporaryDirectory(prefix=".h2t-plan-", dir=place)
    with made as folder:
        known = rehearse(Path(folder), entry, params, choose(device))
    result = planned(images, machines, known, machine)
    if as_json:
        click.echo(json.dumps(result, sort_keys=True))
        return
    for line in shown(result):
        click.echo(line)


def _entry(name: str, params_file: Path, size: int | None) -> tuple[Any, Any]:
    """The backbone `name` and the section `extract` of the parameter file, or a plug-in of that name and defaults.

    `size` is the side of its input, by default what is known of it.
    """
    from h2t.pipeline.base import params, plugins
    from h2t.pipeline.inspection import settings
    from h2t.pipeline.stages import extract, train_backbone

    values = params.load(params_file) if params_file.exists() else {}
    known = settings.complete(values, "backbones") if values.get("backbones") else {}
    if name not in known and name not in plugins.names("backbones"):
        there = ", ".join([*known, *plugins.names("backbones")])
        raise UserError(f"--backbone: must be an entry of {params_file} or a plug-in ({there}); got {name!r}")
    entry = params.build(train_backbone.Params, f"backbones.{name}", known.get(name, {"arch": name}))
    states_own = hasattr(plugins.load("backbones", entry.arch), "input")
    if size is None and entry.input.size is None and not states_own:
        size = _size_of_dataset(values["prepare"]) if name in known and "prepare" in values else SIZE
    if size is not None:
        entry = entry.model_copy(update={"input": entry.input.model_copy(update={"size": size})})
    return entry, params.build(extract.Params, "extract", values.get("extract") or {"batchnorm": ["stage1"]})


def _size_of_dataset(prepare: Any) -> int:
    """The side of the images that the dataset of section `prepare` gives, in pixels."""
    from h2t.pipeline.base import params, plugins
    from h2t.pipeline.stages.prepare import Params

    section = params.build(Params, "prepare", prepare)
    dataset = plugins.load("datasets", section.dataset)
    return int(dataset.transform(params.build(dataset.Options, "prepare.options", section.options)).size)
