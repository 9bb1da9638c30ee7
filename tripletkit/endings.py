"""How a study or a training ended, told to the webhook that it was started with (notify.py)."""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tripletkit import fsio, notify
from tripletkit.cluster import jobs
from tripletkit.config import Config
from tripletkit.errors import DataError
from tripletkit.log import logger
from tripletkit.paths import LogPaths, RunPaths, study_paths

if TYPE_CHECKING:
    from tripletkit.tune.budget import Reached
    from tripletkit.tune.claims import JobStates
    from tripletkit.tune.storage import SharedStudy

WORDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


# Studies


def budget_reached(config: Config, shared: SharedStudy, *, slurm: bool) -> Reached | None:
    """The budget that lets none of the study's trials start now, asked anew; the study keeps it."""
    from tripletkit.tune import budget

    if not config.tuning.budget_gpu_hours:
        budget.note(shared, None)
        return None
    trials = shared.study.get_trials(deepcopy=False)
    reached = budget.asked_anew(config, study_paths(config), trials, _states(config), slurm=slurm)
    budget.note(shared, reached)
    return reached


def tell_of_study(config: Config, *, leaving: bool) -> None:
    """Tell the webhook that the study is over, if it is. Never raises.

    It is over when all its trials are, or when its budget is used up and none runs. If we are
    `leaving` trials that are not, it is also over when no other worker runs or waits.
    """
    file = study_paths(config).webhook
    if not file.exists():
        return
    try:
        found = _ending(config, leaving=leaving)
    except Exception as error:  # noqa: BLE001 - a message is no reason to fail
        logger.warning("cannot tell the webhook how the study ended: %s", error)
        return
    if found is not None:
        notify.send(file, *found)


def _ending(config: Config, *, leaving: bool) -> tuple[str, dict[str, Any]] | None:
    from tripletkit.monitor.inventory import Inventory
    from tripletkit.monitor.status import study_of
    from tripletkit.monitor.why import workers
    from tripletkit.tune import budget, claims, cost

    inventory = Inventory(config, patience=10)
    shared = inventory.study()
    trials = shared.study.get_trials(deepcopy=False)
    total = inventory.total()
    done = sum(trial.state.is_finished() for trial in trials)
    reached = budget.of_study(shared)
    if done >= total and done == len(trials):
        status = "done"
    elif reached is not None and not claims.at_work(trials, _states(config)):
        status = "budget"
    elif leaving and not workers(inventory).keys() - {jobs.current_job()}:
        status = "stopped"
    else:
        return None
    spent = cost.spent(study_paths(config), shared.study)
    states = Counter(trial.state.name for trial in trials)
    counts = {word: states[state] for state, word in WORDS.items()}
    best = study_of(inventory, trials, ()).best
    name, metric = config.tuning.study_name, config.tuning.objective
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "none"
    parts = {
        "done": f"done, {done} trials ({told})",
        "budget": f"{reached} ({told})",
        "stopped": f"stopped, {done} of {total} trials done ({told}), and no worker is left",
    }
    text = f"study {name}: {parts[status]}"
    text += f"; best {metric} {best.value:.4g} (trial {best.number})" if best else ""
    text += f"; {spent.gpu_hours:.3g} {spent.unit}"
    facts = {
        "event": "study", "status": status, "study": name, "total": total, "done": done, **counts,
        "metric": metric, "best_value": best and best.value, "best_trial": best and best.number,
        "spent": round(spent.gpu_hours, 4), "unit": spent.unit, **_here(),
    }  # fmt: skip
    return text, facts


def _states(config: Config) -> JobStates:
    return partial(jobs.states, LogPaths(config.global_.log_dir))


# Trainings


def tell_of_training(stage: str, config: Config, paths: RunPaths, message: str | None) -> None:
    """Tell the webhook that a training is done, or that it failed with `message`. Never raises.

    If another process trains in the folder it was not ours, and its webhook is that of the other.
    """
    if not paths.webhook.exists() or (message is not None and is_busy(paths)):
        return
    status = "done" if message is None else "failed"
    what = "final training" if stage == "best" else "training"
    text = f"{what} {paths.root.name}: {status}"
    facts: dict[str, Any] = {
        "event": "training", "status": status, "run": paths.root.name, **_here(),
    }  # fmt: skip
    if message is not None:
        text += f", {message}"
        facts["message"] = message
    else:
        facts |= _result(config.training.monitor, paths)
        text += (
            f", {facts['metric']} {facts['value']:.4g}" if facts.get("value") is not None else ""
        )
    notify.send(paths.webhook, text, facts)


def is_busy(paths: RunPaths) -> bool:
    """Whether another process trains in this folder at this moment."""
    if not paths.lock.exists():
        return False
    with fsio.exclusive_lock(paths.lock, wait=False) as lock:
        return not lock.ours


def _result(metric: str, paths: RunPaths) -> Mapping[str, Any]:
    """The best value of what the training was judged by, and its epoch."""
    best: tuple[float, int] | None = None
    sign = -1 if metric == "val_loss" else 1
    from tripletkit.train.trackers import read_metrics

    try:
        for record in read_metrics(paths.metrics):
            value = record.get(metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                best = max(best, (sign * value, -record["epoch"])) if best else (
                    sign * value, -record["epoch"],
                )  # fmt: skip
    except (OSError, DataError, KeyError) as error:  # a message is no reason to fail
        logger.warning("%s: the best value is not known: %s", paths.metrics, error)
    value, epoch = (sign * best[0], -best[1]) if best else (None, None)
    return {"metric": metric, "value": value, "epoch": epoch}


def _here() -> dict[str, str]:
    return {"job": jobs.current_job(), "host": socket.gethostname()}
