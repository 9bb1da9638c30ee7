"""What users may ask a report of: a run or a study, by its folder or its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.errors import ConfigError
from tripletkit.monitor.inventory import of_study
from tripletkit.paths import StudyPaths, run_paths, study_paths

_TRIAL = re.compile(r"(?:trial:)?(?:trial_)?(\d+)")


@dataclass(frozen=True)
class Target:
    """A run or a study, and its configuration: `checkpoint_dir` or `[tuning]` say where it is."""

    kind: Literal["run", "study"]
    config: Config


def find(text: str | None, config: Config, overrides: Sequence[str] = ()) -> Target:
    """What `text` names; the run of the configuration without one. `config` is `load_study`'s.

    A folder comes before a name, and a study before a trial and a run of its name. A run is read
    with the configuration in its folder, and `overrides`; what a job asks of Slurm is `config`'s. Raises ConfigError that lists what there
    is.
    """
    if text is None:
        if is_run(config.checkpoint_dir):
            return _run(config.checkpoint_dir, config, overrides)
        raise ConfigError(
            f"there is no run in {config.checkpoint_dir}", hint="\n".join(_offer(config))
        )
    folder = Path(text).expanduser().resolve()
    if is_study(folder):
        return _study(folder, config)
    if is_run(folder):
        return _run(folder, config, overrides)
    if re.fullmatch(r"[\w.-]+", text):
        own = study_paths(config)
        if text == config.tuning.study_name or is_study(config.output_dir / text):
            return _study(config.output_dir / text, config)
        named = [config.checkpoint_dir / text, config.checkpoint_dir.parent / text]
        if trial := _TRIAL.fullmatch(text):
            named.insert(0, own.trial(int(trial[1])).root)
        for place in named:
            if is_run(place):
                return _run(place, config, overrides)
    raise ConfigError(f"no run or study is called {text!r}", hint="\n".join(_offer(config)))


def is_run(folder: Path) -> bool:
    """Whether a training has left something there."""
    paths = run_paths(folder)
    return folder.is_dir() and (paths.metrics.exists() or bool(paths.saved()))


def is_study(folder: Path) -> bool:
    """Whether it is the folder of a study."""
    return StudyPaths(folder).identity.exists()


def _run(folder: Path, config: Config, overrides: Sequence[str]) -> Target:
    own = run_paths(folder).config
    # This is where we found it: it may have been moved here.
    paths: dict[str, Path | None] = {"checkpoint_dir": folder}
    slurm = config.slurm.model_dump()  # a report is no part of the run
    if own.exists():
        mine, config = config.paths, configuration.load(own, overrides, environ={})
        if config.paths.test_parquet_path is None:  # training does not need it
            paths["test_parquet_path"] = mine.test_parquet_path
    return Target("run", configuration.with_values(config, paths=paths, slurm=slurm))


def _study(folder: Path, config: Config) -> Target:
    here = configuration.with_values(config, tuning={"output_dir": folder.parent})
    return Target("study", of_study(here, folder.name))


def _offer(config: Config) -> Iterator[str]:
    """What a name could mean."""
    studies = [identity.parent for identity in sorted(config.output_dir.glob("*/study.json"))]
    for study in studies:
        trials = sorted(int(path.name[6:]) for path in study.glob("trial_[0-9]*"))
        yield f"study {study.name}" + (f", trials {trials[0]} to {trials[-1]}" if trials else "")
    root = config.checkpoint_dir
    runs = [path for path in (root, *sorted(root.glob("*"))) if is_run(path)]
    if runs:
        yield "runs: " + ", ".join(str(path) for path in runs)
    yield f"looked at {root} and {config.output_dir}: --config and --study-name say where else"
