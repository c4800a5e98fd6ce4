"""Options that several commands share, and shell completion of names."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from h2t.pipeline.base.errors import UserError

if TYPE_CHECKING:
    from h2t.cache.write.parts import Part

PATH = click.Path(path_type=Path)


class _Place(click.Path):
    """A path as Path, or a URL as str."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


#: The argument OUT of commands that write a cache: a path, or the URL (str) of an S3 bucket or an SSH server.
cache_output = click.argument("out", type=_Place(path_type=Path), help="Path or URL of the cache to write.")
#: (context, parameter, beginning of a name) -> names that begin so.
Completion = Callable[[click.Context, click.Parameter, str], list[str]]

params_file = click.option(
    "--params",
    "params_file",
    type=PATH,
    default=Path("params.yaml"),
    show_default=True,
    metavar="FILE",
    help="The parameter file.",
)
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a parameter for this run, e.g. --set seed=1 or --set extract.max_views=2. The value is YAML. "
    "Can be repeated.",
)


def as_path(out: Path | str) -> Path:
    """OUT of `cache_output` as a path. Raises UsageError for a URL."""
    if isinstance(out, str):
        raise click.UsageError("OUT must be a path, as the cache is elsewhere (backbones.NAME.cache) and not written")
    return out


backbone_of_cache = click.option(
    "--backbone",
    type=PATH,
    metavar="DIR",
    help="Directory that train-backbone wrote; by default CACHE/../../train_backbone/NAME.",
)
replace = click.option("--replace", is_flag=True, help="Replace another cache at OUT.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


class _Part(click.ParamType):
    """K/N as (K, N), with 1 <= K <= N."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        number, _, of = str(value).partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            self.fail(f"must be K/N with K from 1 to N, such as 3/16; got {value}", param, ctx)
        return int(number), int(of)


PART = _Part()


def in_parts(function: Any) -> Any:
    """The options --part K/N and --commit of a command that writes a cache. It gets `part` and `commit`."""
    for option in (
        click.option("--commit", is_flag=True, help="Make the cache of the written parts; compute nothing."),
        click.option("--part", type=PART, metavar="K/N", help="Write part K of N alone; run all N, at once or not."),
    ):
        function = option(function)
    return function


def chosen_part(part: tuple[int, int] | None, commit: bool) -> "Part | None":
    """The part that the options of `in_parts` name, if any. Raises UsageError if both options are given."""
    if part and commit:
        raise click.UsageError("--part and --commit exclude each other: run every part, then --commit")
    from h2t.cache.write.parts import Part

    return Part(*part) if part else None


def device(default: str | None, extra: str = "") -> Callable[[Any], Any]:
    """The option --device with a default."""
    return click.option(
        "--device",
        default=default,
        show_default=default is not None,
        metavar="DEVICE",
        help=f"auto, cpu, cuda or cuda:N{extra}.",
    )


def completed(names: Callable[[click.Context], Iterable[object]]) -> Completion:
    """Completes one of `names`, which are looked up when they are asked for."""

    def complete(context: click.Context, parameter: click.Parameter, start: str) -> list[str]:
        return sorted(name for name in map(str, names(context)) if name.startswith(start))

    return complete


def entries(section: str) -> Completion:
    """Completes the names of the entries in a section of the parameter file."""

    def names(context: click.Context) -> Iterable[object]:
        try:
            from h2t.pipeline.base import params

            return iter(params.load(context.params.get("params_file") or Path("params.yaml"))[section])
        except (UserError, KeyError, TypeError, ImportError):  # no usable parameters or a base install: no names
            return ()

    return completed(names)
