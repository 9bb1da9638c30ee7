"""`tripletkit status | logs | cancel | wait`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tripletkit.cli.options import (
    PATIENCE,
    STUDY_FLAGS,
    AsJson,
    ConfigFile,
    Overrides,
    flags,
    load_study,
)
from tripletkit.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from tripletkit.monitor.targets import Target


SomeTarget = Annotated[
    str | None,
    typer.Argument(
        metavar="[TARGET]",
        help="A job (123, 123_4, local-4711), a trial (7), a study or a run; job:123 and trial:7 "
        "leave no doubt. Default: the study.",
        show_default=False,
    ),
]


@flags("tuning", STUDY_FLAGS)
def status(
    config: ConfigFile = None,
    overrides: Overrides = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Every trial, and every line of jobs.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.5, help="Seconds between two looks of --watch.")
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show each trial of the study beside its job, and the jobs without a trial."""
    import json

    from tripletkit import log
    from tripletkit.monitor import status as looks
    from tripletkit.monitor import tables
    from tripletkit.monitor.inventory import Inventory

    if as_json and watch:
        raise ConfigError("--json and --watch exclude each other")
    inventory = Inventory(load_study(config, overrides))
    room = None if show_all or as_json else looks.Room()
    if as_json:
        log.out.print_json(json.dumps(looks.as_json(looks.gather(inventory))))
    elif watch:
        tables.watch(inventory, interval, room)
    else:
        tables.show(inventory, room)


@flags("tuning", STUDY_FLAGS)
def logs(
    target: SomeTarget = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job is over.")
    ] = False,
    lines: Annotated[int, typer.Option("-n", min=0, help="Lines of each file.")] = 50,
) -> None:
    """Print the newest lines of the logs."""
    from tripletkit.monitor import logs as reader

    found = _resolve(target, config, overrides)
    if not follow:
        reader.show(found, lines)
        return
    try:
        reader.follow(found, lines)
    except KeyboardInterrupt:
        raise typer.Exit(Interrupted.exit_code) from None


@flags("tuning", STUDY_FLAGS)
def cancel(
    target: Annotated[str, typer.Argument(help="A job, a trial, a study or a run, as for `logs`.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Cancel jobs; their trials wait for the next worker."""
    from tripletkit.monitor import control

    control.cancel(_resolve(target, config, overrides, PATIENCE))


@flags("tuning", STUDY_FLAGS)
def wait(
    target: SomeTarget = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Give up after so many seconds.")
    ] = None,
) -> None:
    """Wait until the jobs, or all trials of the study, are over; exit code 0 if all went well."""
    from tripletkit.monitor import control

    try:
        control.wait(_resolve(target, config, overrides), timeout)
    except KeyboardInterrupt:
        raise typer.Exit(Interrupted.exit_code) from None


def _resolve(
    target: str | None, config: ConfigFile, overrides: Overrides, patience: float = 0
) -> Target:
    from tripletkit.monitor import targets

    return targets.resolve(target, load_study(config, overrides), patience)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (status, logs, cancel, wait):
        app.command(command.__name__)(command)
