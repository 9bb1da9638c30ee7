"""`tripletkit data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tripletkit.cli.options import (
    SLURM_FLAGS,
    ConfigFile,
    DryRun,
    OnCluster,
    Overrides,
    flags,
    help_if_alone,
    load,
)
from tripletkit.errors import ConfigError

app = typer.Typer()


@app.callback(invoke_without_command=True)
def data(context: typer.Context) -> None:
    """Check, split and prepare the embeddings."""
    help_if_alone(context)


@app.command("check")
def check(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Validate the parquet files and print what is in them."""
    from tripletkit import stages

    raise typer.Exit(stages.check_data(load(config, overrides)))


@app.command("bands")
@flags("slurm", SLURM_FLAGS)
def bands(
    config: ConfigFile = None,
    overrides: Overrides = None,
    neighbors: Annotated[int, typer.Option(min=1, help="Neighbour buildings per image.")] = 150,
    k0: Annotated[int, typer.Option(min=1, help="The neighbour that distances scale by.")] = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    cluster: OnCluster = "here",
    dry_run: DryRun = False,
) -> None:
    """Build the difficulty bands of the training images by exact nearest neighbours."""
    from tripletkit import submission

    options = {"neighbors": neighbors, "k0": k0, "force": force}
    raise typer.Exit(
        submission.start("bands", load(config, overrides), options, cluster, dry_run=dry_run)
    )


@app.command("split")
def split(
    source: Annotated[Path, typer.Argument(help="Parquet file, folder or glob.")],
    out: Annotated[Path, typer.Argument(help="Folder for train, val and test.parquet.")],
    val: Annotated[float, typer.Option(min=0, max=1, help="Share of the buildings.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of the buildings.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 42,
) -> None:
    """Split by building; rows added later never move a building to another split."""
    from tripletkit import stages

    if val + test >= 1:
        raise ConfigError(f"--val {val} and --test {test} leave nothing to train on")
    fractions = {"train": 1 - val - test, "val": val, "test": test}
    fractions = {name: share for name, share in fractions.items() if share > 0}
    raise typer.Exit(stages.split_data(source, out, fractions=fractions, seed=seed))
