"""The command line: parse, call, print. The module in `stages` of the same name does the work of a command.

Stages are imported inside the commands, so that `h2t --help` answers at once.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from h2t.pipeline.base.run import Run, Say, silent
from h2t.pipeline.command_line import names, options
from h2t.pipeline.command_line.caches import cache as cache_group
from h2t.pipeline.command_line.caches import further_replicates, named_elsewhere, opened, previous
from h2t.pipeline.command_line.init import init
from h2t.pipeline.command_line.lists import list_plugins, list_presets
from h2t.pipeline.command_line.models import export, predict
from h2t.pipeline.command_line.one_line import OneLineErrors
from h2t.pipeline.command_line.options import PATH
from h2t.pipeline.command_line.plan import plan
from h2t.pipeline.command_line.sharing import doctor, upgrade
from h2t.pipeline.command_line.stage import (
    backbone_folder,
    backbone_name,
    cache_place,
    entry_name,
    host_name,
    outlined_stage,
    output,
    run_of,
    samples_folder,
    stage,
)
from h2t.pipeline.command_line.sweep import sweep


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(package_name="h2t", prog_name="h2t")
def main() -> None:
    """Train better classifiers for long-tailed images on cached feature maps.

    `h2t init` writes a project for images of your own. `dvc repro` runs all stages of
    params.yaml. In order they are: watch, inputs, prepare, train-backbone, extract,
    replicates, pool, probe, train-classifier, evaluate, report.

    \b
    Completion of commands and names in bash (or zsh_source, fish_source):
      eval "$(_H2T_COMPLETE=bash_source h2t)"
    """  # noqa: D301 - click wants the character, not two


for command in (cache_group, init, doctor, upgrade, export, plan, predict, sweep, list_presets, list_plugins):
    main.add_command(command)


@main.command(epilog="h2t watch images inputs/images.json")
@entry_name("inputs", "Name of the input in the section `inputs` of the parameters.")
@output("JSON file to write.")
@options.params_file
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
def watch(name: str, out: Path, params_file: Path, quiet: bool) -> None:
    """Write the digest of the input NAME, a file or folder."""
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import watch as stage_module

    say: Say = silent if quiet else click.echo
    stage_module.run(name, params.load(params_file).get("inputs") or {}, out, say)


@main.command(epilog="h2t inputs inputs data/inputs")
@click.argument("digests", type=PATH, help="Folder of the digests that watch wrote.")
@output("Directory to write.")
@outlined_stage
def inputs(values: dict[str, Any], say: Say, digests: Path, out: Path) -> None:
    """Assign the digests of inputs to the stages."""
    from h2t.pipeline.stages import inputs as stage_module

    stage_module.run(values, digests, out, say)


@main.command(epilog="h2t prepare data/prepare")
@output("Directory to write.")
@stage
def prepare(values: dict[str, Any], say: Say, out: Path) -> None:
    """Choose samples: hold out, cut to a long tail."""
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import prepare as stage_module

    section = params.build(stage_module.Params, "prepare", params.section(values, "prepare"))
    stage_module.run(section, Run("prepare", out, seed=values["seed"], say=say))


@main.command("train-backbone", epilog="h2t train-backbone ce_mixup data/prepare data/train_backbone/ce_mixup")
@backbone_name
@samples_folder
@output("Directory to write.")
@stage
def train_backbone(values: dict[str, Any], say: Say, name: str, samples: Path, out: Path) -> None:
    """Stage I: train the backbone NAME, or load its weights."""
    from h2t.pipeline.base import params
    from h2t.pipeline.data.samples import load_samples
    from h2t.pipeline.stages import train_backbone as stage_module

    section = params.build(stage_module.Params, f"backbones.{name}", params.section(values, f"backbones.{name}"))
    names.check_folders(values, "backbones", name, out)
    prepared = load_samples(samples)
    images = prepared.images(params.section(values, "prepare"))
    asked = section.cache
    with opened(asked.url, fingerprint=asked.fingerprint) if asked else nullcontext() as there:
        stage_module.run(section, run_of(values, say, name, out), prepared, images, there)


@main.command(epilog="h2t extract ce_mixup data/prepare data/train_backbone/ce_mixup \\\n  data/extract/ce_mixup")
@backbone_name
@samples_folder
@backbone_folder
@options.cache_output
@options.replace
@click.option("--anew", is_flag=True, help="Compute all rows; take none from extract.statistics_from.")
@options.in_parts
@stage
def extract(
    values: dict[str, Any],
    say: Say,
    name: str,
    samples: Path,
    backbone: Path,
    out: Path | str,
    replace: bool,
    anew: bool,
    part: tuple[int, int] | None,
    commit: bool,
) -> dict[str, Any]:
    """Run the frozen backbone NAME once and cache its maps."""
    one = options.chosen_part(part, commit)
    from h2t.pipeline.base import params
    from h2t.pipeline.base.text import counted
    from h2t.pipeline.data.samples import load_samples
    from h2t.pipeline.extraction import elsewhere
    from h2t.pipeline.heads.start import check_backbone
    from h2t.pipeline.stages import extract as stage_module

    section = params.build(stage_module.Params, "extract", params.section(values, "extract"))
    names.check_folders(values, "backbones", name, out)
    names.check_backbone(values, name, backbone, say)
    if (entry := values["backbones"].get(name) or {}).get("cache"):
        asked = params.build(elsewhere.CacheElsewhere, f"backbones.{name}.cache", entry["cache"])
        with opened(asked.url, fingerprint=asked.fingerprint) as there:
            check_backbone(there, backbone)
            rows = counted(there.spec.rows, "row")
        elsewhere.stand_in(options.as_path(out), asked.url, asked.fingerprint)
        say(f"{name}: its cache is elsewhere, {rows}; nothing is extracted")
        return {}
    prepared = load_samples(samples)
    images = prepared.images(params.section(values, "prepare"))
    run = run_of(values, say, name, Path(out))
    with previous(section.statistics_from, name) as kept:
        summary = stage_module.run(
            section,
            run,
            prepared,
            images,
            backbone,
            replace=replace,
            previous=kept,
            anew=anew,
            part=one,
            commit=commit,
            to=out,
        )
    return vars(summary)


@main.command(epilog="h2t replicates data/inputs data/replicates")
@click.argument("digests", type=PATH, help="Directory that inputs wrote.")
@output("Directory to write.")
@partial(stage, outline=lambda values: values.get("replicates", [0]) == [0])  # nothing to compute
def replicates(values: dict[str, Any], say: Say, digests: Path, out: Path) -> dict[str, Any]:
    """Run the first three stages again from other seeds.

    Once for each number in `replicates` but 0. A killed run resumes.
    """
    from h2t.pipeline.stages import replicates as stage_module

    further = values["replicates"] != [0]
    run = run_of(values, say, "replicates", out) if further else Run("replicates", out, say=say)
    return stage_module.run(values, run, digests)


@main.command(epilog="h2t pool ce_mixup data/extract/ce_mixup data/pool/ce_mixup")
@backbone_name
@cache_place
@options.cache_output
@options.replace
@options.in_parts
@stage
def pool(
    values: dict[str, Any],
    say: Say,
    name: str,
    cache: str,
    out: Path | str,
    replace: bool,
    part: tuple[int, int] | None,
    commit: bool,
) -> None:
    """Copy a cache with each map pooled to a vector."""
    one = options.chosen_part(part, commit)
    from h2t.pipeline.base import params
    from h2t.pipeline.extraction import elsewhere
    from h2t.pipeline.stages import pool as stage_module

    section = params.build(stage_module.Params, "pool", params.section(values, "pool"))
    names.check_folders(values, "backbones", name, cache, out)
    if there := named_elsewhere(values, cache):
        elsewhere.stand_in(options.as_path(out), there.url, there.fingerprint)
        say(f"{name}: its cache is elsewhere; nothing is pooled, but h2t cache pool CACHE OUT copies it")
        return
    with opened(cache) as maps:
        run = Run(name, Path(out), say=say)
        stage_module.run(section, run, maps, replace=replace, part=one, commit=commit, to=out)


@main.command(epilog="h2t probe ce_mixup data/extract/ce_mixup data/probe/ce_mixup")
@backbone_name
@cache_place
@output("Directory to write.")
@options.backbone_of_cache
@stage
def probe(values: dict[str, Any], say: Say, name: str, cache: str, out: Path, backbone: Path | None) -> dict[str, Any]:
    """Fit the head of the frozen backbone NAME to a cache.

    It is a logistic regression. Imported features, whose backbone is not in the parameters, get one too.
    """
    from h2t.pipeline.base import params
    from h2t.pipeline.heads.start import check_backbone, imported
    from h2t.pipeline.networks.probe import Probe
    from h2t.pipeline.networks.trained import NONE
    from h2t.pipeline.stages import probe as stage_module
    from h2t.pipeline.stages import train_backbone

    head, settings = "probe", Probe()
    if name in values["backbones"]:
        asked = params.build(train_backbone.Params, f"backbones.{name}", values["backbones"][name])
        head, settings = asked.head, asked.probe
    names.check_folders(values, "backbones", name, cache, out)
    with opened(cache, values) as maps:
        if imported(maps):
            backbone = Path(NONE)
        elif backbone is None:
            backbone = Path(cache).parent.parent / "train_backbone" / name
            if "://" in cache and head == "probe":
                raise click.UsageError("a cache at a URL needs --backbone DIR, the backbone that it was extracted with")
        if head == "probe":
            names.check_backbone(values, name, backbone, say)
            check_backbone(maps, backbone)
        return stage_module.run(head, settings, run_of(values, say, name, out), maps, backbone)


@main.command(
    "train-classifier",
    epilog="h2t train-classifier dr data/extract/ce_mixup data/train_backbone/ce_mixup \\\n  data/train_classifier/dr",
)
@host_name
@cache_place
@backbone_folder
@output("Directory to write.")
@stage
def train_classifier(
    values: dict[str, Any], say: Say, name: str, cache: str, backbone: Path, out: Path
) -> dict[str, Any]:
    """Stage II: train the heads of the host NAME on a cache."""
    from h2t.pipeline.base import params
    from h2t.pipeline.heads.host_entry import check_choice
    from h2t.pipeline.heads.residency import Residency
    from h2t.pipeline.stages import train_classifier as stage_module

    section = params.build(stage_module.Params, f"hosts.{name}", params.section(values, f"hosts.{name}"))
    residency = params.build(Residency, "train_classifier", params.section(values, "train_classifier"))
    with opened(cache, values) as maps, further_replicates(values, cache, backbone) as further:
        names.check_host(values, name, cache, backbone, out, say)
        check_choice(section, name, maps)
        summary = stage_module.run(section, run_of(values, say, name, out), residency, maps, backbone, further)
    return vars(summary)


@main.command(
    epilog="h2t evaluate dr data/extract/ce_mixup data/train_classifier/dr \\\n"
    "  data/train_backbone/ce_mixup data/evaluate/dr"
)
@host_name
@cache_place
@click.argument("heads", type=PATH, help="Directory that train-classifier wrote.")
@backbone_folder
@output("Directory to write.")
@stage
def evaluate(values: dict[str, Any], say: Say, name: str, cache: str, heads: Path, backbone: Path, out: Path) -> None:
    """Evaluate the host NAME and the stage-I head on a cache."""
    from h2t.pipeline.base import params
    from h2t.pipeline.stages import evaluate as stage_module

    section = params.build(stage_module.Params, "evaluate", params.section(values, "evaluate"))
    with opened(cache, values) as maps, further_replicates(values, cache, backbone) as further:
        names.check_host(values, name, cache, backbone, out, say, heads)
        stage_module.run(section, run_of(values, say, name, out), maps, heads, backbone, further)


@main.command(
    epilog="h2t report data/evaluate data/report --runs data/runs\nh2t report --compare main my-branch comparison"
)
@click.argument(
    "evaluate_dir",
    type=PATH,
    required=False,
    help="Folder of the directories that evaluate wrote. With --compare: directory to write, if any.",
)
@click.argument("out", type=PATH, required=False, help="Directory to write.")
@click.option("--runs", type=PATH, metavar="DIR", help="Folder of run records (data/runs): adds times and machine.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Compare B with A. Each is a folder of evaluated hosts, a git revision or an experiment.",
)
@outlined_stage
def report(
    values: dict[str, Any],
    say: Say,
    evaluate_dir: Path | None,
    out: Path | None,
    runs: Path | None,
    compare: tuple[str, str],
) -> None:
    """Write tables and figures of all hosts in the parameters.

    With --compare, prints the hosts that both sides have next to each other. If a directory is given as well, it also
    writes a report of both there.
    """
    from h2t.pipeline.base import params
    from h2t.pipeline.base.outputs import check_place
    from h2t.pipeline.stages import report as stage_module

    if compare:
        from h2t.pipeline.reporting import comparison
        from h2t.pipeline.sharing.revisions import evaluated

        if evaluate_dir is not None:
            check_place(evaluate_dir)
        with evaluated(compare[0]) as a, evaluated(compare[1]) as b:
            comparison.compare(a, b, evaluate_dir, click.echo, compare)  # the result, so --quiet does not hide it
        return
    if evaluate_dir is None or out is None:
        raise click.UsageError("give EVALUATE_DIR and OUT, or --compare A B")
    section = params.build(stage_module.Params, "report", params.section(values, "report"))
    names.check_evaluated(values, evaluate_dir)
    hosts = params.section(values, "hosts")
    backbones = {name: host["backbone"] for name, host in hosts.items() if "backbone" in host}
    stage_module.run(section, Run("report", out, say=say), list(hosts), evaluate_dir, runs, backbones)
