"""The command line: parse, call, print. What a command does is in the stage of its name.

Stages are imported inside the commands, so that `h2t --help` answers at once.
"""

import json
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from h2t.cache.errors import CacheError
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.command_line import names
from h2t.pipeline.command_line.caches import cache as cache_group
from h2t.pipeline.command_line.caches import opened, previous
from h2t.pipeline.command_line.models import export, predict
from h2t.pipeline.command_line.one_line import OneLineErrors
from h2t.pipeline.command_line.sharing import COMMANDS as SHARING
from h2t.pipeline.command_line.sharing import doctor, upgrade


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="h2t", prog_name="h2t")
def main() -> None:
    """Train better classifiers for long-tailed images on cached feature maps.

    \b
    The stages, in the order of the data: watch, inputs, prepare, train-backbone, extract,
    pool, train-classifier, evaluate, report. `dvc repro` runs them all.
    """  # noqa: D301 - click wants the character, not two


for command in SHARING:
    cache_group.add_command(command)
main.add_command(cache_group)
main.add_command(doctor)
main.add_command(upgrade)
main.add_command(export)
main.add_command(predict)

PATH = click.Path(path_type=Path)


def stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every stage command has; hands the loaded parameters on as `values`."""

    @click.option("--params", "params_file", type=PATH, default=Path("params.yaml"), show_default=True)
    @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one parameter.")
    @click.option("--device", default=None, help="auto, cpu, cuda or cuda:N; by default the parameter `device`.")
    @click.option("--record", type=PATH, default=None, help="Write time, machine and rates of this run to a JSON file.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks.")
    @wraps(function)
    def command(
        params_file: Path,
        overrides: tuple[str, ...],
        device: str | None,
        record: Path | None,
        verbose: bool,
        **arguments: Any,
    ) -> None:
        from h2t.pipeline.base import numbers, params
        from h2t.pipeline.inspection import settings
        from h2t.pipeline.stages import inputs

        started, used = time.perf_counter(), time.process_time()
        values = params.load(params_file, overrides)
        if device is not None:
            values["device"] = device
        try:
            settings.check(values, click.echo)
            numbers.check()
            inputs.check(values, params_file.parent)
            facts = function(values=values, **arguments)
        except (UserError, CacheError) as error:
            if verbose:
                raise SystemExit(_traceback()) from None
            if hint := inputs.in_queue(values):
                raise UserError(f"{error}{hint}") from None
            raise
        if record is not None and os.environ.get("RANK", "0") == "0":  # under torchrun the first process writes
            from h2t.pipeline.base.outputs import write_run_record

            taken = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}
            write_run_record(record, {**{k: round(v, 3) for k, v in taken.items()}, **(facts or {})})

    return command


def _traceback() -> str:
    import traceback

    return traceback.format_exc()


@main.command()
@click.argument("name")
@click.argument("out", type=PATH)
@click.option("--params", "params_file", type=PATH, default=Path("params.yaml"), show_default=True)
def watch(name: str, out: Path, params_file: Path) -> None:
    """Write the digest of input NAME, a file or folder that the parameters name under `inputs`."""
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import watch as stage_module

    stage_module.run(name, params.load(params_file).get("inputs") or {}, out, click.echo)


@main.command()
@click.argument("digests", type=PATH)
@click.argument("out", type=PATH)
@stage
def inputs(values: dict[str, Any], digests: Path, out: Path) -> None:
    """Sort the digests of the inputs, in the folder DIGESTS, by the stages that read them."""
    from h2t.pipeline.stages import inputs as stage_module

    stage_module.run(values, digests, out, click.echo)


@main.command()
@click.argument("out", type=PATH)
@stage
def prepare(values: dict[str, Any], out: Path) -> None:
    """Hold samples out, make long-tailed, order classes."""
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import prepare as stage_module

    section = params.build(stage_module.Params, "prepare", params.section(values, "prepare"))
    stage_module.run(section, values["seed"], out, click.echo)


@main.command("train-backbone")
@click.argument("name")
@click.argument("samples", type=PATH)
@click.argument("out", type=PATH)
@stage
def train_backbone(values: dict[str, Any], name: str, samples: Path, out: Path) -> None:
    """Stage I: train backbone NAME or take its weights."""
    from h2t.pipeline.base import device, params
    from h2t.pipeline.data.samples import load_samples
    from h2t.pipeline.stages import train_backbone as stage_module

    section = params.build(stage_module.Params, f"backbones.{name}", params.section(values, f"backbones.{name}"))
    names.check_folders(values, "backbones", name, out)
    found = load_samples(samples)
    images = found.images(params.section(values, "prepare"))
    stage_module.run(section, name, found, images, values["seed"], device.choose(values["device"]), out, click.echo)


@main.command()
@click.argument("name")
@click.argument("samples", type=PATH)
@click.argument("backbone", type=PATH)
@click.argument("out", type=PATH)
@click.option("--replace", is_flag=True, help="Replace another cache at OUT.")
@click.option("--anew", is_flag=True, help="Compute every row, also those that extract.statistics_from gives.")
@stage
def extract(
    values: dict[str, Any], name: str, samples: Path, backbone: Path, out: Path, replace: bool, anew: bool
) -> dict[str, Any]:
    """Run the frozen backbone once, into a cache of maps."""
    from h2t.pipeline.base import device, params
    from h2t.pipeline.data.samples import load_samples
    from h2t.pipeline.stages import extract as stage_module

    section = params.build(stage_module.Params, "extract", params.section(values, "extract"))
    names.check_folders(values, "backbones", name, out)
    found = load_samples(samples)
    names.check_backbone(values, name, backbone, click.echo)
    images = found.images(params.section(values, "prepare"))
    chosen = device.choose(values["device"])
    with previous(section.statistics_from, name) as kept:
        summary = stage_module.run(
            section,
            name,
            found,
            images,
            backbone,
            values["seed"],
            chosen,
            out,
            click.echo,
            replace=replace,
            previous=kept,
            anew=anew,
        )
    return vars(summary)


@main.command()
@click.argument("name")
@click.argument("cache")
@click.argument("out", type=PATH)
@click.option("--replace", is_flag=True, help="Replace another cache at OUT.")
@stage
def pool(values: dict[str, Any], name: str, cache: str, out: Path, replace: bool) -> None:
    """Copy a cache with a vector per row, not a map."""
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import pool as stage_module

    section = params.build(stage_module.Params, "pool", params.section(values, "pool"))
    names.check_folders(values, "backbones", name, cache, out)
    with opened(cache) as found:
        stage_module.run(section, name, found, out, click.echo, replace=replace)


@main.command("train-classifier")
@click.argument("name")
@click.argument("cache")
@click.argument("backbone", type=PATH)
@click.argument("out", type=PATH)
@stage
def train_classifier(values: dict[str, Any], name: str, cache: str, backbone: Path, out: Path) -> dict[str, Any]:
    """Stage II: train the heads of host NAME on a cache."""
    from h2t.pipeline.base import device, params
    from h2t.pipeline.heads.residency import Residency
    from h2t.pipeline.stages import train_classifier as stage_module

    section = params.build(stage_module.Params, f"hosts.{name}", params.section(values, f"hosts.{name}"))
    residency = params.build(Residency, "train_classifier", params.section(values, "train_classifier"))
    with opened(cache) as found:
        names.check_host(values, name, cache, backbone, out, click.echo)
        summary = stage_module.run(
            section, residency, name, found, backbone, device.choose(values["device"]), out, click.echo
        )
    return vars(summary)


@main.command()
@click.argument("name")
@click.argument("cache")
@click.argument("heads", type=PATH)
@click.argument("backbone", type=PATH)
@click.argument("out", type=PATH)
@stage
def evaluate(values: dict[str, Any], name: str, cache: str, heads: Path, backbone: Path, out: Path) -> None:
    """Evaluate the stage-I head and those of host NAME."""
    from h2t.pipeline.base import device, params
    from h2t.pipeline.stages import evaluate as stage_module

    section = params.build(stage_module.Params, "evaluate", params.section(values, "evaluate"))
    with opened(cache) as found:
        names.check_host(values, name, cache, backbone, out, click.echo, heads)
        stage_module.run(section, name, found, heads, backbone, device.choose(values["device"]), out, click.echo)


@main.command()
@click.argument("evaluate_dir", type=PATH, required=False)
@click.argument("out", type=PATH, required=False)
@click.option("--runs", type=PATH, help="Folder of run records (data/runs): the page shows time and machine as well.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Two folders of evaluated hosts, git revisions or names of experiments, B against A.",
)
@stage
def report(
    values: dict[str, Any], evaluate_dir: Path | None, out: Path | None, runs: Path | None, compare: tuple[str, str]
) -> None:
    """Write tables and pictures. Of every host in the parameters, from EVALUATE_DIR into OUT.

    With --compare A B the hosts that both have, side by side; with one argument more, a whole report there.
    """
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import report as stage_module

    if compare:
        from h2t.pipeline.reporting import comparison
        from h2t.pipeline.sharing.revisions import evaluated

        with evaluated(compare[0]) as a, evaluated(compare[1]) as b:
            comparison.compare(a, b, evaluate_dir, click.echo, compare)
        return
    if evaluate_dir is None or out is None:
        raise click.UsageError("give EVALUATE_DIR and OUT, or --compare A B")
    section = params.build(stage_module.Params, "report", params.section(values, "report"))
    names.check_evaluated(values, evaluate_dir)
    stage_module.run(section, list(params.section(values, "hosts")), evaluate_dir, out, click.echo, runs)


@main.command("presets")
@click.argument("name", required=False)
def list_presets(name: str | None) -> None:
    """List the paper's settings. With NAME, that file's text: h2t presets NAME > params.yaml."""
    from h2t.pipeline.command_line import presets

    if name is not None:
        click.echo(presets.text(name), nl=False)
        return
    for one in presets.names():
        click.echo(f"{one:24} {presets.summary(one)}")


@main.command("list")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_plugins(kind: str | None, as_json: bool) -> None:
    """List what can be plugged in. KIND: datasets, backbones, objectives, samplers, pools or hosts."""
    from h2t.pipeline.base import plugins
    from h2t.pipeline.base.errors import nearest

    if kind is not None and kind not in plugins.KINDS:
        raise UserError(f"kind: must be one of {', '.join(plugins.KINDS)}; got {kind!r}{nearest(kind, plugins.KINDS)}")
    found = {k: {n: plugins.summary(k, n) for n in plugins.names(k)} for k in plugins.KINDS if kind in (None, k)}
    if as_json:
        click.echo(json.dumps(found, indent=2, sort_keys=True))
        return
    width = max(len(name) for entries in found.values() for name in entries)
    for one, entries in found.items():
        click.echo(one)
        for name, line in entries.items():
            click.echo(f"  {name:{width}}  {line}")
