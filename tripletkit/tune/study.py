"""Preparing a study, once, in the process that launches its workers."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Collection

from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.config import Choice, Config, Tuning
from tripletkit.errors import ConfigError, StorageError
from tripletkit.log import logger
from tripletkit.paths import StudyPaths
from tripletkit.tune import storage
from tripletkit.tune.claims import OBJECTIVE
from tripletkit.tune.storage import SharedStudy

ID = "tripletkit:id"
TOTAL = "tripletkit:n_trials"
CHOICES = "tripletkit:choices"


def prepare(config: Config, paths: StudyPaths) -> SharedStudy:
    """Create the study or check that it goes with the configuration; write its folder.

    The same flags again go on with a study that stopped early; a larger total extends it.
    Raises ConfigError if the study or the folder belongs to something else.
    """
    _check_objective(config)
    shared = storage.create(config.tuning)
    with shared.turn():
        attributes = shared.study.user_attrs
        _check_identity(shared, paths)
        _keep(shared, OBJECTIVE, config.tuning.objective)
        choices = {k: r.choices for k, r in config.tuning.space.items() if isinstance(r, Choice)}
        _keep(shared, CHOICES, {**attributes.get(CHOICES, {}), **choices})
        if attributes.get(TOTAL, 0) > config.tuning.total:
            logger.warning(
                "study %s was to have %d trials, now %d",
                config.tuning.study_name, attributes[TOTAL], config.tuning.total,
            )  # fmt: skip
        shared.study.set_user_attr(TOTAL, config.tuning.total)
    effective = configuration.with_values(config, tuning={"n_trials": config.tuning.total})
    fsio.write_text(paths.config, configuration.dump(effective))
    return shared


def check_reach(tuning: Tuning, hosts: Collection[str]) -> None:
    """SQLite is for the processes of one host, and Slurm's nodes are others, mostly.

    Raises StorageError.
    """
    here = socket.gethostname().partition(".")[0]
    others = sorted(set(hosts) - {here, "localhost"})
    if storage.kind_of(tuning) == "sqlite" and others:
        raise StorageError(
            f"{tuning.storage_path} is SQLite, for processes of this host ({here}) only, and the "
            f"workers are to run on {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}",
            hint=storage.WAYS_OUT,
        )


def _check_objective(config: Config) -> None:
    if config.paths.val_parquet_path is None:
        raise ConfigError(
            "paths.val_parquet_path is not set: trials are judged on validation data",
            hint="`tripletkit data split` makes some from the training file",
        )


def _check_identity(shared: SharedStudy, paths: StudyPaths) -> None:
    """A folder holds the trials of one study: an older one of the same name would mix in."""
    ours = shared.study.user_attrs.get(ID)
    if paths.identity.exists():
        theirs = json.loads(paths.identity.read_text())["id"]
        if theirs != ours:
            raise ConfigError(
                f"{paths.root} holds the trials of another study named {shared.study.study_name!r}",
                hint="choose another --study-name or tuning.output_dir, or move the folder away",
            )
        return
    if ours is None:
        ours = secrets.token_hex(8)
        shared.study.set_user_attr(ID, ours)
    fsio.write_json(paths.identity, {"id": ours, "host": socket.gethostname()})


def _keep(shared: SharedStudy, key: str, value: object) -> None:
    """Set a study attribute that must not change while there are trials."""
    before = shared.study.user_attrs.get(key)
    if before == value:
        return
    changed = (
        any(before[k] != v for k, v in value.items() if k in before)
        if isinstance(before, dict) and isinstance(value, dict)
        else before is not None
    )
    if changed and shared.study.get_trials(deepcopy=False):
        raise ConfigError(
            f"study {shared.study.study_name!r} has trials with another "
            f"{key.removeprefix('tripletkit:')}: {before}, now {value}",
            hint="choose another --study-name",
        )
    shared.study.set_user_attr(key, value)
