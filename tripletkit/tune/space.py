"""From the search space to the parameters of a trial, and from those to its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from tripletkit import config as configuration
from tripletkit.config import Choice, Config, FloatRange, Range, section_of
from tripletkit.paths import RunPaths


def suggest(trial: optuna.Trial, space: Mapping[str, Range]) -> dict[str, Any]:
    """The trial's value of each key; a trial that goes on keeps those that it has."""
    params: dict[str, Any] = {}
    for key, range_ in space.items():
        if isinstance(range_, Choice):
            params[key] = trial.suggest_categorical(key, range_.choices)
        elif isinstance(range_, FloatRange):
            params[key] = trial.suggest_float(key, range_.low, range_.high, log=range_.log)
        else:
            params[key] = trial.suggest_int(
                key, range_.low, range_.high, step=range_.step, log=range_.log
            )
    return params


def trial_config(config: Config, params: Mapping[str, Any], paths: RunPaths) -> Config:
    """The configuration of a trial: judged by the objective, in its own folder.

    Raises ConfigError for parameters that do not go together.
    """
    objective = config.tuning.objective
    values: dict[str, dict[str, Any]] = {"training": {}, "training_model": {}}
    for key, value in params.items():
        values[section_of(key)][key] = value
    top_k = set(config.training.retrieval_metric_top_k)
    if objective.startswith("recall@"):
        top_k.add(int(objective.removeprefix("recall@")))
    values["training"] |= {
        "num_epochs": config.tuning.max_epochs,
        "monitor": objective,
        "retrieval_metric_top_k": sorted(top_k),
        "resume_from_checkpoint": "auto",
        "save_every_n_epochs": config.tuning.max_epochs,  # few files: the best and the newest do
    }
    return configuration.with_values(
        config,
        **values,
        paths={"checkpoint_dir": paths.root},
        logging={"log_file": None, "wandb_run_name": paths.root.name},
    )
