"""`tripletkit db ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tripletkit.cli.options import (
    SLURM_FLAGS,
    ConfigFile,
    OnCluster,
    Overrides,
    flags,
    help_if_alone,
    load,
)

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(help="Folder of the database, on a shared disk.")]


@app.callback(invoke_without_command=True)
def db(context: typer.Context) -> None:
    """A PostgreSQL of your own for the study, without an administrator."""
    help_if_alone(context)


@app.command("up")
@flags("slurm", SLURM_FLAGS)
def up(
    folder: Folder = Path("db"),
    config: ConfigFile = None,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that it must serve; default: of [tuning].")
    ] = None,
    cluster: OnCluster = "local",
) -> None:
    """Start the database and wait until it answers."""
    from tripletkit import submission

    loaded = load(config, overrides)
    raise typer.Exit(
        submission.start_database(
            loaded,
            folder.absolute(),
            cluster,
            workers=workers,
            asked={text.partition("=")[0].removeprefix("slurm.") for text in overrides or ()},
        )
    )


@app.command("down")
def down(folder: Folder = Path("db")) -> None:
    """Stop the database; it leaves a dump in its folder."""
    from tripletkit.tune import database

    database.down(folder.absolute())


@app.command("status")
def status(folder: Folder = Path("db")) -> None:
    """Show whether the database runs, where, and how much it is used."""
    from tripletkit import log
    from tripletkit.tune import database

    log.out.print(str(database.status(folder.absolute())), soft_wrap=True)
