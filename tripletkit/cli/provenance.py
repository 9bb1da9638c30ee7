"""`tripletkit diff | rerun`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tripletkit.cli.options import (
    SLURM_FLAGS,
    STUDY_FLAG,
    AsJson,
    ConfigFile,
    DryRun,
    OnCluster,
    Overrides,
    flags,
    load,
    load_study,
)
from tripletkit.errors import ConfigError

A_RUN = (
    "Its folder; a trial of the study by its number (7, trial:7); or the name of a folder in or "
    "beside checkpoint_dir."
)
_TRIAL = re.compile(r"(?:trial:)?(?:trial_)?(\d+)")


@flags("tuning", STUDY_FLAG)
def diff(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help=A_RUN, show_default=False)],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="The same.", show_default=False)],
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show where two runs differ: result, configuration, data, code and machine."""
    import json

    from tripletkit import compare, differences, log

    folders = [_folder(name, config, overrides) for name in (run_a, run_b)]
    found = compare.compare(*(compare.open_run(folder) for folder in folders))
    if as_json:
        log.out.print_json(json.dumps(found))
    else:
        differences.show(found)


@flags("tuning", STUDY_FLAG)
@flags("slurm", SLURM_FLAGS)
def rerun(
    run: Annotated[str, typer.Argument(metavar="RUN", help=A_RUN, show_default=False)],
    config: ConfigFile = None,
    overrides: Overrides = None,
    into: Annotated[
        Path | None, typer.Option(help="Folder of the new run; default: RUN-rerun.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also when the data is not what it was.")
    ] = False,
    cluster: OnCluster = "here",
    dry_run: DryRun = False,
) -> None:
    """Train a run again, as its folder says, into a new folder, and compare the two.

    The account, partition and the like of a job are those of the configuration of today. --config
    and --study-name also say where trials are looked for; --set changes keys of the run.
    """
    from tripletkit import compare
    from tripletkit import rerun as again
    from tripletkit.config import DEFAULT_FILE

    ours = [text for text in overrides or () if text.startswith("tuning.")]
    theirs = [text for text in overrides or () if not text.startswith("tuning.")]
    found = compare.open_run(_folder(run, config, ours))
    submits = cluster != "here"
    today = load(config, ()) if submits and (config or DEFAULT_FILE.exists()) else None
    raise typer.Exit(
        again.rerun(
            found, theirs, today=today, into=into, cluster=cluster, anyway=anyway, dry_run=dry_run
        )
    )


def _folder(name: str, config: Path | None, overrides: list[str] | None) -> Path:
    """The folder of a run that goes by a path, a trial's number or the run's name."""
    from tripletkit.paths import study_paths

    if Path(name).is_dir():
        return Path(name)
    loaded = load_study(config, overrides)
    study, checkpoints = study_paths(loaded), loaded.checkpoint_dir
    found = [checkpoints / name, checkpoints.parent / name]
    if trial := _TRIAL.fullmatch(name):
        found.insert(0, study.trial(int(trial[1])).root)
    for folder in found:
        if folder.is_dir():
            return folder
    trials = len(list(study.root.glob("trial_*")))
    raise ConfigError(
        f"there is no run {name!r}",
        hint=f"looked for a folder {name}, for a trial of study {loaded.tuning.study_name} "
        f"({trials} in {study.root}), in {checkpoints} and beside it",
    )


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (diff, rerun):
        app.command(command.__name__)(command)
