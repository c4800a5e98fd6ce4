"""`h2t presets` and `h2t list`: the names that parameters can have."""

import json

import click

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.command_line import options, presets
from h2t.pipeline.command_line.one_line import Command


@click.command("presets", cls=Command, epilog="h2t presets cifar10-100 > params.yaml")
@click.argument(
    "name",
    required=False,
    shell_complete=options.completed(lambda context: (path.stem for path in presets.FOLDER.glob("*.yaml"))),
    help="Print this preset instead of the list.",
)
def list_presets(name: str | None) -> None:
    """List the presets (the paper's settings), or print one."""
    if name is not None:
        click.echo(presets.text(name), nl=False)
        return
    _print_table([(one, presets.summary(one)) for one in presets.names()])


@click.command("list", cls=Command, epilog="h2t list hosts")
@click.argument(
    "kind",
    required=False,
    shell_complete=options.completed(lambda context: plugins.KINDS),
    help="datasets, backbones, objectives, samplers, pools or hosts; by default all.",
)
@options.as_json
def list_plugins(kind: str | None, as_json: bool) -> None:
    """List the plug-ins that parameters can name."""
    if kind is not None and kind not in plugins.KINDS:
        raise UserError(f"kind: must be one of {', '.join(plugins.KINDS)}; got {kind!r}{nearest(kind, plugins.KINDS)}")
    summaries = {k: {n: plugins.summary(k, n) for n in plugins.names(k)} for k in plugins.KINDS if kind in (None, k)}
    if as_json:
        click.echo(json.dumps(summaries, indent=2, sort_keys=True))
        return
    width = max(len(name) for entries in summaries.values() for name in entries)
    for one, entries in summaries.items():
        click.echo(one)
        _print_table([(f"  {name:{width}}", line) for name, line in entries.items()])


def _print_table(rows: list[tuple[str, str]]) -> None:
    """Prints two columns. The second is wrapped, so that lines have at most 80 characters."""
    formatter = click.HelpFormatter(width=80)
    formatter.write_dl(rows)
    click.echo(formatter.getvalue(), nl=False)
