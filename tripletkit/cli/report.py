"""`tripletkit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tripletkit.cli.options import (
    SLURM_FLAGS,
    STUDY_FLAGS,
    ConfigFile,
    DryRun,
    OnCluster,
    Overrides,
    flags,
    load_study,
    one_of,
)
from tripletkit.errors import ConfigError
from tripletkit.log import logger
from tripletkit.paths import SPLITS


@flags("tuning", STUDY_FLAGS)
@flags("slurm", SLURM_FLAGS)
def report(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]",
            help="A run or a study: its folder, its name, or the number of a trial. Default: the "
            "run in checkpoint_dir.",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; default: report.html in the folder of the target."
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder for each figure as PNG and PDF.", show_default=False),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Of a run: the embeddings to look at; train, val or test.",
            autocompletion=one_of(*SPLITS),
        ),
    ] = "val",
    cluster: OnCluster = "here",
    dry_run: DryRun = False,
) -> None:
    """Write a page about a run or a study: one HTML file that needs no network."""
    from tripletkit import stages, submission
    from tripletkit.paths import study_paths
    from tripletkit.report import panels, static
    from tripletkit.report import target as targets

    if split not in SPLITS:
        raise ConfigError(f"--split is {split!r}", hint="one of train, val, test")
    panels.require_plotly()
    if figures is not None:
        static.require_matplotlib()
    loaded = load_study(config, overrides)
    found = targets.find(target, loaded, overrides or ())
    if target is None and targets.is_study(study_paths(loaded).root):
        name = loaded.tuning.study_name
        logger.info("there is a study, too: `tripletkit report %s`", name)
    place = output or stages.report_path(found.config, found.kind)
    panels.check_writable(place, "--output")
    if figures is not None:
        panels.check_writable(figures / "figure.png", "--figures")
    options = {
        "of": found.kind,
        "split": split,
        "output": str(place.absolute()),
        "figures": str(figures.absolute()) if figures else None,
    }
    raise typer.Exit(submission.start("report", found.config, options, cluster, dry_run=dry_run))


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("report")(report)
