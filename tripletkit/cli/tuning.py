"""`tripletkit tune | submit-best`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tripletkit.cli.options import (
    SLURM_FLAGS,
    STUDY_FLAGS,
    Cluster,
    ConfigFile,
    DryRun,
    Overrides,
    Webhook,
    flags,
    load,
    load_study,
)

TUNING_FLAGS = {
    **STUDY_FLAGS,
    "study_name": "Name of the study, of its folder and its jobs.",
    "output_dir": "Holds a folder per study, and in it one per trial.",
    "workers": "Workers that share the study.",
    "trials_per_worker": "Trials of a worker on average.",
    "trials_per_gpu": "Trials at once on each GPU of a worker.",
    "n_trials": "Exact total of the study instead of workers * trials per worker.",
    "budget_gpu_hours": "No trial starts that would exceed so many GPU-hours, without GPUs worker-hours; 0: "
    "no limit.",
    "max_epochs": "Epochs of one trial.",
    "objective": "What a trial is judged by: val_loss, recall@K, map@r, mrr, r_precision.",
    "sampler": "tpe or random.",
    "pruner": "median, successive_halving or none.",
}

SomeCluster = Annotated[
    Cluster | None,
    typer.Option(
        help="here: in this process; local: in the background of this machine; slurm: as jobs. "
        "Default: slurm where there is an sbatch, else local.",
        show_default=False,
    ),
]
DisableWandb = Annotated[
    bool, typer.Option("--disable-wandb", help="Do not report to W&B, whatever the file says.")
]
Prepare = Annotated[
    bool,
    typer.Option(
        "--prepare", help="Only write the jobs' configuration and print its path, for sbatch files."
    ),
]


@flags("tuning", TUNING_FLAGS)
@flags("slurm", {**SLURM_FLAGS, "max_concurrent": "Workers at once; 0 is no limit."})
def tune(
    config: ConfigFile = None,
    overrides: Overrides = None,
    cluster: SomeCluster = None,
    disable_wandb: DisableWandb = False,
    prepare: Prepare = False,
    webhook: Webhook = None,
    dry_run: DryRun = False,
) -> None:
    """Search hyperparameters with workers that share a study; again, it goes on."""
    from tripletkit import notify, submission

    loaded = load(config, _without_wandb(overrides, disable_wandb))
    url = notify.address(webhook)
    raise typer.Exit(
        submission.tune(loaded, cluster, prepare=prepare, dry_run=dry_run, webhook=url)
    )


@flags("tuning", STUDY_FLAGS)
@flags("slurm", SLURM_FLAGS)
def submit_best(
    config: ConfigFile = None,
    overrides: Overrides = None,
    source: Annotated[
        Literal["study", "wandb"],
        typer.Option("--from", help="Where the best trial is looked for."),
    ] = "study",
    trial: Annotated[
        int | None, typer.Option(min=0, help="This trial of the study instead of the best.")
    ] = None,
    cluster: SomeCluster = None,
    disable_wandb: DisableWandb = False,
    prepare: Prepare = False,
    webhook: Webhook = None,
    dry_run: DryRun = False,
) -> None:
    """Train with the best trial's parameters on all the data, to the end."""
    from tripletkit import notify, submission

    url = notify.address(webhook)
    loaded = load_study(config, _without_wandb(overrides, disable_wandb))
    best = submission.find_best(loaded, source, trial)
    raise typer.Exit(
        submission.submit_best(loaded, best, cluster, prepare=prepare, dry_run=dry_run, webhook=url)
    )


def _without_wandb(overrides: list[str] | None, disable: bool) -> list[str]:
    return [*(overrides or []), *(["logging.wandb_enabled=false"] if disable else [])]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("tune")(tune)
    app.command("submit-best")(submit_best)
