"""`h2t sweep`: tries settings of a host on its cache, beside the pipeline's outputs."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from h2t.pipeline.base.run import Say
from h2t.pipeline.command_line import names, options
from h2t.pipeline.command_line.caches import opened
from h2t.pipeline.command_line.one_line import Command
from h2t.pipeline.command_line.options import PATH
from h2t.pipeline.command_line.stage import host_name, run_of, stage


@click.command(cls=Command, epilog="h2t sweep dr --ratio 0.05,0.1,0.35 --seed 0,1,2,3,4")
@host_name
@click.option("--ratio", metavar="R,...", help="Fusion ratios; 0 is always added. By default those of the parameters.")
@click.option("--donor", metavar="NAME,...", help="Samplers that donors are drawn by.")
@click.option("--selection", metavar="NAME,...", help="Which channels are replaced.")
@click.option("--lr", metavar="RATE,...", help="Learning rates.")
@click.option("--seed", metavar="N,...", help="Seeds of batches and initial weights.")
@click.option("--data", type=PATH, default=Path("data"), show_default=True, help="Folder of the pipeline's outputs.")
@click.option("--out", type=PATH, metavar="DIR", help="Keep the classifiers and sweep.json in this new directory.")
@click.option("--save", is_flag=True, help="Write the grid to hosts.NAME.grid of the parameter file.")
@click.option("--profile", is_flag=True, help="Print where the time went, on standard error.")
@options.as_json
@stage
def sweep(
    values: dict[str, Any],
    say: Say,
    name: str,
    data: Path,
    out: Path | None,
    save: bool,
    profile: bool,
    as_json: bool,
    **lists: str | None,
) -> None:
    """Try ratios, donors and seeds of the host NAME.

    Trains and evaluates in one process, and prints a table. Neither the
    parameters (without --save) nor the outputs of the pipeline change.
    """
    from h2t.pipeline.base import clock, params
    from h2t.pipeline.base.outputs import fresh_directory, write_json
    from h2t.pipeline.heads.residency import Residency
    from h2t.pipeline.inspection import sweep as work
    from h2t.pipeline.stages import evaluate, train_classifier

    # Found out now, not after minutes of training.
    held = {path.name for path in out.iterdir()} if out is not None and out.is_dir() else set()
    if held and not {"sweep.json"} <= held <= {"sweep.json", "heads"}:
        other = min(held - {"sweep.json", "heads"}, default="no sweep.json")
        raise click.UsageError(
            f"--out {out}: must be a new directory, or hold a sweep and nothing else; got {other}; give another one"
        )
    if save and not any(lists.values()):
        raise click.UsageError("--save needs a list to write, such as --ratio 0.05,0.15")
    given = click.get_current_context().params["params_file"]
    if save:
        work.check_entry(given, name)
    entry = params.section(values, f"hosts.{name}")
    asked = {key: _values(key, text) for key, text in lists.items() if text is not None}
    if asked:
        entry = {**entry, "grid": {**(entry.get("grid") or {}), **asked}}
    section = params.build(train_classifier.Params, f"hosts.{name}", entry)
    residency = params.build(Residency, "train_classifier", params.section(values, "train_classifier"))
    evaluation = params.build(evaluate.Params, "evaluate", params.section(values, "evaluate"))
    backbone = data / "train_backbone" / section.backbone
    names.check_backbone(values, section.backbone, backbone, say)
    cache = str(data / "extract" / section.backbone)
    place = TemporaryDirectory(prefix="h2t-sweep-") if out is None else fresh_directory(out)
    with opened(cache, values) as maps, place as where:
        run = run_of(values, say, name, Path(where))
        lines = work.sweep(section, run, residency, evaluation, maps, backbone, data / "evaluate" / name)
        write_json(run.out / "sweep.json", [line.as_dict() for line in lines])
    if save:
        kept = work.keep_grid(given, name, {key: getattr(section.grid, key) for key in asked})
        grid = "; ".join(f"{key} {', '.join(map(str, values))}" for key, values in kept.items())
        say(f"{given}: hosts.{name}.grid is now {grid}; to train these, type: dvc repro")
    clock.begins("drawing")
    click.echo(json.dumps([line.as_dict() for line in lines], indent=1) if as_json else work.table(lines))
    if profile:
        click.echo(clock.told(clock.parts()), err=True)


def _values(key: str, text: str) -> list[Any]:
    """The values in a list with commas, each read as YAML: 0,0.1 -> [0, 0.1]."""
    from h2t.pipeline.base import params

    return [params.assignment(f"--{key}", f"{key}={part}")[1] for part in text.split(",") if part.strip()]
