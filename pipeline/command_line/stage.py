"""What commands on stages share: their options, arguments and checks."""

import os
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

from h2t.cache.errors import CacheError
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run, Say, silent
from h2t.pipeline.command_line import options
from h2t.pipeline.command_line.options import PATH


def stage(
    function: Callable[..., Any], *, outline: Callable[[dict[str, Any]], bool] | None = None
) -> Callable[..., Any]:
    """Adds the options of every stage command. `function` gets the checked parameters as `values`, and `say`.

    Where `outline(values)`, only the names of sections and entries are checked, which needs no torch. `function` may
    return facts about the run, which the run record keeps.
    """

    @options.params_file
    @options.overrides
    @options.device(None, "; by default the parameter `device`")
    @click.option(
        "--record", type=PATH, default=None, metavar="FILE", help="Write time, machine and rates of this run as JSON."
    )
    @click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of errors, as H2T_TRACEBACK=1 does.")
    @wraps(function)
    def command(
        params_file: Path,
        overrides: tuple[str, ...],
        device: str | None,
        record: Path | None,
        quiet: bool,
        verbose: bool,
        **arguments: Any,
    ) -> None:
        from h2t.pipeline.base import clock, numbers, outputs, params, progress
        from h2t.pipeline.inspection import settings
        from h2t.pipeline.stages import inputs

        click.get_current_context().meta[plugins.TRACEBACK] = verbose
        started, used = time.perf_counter(), clock.processor()
        say: Say = silent if quiet else partial(click.echo, err=bool(arguments.get("as_json")))  # JSON stays alone
        values = params.load(params_file, overrides)
        if device is not None:
            values["device"] = device
        try:
            (settings.outline if outline and outline(values) else settings.check)(values, say)
            numbers.check()
            inputs.check(values, params_file.parent)
            if isinstance(out := arguments.get("out"), Path):
                outputs.check_place(out)
            with progress.hidden(quiet):
                facts = function(values=values, say=say, **arguments)
        except (UserError, CacheError) as error:
            if hint := inputs.in_queue(values):
                raise UserError(f"{error}{hint}") from error
            raise
        if record is not None and os.environ.get("RANK", "0") == "0":  # under torchrun the first process writes
            taken = {"seconds": time.perf_counter() - started, "cpu": clock.processor() - used}
            rounded = {key: round(value, 3) for key, value in taken.items()}
            outputs.write_run_record(record, {**rounded, "parts": clock.parts(), **(facts or {})})

    return command


outlined_stage = partial(stage, outline=lambda values: True)


def run_of(values: dict[str, Any], say: Say, name: str, out: Path) -> Run:
    """The run of a stage that computes on a device. Raises UserError if this machine does not have it."""
    from h2t.pipeline.base import device

    return Run(name, out, device.choose(values["device"]), values["seed"], say)


def entry_name(section: str, help: str) -> Callable[[Any], Any]:
    """The argument NAME: an entry of `section` in the parameters."""
    return click.argument("name", shell_complete=options.entries(section), help=help)


backbone_name = entry_name("backbones", "Name of the backbone in the parameters.")
host_name = entry_name("hosts", "Name of the host in the parameters.")
samples_folder = click.argument("samples", type=PATH, help="Directory that prepare wrote.")
backbone_folder = click.argument("backbone", type=PATH, help="Directory that train-backbone or probe wrote, or none.")
cache_place = click.argument("cache", help="Path or URL of the cache.")


def output(help: str) -> Callable[[Any], Any]:
    """The argument OUT, the path that the command writes."""
    return click.argument("out", type=PATH, help=help)
