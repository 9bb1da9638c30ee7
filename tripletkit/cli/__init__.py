"""The command line. Nothing heavy is imported until a command runs: `--help` answers at once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from tripletkit import __version__, boundary
from tripletkit.cli import (
    apply,
    cluster,
    data,
    database,
    diagnosis,
    provenance,
    report,
    study,
    training,
    tuning,
)
from tripletkit.cli.options import help_if_alone
from tripletkit.errors import ConfigError, Interrupted

# Typer may carry its own copy of click: its errors are reached through Typer.
UsageError: Any = typer.BadParameter.__base__


class _Commands(typer.core.TyperGroup):
    """All commands. Typer itself would make of a Ctrl-C an exit code without a word."""

    def make_context(self, *given: Any, **more: Any) -> Any:
        with _told():
            return super().make_context(*given, **more)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None


app = typer.Typer(
    name="tripletkit",
    cls=_Commands,
    help="Train, tune and apply triplet-loss projection heads on precomputed embeddings.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for commands in (training, tuning, apply, cluster, diagnosis, provenance, report):
    commands.add_to(app)
app.add_typer(data.app, name="data")
app.add_typer(study.app, name="study")
app.add_typer(database.app, name="db")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages.")] = False,
) -> None:
    """Set up logging."""
    if version:
        typer.echo(f"tripletkit {__version__}")
        raise typer.Exit
    boundary.prepare_process(verbose=verbose)
    help_if_alone(context)


def run(command: Callable[[], int | None]) -> int:
    """Call `command`; errors become a message on stderr and an exit code."""

    def translated() -> int | None:
        try:
            return command()
        except UsageError as error:
            context = getattr(error, "ctx", None)
            hint = f"see {context.command_path} --help" if context is not None else None
            raise ConfigError(error.format_message(), hint=hint) from None
        except typer.Abort:
            raise KeyboardInterrupt from None

    return boundary.run(translated).exit_code


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `tripletkit`; ends the process with a stable exit code."""
    sys.exit(run(lambda: app(arguments, prog_name="tripletkit", standalone_mode=False)))
