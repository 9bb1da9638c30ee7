"""`tripletkit init | train | demo`."""

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
    Webhook,
    flags,
    load,
)
from tripletkit.errors import ConfigError
from tripletkit.log import out


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("config.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented config.toml with every key and its default."""
    from tripletkit import config, fsio

    if path.exists() and not force:
        raise ConfigError(f"{path} exists", hint="--force replaces it")
    fsio.write_text(path, config.template())
    out.print(f"wrote {path}: set paths.train_parquet_path in it next", soft_wrap=True)


@flags("slurm", SLURM_FLAGS)
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    cluster: OnCluster = "here",
    webhook: Webhook = None,
    dry_run: DryRun = False,
) -> None:
    """Train a projection head, or go on where an earlier run stopped."""
    from tripletkit import notify, submission

    url = notify.address(webhook)
    loaded = load(config, overrides)
    raise typer.Exit(submission.start("train", loaded, {}, cluster, dry_run=dry_run, webhook=url))


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for everything it writes.")] = Path("demo"),
) -> None:
    """Run the whole job on real data made from fonts: a few minutes on two cores."""
    from tripletkit import demo

    raise typer.Exit(demo.run(folder))


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (init, train, demo):
        app.command(command.__name__)(command)
