"""Help and errors. An error is one line on stderr with exit code 1 or 2; only bugs show a traceback."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO

import click

from h2t.cache.errors import CacheWarning
from h2t.cache.redaction import one_line, redacted
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import of_the_machine
from h2t.pipeline.base.lost_threads import lost_threads_end_it
from h2t.pipeline.command_line import interrupts


class Misuse(click.ClickException):
    """A command line that cannot be parsed: one line, exit code 2."""

    exit_code = 2

    def __init__(self, error: click.UsageError) -> None:
        path = error.ctx.command_path if error.ctx else "h2t"
        super().__init__(one_line(redacted(f"{' '.join(error.format_message().split())} (see: {path} --help)")))

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the line in the same form as other user errors."""
        click.echo(f"error: {self.format_message()}", file=file, err=True)


def refuse(ctx: click.Context, message: str) -> NoReturn:
    """Ends the command with one line on stderr and exit code 1."""
    click.echo(f"error: {message}", err=True)
    ctx.exit(1)


@contextmanager
def _warnings_are_lines() -> Iterator[None]:
    """Prints the warnings of caches as one line on stderr, without the line of code that raised them.

    Those of Pillow name no image, and what matters in them is said with the image's name.
    """
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, CacheWarning):
            click.echo(one_line(f"warning: {message}"), err=True)
        elif "PIL" not in Path(filename).parts:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


class Command(click.Command):
    """A command whose epilog is an example, printed as it is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Names this command in errors of click's parser, which leaves it out where an option lacks its value."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the example."""
        if self.epilog:
            with formatter.section("Example"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class OneLineErrors(click.Group):
    """A group of commands whose user errors are one line on stderr with exit code 1 or 2."""

    command_class = Command

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs a command line. After Ctrl-C it does not wait for threads."""
        try:
            with lost_threads_end_it(), interrupts.interrupts_end_it(), _warnings_are_lines():
                return super().main(*args, **extra)
        except SystemExit as end:
            if end.code == interrupts.STOPPED:
                interrupts.end()
            raise
        except OSError as error:  # --help, to a full disk
            known = of_the_machine(error)
            if known is None:
                raise
            click.echo(f"error: {known}", err=True)
            sys.exit(1)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parses the group's own options."""
        try:
            return super().make_context(*args, **extra)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise Misuse(error) from None
        except KeyboardInterrupt:  # click would say "Aborted!", with exit code 1
            interrupts.say_so()
            raise SystemExit(interrupts.STOPPED) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the chosen command."""
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise Misuse(error) from None
        except Exception as error:
            line = plugins.for_people(error)
            if line is None:
                raise
            if ctx.meta.get(plugins.TRACEBACK) or os.environ.get(plugins.TRACEBACK) == "1":
                raise SystemExit(traceback.format_exc()) from None
            refuse(ctx, str(line))
        except KeyboardInterrupt:
            interrupts.say_so()
            ctx.exit(interrupts.STOPPED)
