"""From the search space to the parameters of a trial, and from those to its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from tripletkit import config as configuration
from tripletkit.config import Choice, Config, FloatRange, Range, TrainingModel, section_of
from tripletkit.paths import RunPaths

# What shapes the head that comes out, as opposed to how long, where and how verbosely it trains.
LEARNED = (
    *(key for key in TrainingModel.model_fields if key != "input_dim"),
    "batch_size", "learning_rate", "weight_decay", "margin", "loss_distance", "init",
    "negative_sampler", "ucb_reward", "ucb_exploration_constant", "ucb_warmup_samples",
    "ucb_discount", "ucb_floor",
)  # fmt: skip
# Which data a trial sees.
FILES = ("train_parquet_path", "val_parquet_path", "difficulty_metadata_path")
SAMPLES = ("sample_fraction", "sample_buildings", "val_sample_fraction", "val_sample_buildings")


def suggest(trial: optuna.Trial, space: Mapping[str, Range]) -> dict[str, Any]:
    """The trial's value of each key; a trial that goes on keeps all that it has."""
    params = dict(trial.params)
    for key, range_ in space.items():
        if key in params:
            continue
        if isinstance(range_, Choice):
            params[key] = trial.suggest_categorical(key, range_.choices)
        elif isinstance(range_, FloatRange):
            params[key] = trial.suggest_float(key, range_.low, range_.high, log=range_.log)
        else:
            params[key] = trial.suggest_int(
                key, range_.low, range_.high, step=range_.step, log=range_.log
            )
    return params


def differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that make trials of the two differ: both values; of a tuned one its range, a dict."""
    keys = dict.fromkeys([*LEARNED, *SAMPLES, *before.tuning.space, *now.tuning.space])
    names = [(section_of(key), key) for key in keys] + [("paths", key) for key in FILES]
    names += [("tuning", "max_epochs"), ("global", "seed")]
    raw = [config.model_dump(by_alias=True) for config in (before, now)]
    found = {}
    for section, key in names:
        old, new = (each["tuning"]["space"].get(key, each[section][key]) for each in raw)
        if old != new:
            found[f"{section}.{key}"] = (old, new)
    return found


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
