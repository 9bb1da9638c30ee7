"""`tripletkit study ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tripletkit.cli.options import (
    PATIENCE,
    STUDY_FLAGS,
    AsJson,
    ConfigFile,
    Overrides,
    flags,
    help_if_alone,
    load_study,
)

if TYPE_CHECKING:
    from tripletkit.monitor.inventory import Inventory


app = typer.Typer()


@app.callback(invoke_without_command=True)
def study(context: typer.Context) -> None:
    """What a study found: its facts, its best trial, all its trials as a table."""
    help_if_alone(context)


@app.command("show")
@flags("tuning", STUDY_FLAGS)
def show(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Show what the study is about, its best trials, and which parameters matter."""
    from tripletkit.monitor import study as studies

    studies.show(_inventory(config, overrides))


@app.command("best")
@flags("tuning", STUDY_FLAGS)
def best(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the best trial, its parameters as lines for config.toml."""
    from tripletkit.monitor import study as studies

    studies.best(_inventory(config, overrides), as_json=as_json)


@app.command("export")
@flags("tuning", STUDY_FLAGS)
def export(
    file: Annotated[Path, typer.Argument(help="A .csv, .json or .parquet file.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write every trial of the study to a file, a row per trial."""
    from tripletkit.monitor import study as studies

    studies.export(_inventory(config, overrides), file)


@app.command("dashboard")
@flags("tuning", STUDY_FLAGS)
def dashboard(
    config: ConfigFile = None,
    overrides: Overrides = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="0: any; default: the first free from 8080.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than 127.0.0.1 let the network in.")
    ] = "127.0.0.1",
) -> None:
    """Look at the study in a browser, read only, with Optuna's dashboard. Ctrl-C ends it."""
    from tripletkit.monitor import dashboard as pages

    pages.serve(load_study(config, overrides), host, port)


def _inventory(config: ConfigFile, overrides: Overrides) -> Inventory:
    from tripletkit.monitor.inventory import Inventory

    return Inventory(load_study(config, overrides), PATIENCE)
