"""`tripletkit evaluate`: what a trained head is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tripletkit.cli.options import (
    SLURM_FLAGS,
    AsJson,
    ConfigFile,
    DryRun,
    OnCluster,
    Overrides,
    flags,
    load,
)
from tripletkit.errors import ConfigError


@flags("slurm", SLURM_FLAGS)
def evaluate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the best one in checkpoint_dir.")
    ] = None,
    as_json: AsJson = False,
    cluster: OnCluster = "here",
    dry_run: DryRun = False,
) -> None:
    """Print retrieval metrics of a split: the raw embeddings beside the trained head."""
    from tripletkit import stages, submission

    if split not in stages.SPLITS:
        raise ConfigError(f"--split is {split!r}", hint="one of train, val, test")
    options = {
        "split": split,
        "checkpoint": str(checkpoint.absolute()) if checkpoint else None,
        "as_json": as_json,
    }
    loaded = load(config, overrides)
    raise typer.Exit(submission.start("evaluate", loaded, options, cluster, dry_run=dry_run))


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (evaluate,):
        app.command(command.__name__)(command)
