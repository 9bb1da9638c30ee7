"""Preparing a study, once, in the process that launches its workers."""

from __future__ import annotations

import json
import secrets
import shlex
import socket
from collections.abc import Collection
from pathlib import Path

from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.cluster import resources
from tripletkit.config import Choice, Config, Tuning
from tripletkit.errors import ConfigError, StorageError
from tripletkit.log import logger
from tripletkit.paths import StudyPaths
from tripletkit.tune import budget, postgresql, space, storage
from tripletkit.tune.claims import OBJECTIVE
from tripletkit.tune.retry import Retry
from tripletkit.tune.storage import SharedStudy

ID = "tripletkit:id"
TOTAL = "tripletkit:n_trials"
CHOICES = "tripletkit:choices"
FOLDER = "tripletkit:folder"


def prepare(config: Config, paths: StudyPaths) -> SharedStudy:
    """Create the study or check that it goes with the configuration; write its folder.

    The same flags again go on with a study that stopped early; a larger total extends it.
    Raises ConfigError if the study or the folder belongs to something else, and StorageError if the
    workers do not fit the storage.
    """
    _check_objective(config)
    fsio.check_writable(paths.root, "set tuning.output_dir (--output-dir) to a folder of yours")
    _check_room(config)
    shared = storage.create(config.tuning)
    with shared.turn():
        attributes = shared.study.user_attrs
        _check_identity(shared, paths)
        _check_changes(shared, config, paths)
        _keep(shared, OBJECTIVE, config.tuning.objective)
        # Optuna cannot have a parameter in two kinds.
        kinds = {
            key: range_.choices if isinstance(range_, Choice) else range_.type
            for key, range_ in config.tuning.space.items()
        }
        _keep(shared, CHOICES, {**attributes.get(CHOICES, {}), **kinds})
        if attributes.get(TOTAL, 0) > config.tuning.total:
            logger.warning(
                "study %s was to have %d trials, now %d",
                config.tuning.study_name, attributes[TOTAL], config.tuning.total,
            )  # fmt: skip
        shared.study.set_user_attr(TOTAL, config.tuning.total)
        budget.note(shared, None)  # it may be another one now: the workers ask anew
        # In the turn, so that of two who prepare at once the file and the attributes are one's.
        effective = configuration.with_values(config, tuning={"n_trials": config.tuning.total})
        fsio.write_text(paths.config, configuration.dump(effective))
    return shared


def check_reach(tuning: Tuning, hosts: Collection[str]) -> None:
    """That workers on these hosts reach the study. Slurm's nodes are others than this one, mostly.

    Raises StorageError, also if it is a database of ours that is down.
    """
    here = socket.gethostname().partition(".")[0]
    others = sorted(set(hosts) - {here, "localhost"})
    if not others:
        return
    kind = storage.kind_of(tuning)
    if kind == "sqlite":
        what, hint = "is SQLite", storage.WAYS_OUT
    elif kind == "postgresql" and postgresql.is_private(tuning):
        what = "is a PostgreSQL"
        hint = f"name the server's host in --storage-url as the nodes know it; {storage.WAYS_OUT}"
        if tuning.storage_url is None:
            folder = shlex.quote(str(tuning.storage_path))
            hint = (
                f"`tripletkit db down {folder}`, then `tripletkit db up {folder} --cluster slurm`"
            )
    else:
        return
    raise StorageError(
        f"{storage.location(tuning)} {what} for processes of this host ({here}) only, and the "
        f"workers are to run on {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}",
        hint=hint,
    )


def _check_room(config: Config) -> None:
    """That a server lets all workers in; else those inside would keep out the others for hours."""
    tuning = config.tuning
    if storage.kind_of(tuning) == "postgresql":
        server = postgresql.Server(tuning, Retry(storage.location(tuning), storage.LAUNCH_PATIENCE))
        at_once = min(tuning.workers, config.slurm.max_concurrent or tuning.workers)
        server.check_room(tuning.workers, at_once, resources.slots(config))


def _check_objective(config: Config) -> None:
    if config.paths.val_parquet_path is None:
        raise ConfigError(
            "paths.val_parquet_path is not set: trials are judged on validation data",
            hint="`tripletkit data split` makes some from the training file",
        )
    if config.tuning.objective == "val_loss" and "margin" in config.tuning.space:
        logger.warning(
            "tuning.objective is val_loss and margin is tuned: a small margin makes a small loss, "
            "whatever the head finds; map@r and recall@K do not depend on it"
        )


def _check_identity(shared: SharedStudy, paths: StudyPaths) -> None:
    """A folder holds the trials of one study: an older one of the same name would mix in."""
    ours, folder = (shared.study.user_attrs.get(key) for key in (ID, FOLDER))
    here = str(paths.root.absolute())
    if paths.identity.exists():
        theirs = json.loads(paths.identity.read_text())["id"]
        if theirs != ours:
            raise ConfigError(
                f"{paths.root} holds the trials of another study named {shared.study.study_name!r}",
                hint="choose another --study-name or tuning.output_dir, or move the folder away",
            )
    elif ours is not None and shared.study.get_trials(deepcopy=False):
        # Here they would start again, without their checkpoints.
        raise ConfigError(
            f"study {shared.study.study_name!r} has its trials in {folder or 'another folder'}, "
            f"not in {here}",
            hint=f"--set tuning.output_dir={Path(folder).parent if folder else 'FOLDER'}, or move "
            "that folder here, with its study.json, or choose another --study-name",
        )
    else:
        if ours is None:
            ours = secrets.token_hex(8)
            shared.study.set_user_attr(ID, ours)
        fsio.write_json(paths.identity, {"id": ours, "host": socket.gethostname()})
    if folder != here:
        shared.study.set_user_attr(FOLDER, here)


def _check_changes(shared: SharedStudy, config: Config, paths: StudyPaths) -> None:
    """Trials that are not finished must go on as they began; those to come should compare."""
    trials = shared.study.get_trials(deepcopy=False)
    if not trials or not paths.config.exists():
        return
    changed = space.differences(configuration.load(paths.config, environ={}), config)
    if not changed:
        return
    told = "; ".join(
        f"{key} was {_shown(old)}, is {_shown(new)}" for key, (old, new) in changed.items()
    )
    unfinished = sum(not trial.state.is_finished() for trial in trials)
    only_ranges = all(isinstance(each, dict) for pair in changed.values() for each in pair)
    if unfinished and not only_ranges:
        raise ConfigError(
            f"study {shared.study.study_name!r} has unfinished trials ({unfinished}), which "
            f"would not go on as they began: {told}",
            hint=f"finish them first (`tripletkit tune --config {shlex.quote(str(paths.config))}`), or "
            "choose another --study-name",
        )
    logger.warning("study %s mixes trials that may not compare: %s", shared.study.study_name, told)


def _shown(value: object) -> str:
    """A value, or a range as `space.differences` has it."""
    if isinstance(value, dict):
        return f"tuned ({', '.join(f'{k} {v}' for k, v in value.items() if k != 'type')})"
    return "not set" if value is None else str(value)


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
