"""The best trial, of the study or of a W&B project, and the final training that it leads to."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState

from tripletkit import config as configuration
from tripletkit.config import Config, section_of
from tripletkit.config.sections import RETRIEVAL_METRIC
from tripletkit.errors import ConfigError, StorageError
from tripletkit.log import logger
from tripletkit.tune.claims import CAUSE, OBJECTIVE
from tripletkit.tune.space import LEARNED

PATIENCE = 10  # validations; the final training always stops early
NOISE = 0.01  # relative; a final value that is worse by more needs an explanation


class Best(NamedTuple):
    """A trial that is worth the full training."""

    source: str
    """Where it comes from: "study streetview, trial 12" or "W&B lab/street run trial_00012"."""
    number: int | None
    """The trial's number; None for a W&B run whose name holds none."""
    metric: str
    """The metric that it was chosen by."""
    value: float
    """Its best value of that metric."""
    epoch: int | None
    """The epoch of that value, if known."""
    params: dict[str, Any]
    """Keys of [training] or [training_model], as in [tuning.space.<key>], and their values."""
    name: str
    """What the final run is called after: "streetview_00012", or the W&B run and its id."""


def from_study(study: optuna.Study, objective: str, number: int | None = None) -> Best:
    """The best complete trial of `study`, or trial `number`, which must be complete too.

    Raises ConfigError when `number` cannot be used or the study's trials were judged by something
    else than `objective`, and StorageError when no trial is complete yet.
    """
    name = study.study_name
    judged_by = study.user_attrs.get(OBJECTIVE, objective)
    if judged_by != objective:
        raise ConfigError(
            f"study {name} judged its trials by {judged_by}, tuning.objective is {objective}",
            hint=f"--set tuning.objective={judged_by}, or name another study",
        )
    trials = study.get_trials(deepcopy=False)
    if number is not None:
        trial = _named_trial(name, trials, number)
    elif any(trial.state is TrialState.COMPLETE for trial in trials):
        trial = study.best_trial
    else:
        states = Counter(_state(trial) for trial in trials)
        raise StorageError(
            f"study {name} has no complete trial: {_counted(states) or 'no trial at all'}",
            hint="`tripletkit status` shows how far it is",
        )
    assert trial.value is not None
    reports = sorted(trial.intermediate_values.items())
    return Best(
        source=f"study {name}, trial {trial.number}",
        number=trial.number,
        metric=objective,
        value=trial.value,
        epoch=next((epoch for epoch, value in reports if value == trial.value), None),
        params=dict(trial.params),
        name=f"{name}_{trial.number:05d}",
    )


def _named_trial(
    study: str, trials: Sequence[optuna.trial.FrozenTrial], number: int
) -> optuna.trial.FrozenTrial:
    trial = next((trial for trial in trials if trial.number == number), None)
    if trial is not None and trial.state is TrialState.COMPLETE:
        return trial
    complete = [str(t.number) for t in trials if t.state is TrialState.COMPLETE]
    shown = ", ".join(complete[:10]) + (", ..." if len(complete) > 10 else "")
    instead = f"complete trials: {shown}" if complete else "no trial is complete yet"
    if trial is None:
        raise ConfigError(f"study {study} has no trial {number}", hint=instead)
    message = f"trial {number} of study {study} is {_state(trial)}, not complete"
    if trial.state is TrialState.FAIL:
        why = trial.user_attrs.get(CAUSE, {}).get("message")
        message += f": {why}" if why else ""
        instead = f"`tripletkit why {number}` tells more; {instead}"
    raise ConfigError(message, hint=instead)


def _state(trial: optuna.trial.FrozenTrial) -> str:
    return "failed" if trial.state is TrialState.FAIL else trial.state.name.lower()


def _counted(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def from_wandb(config: Config) -> Best:
    """The best finished W&B run of `logging.wandb_project` ("project" or "entity/project").

    Only runs called like `training.best_training_trial_name_pattern` count. They are ranked by
    the best value that `training.best_training_metric_name` had in their history, or by their
    summary where the history lacks it (it is read together with `epoch`); a name with "loss" in
    it is to be low, any other high.

    The parameters are those that [tuning.space] names, and with an empty space all that shape
    what is learned (`LEARNED`). They are looked up in the run's configuration as our tracker
    writes it (a table per section), else at its top level. A parameter that the run does not
    record, and one outside the space in which the run differs from `config`, is a warning.

    Raises ConfigError (wandb missing, no or a bad API key, no such project, run or metric) and
    StorageError (W&B cannot be reached, or no run is finished yet).
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "the best run is to come from Weights & Biases, but wandb is not installed",
            hint="pip install 'tripletkit[wandb]'",
        ) from None
    training = config.training
    metric = training.best_training_metric_name
    with _explained():
        runs = wandb.Api().runs(config.logging.wandb_project, per_page=200)
        project = f"{runs.entity}/{runs.project}"
        try:
            listed = list(runs)
        except ValueError:
            raise ConfigError(
                f"there is no W&B project {project}, or your API key may not see it",
                hint='set logging.wandb_project to "project" or "entity/project"',
            ) from None
    finished = _finished(listed, training.best_training_trial_name_pattern, project)
    choose: Callable[..., Any] = min if "loss" in metric else max

    def peak(run: Any) -> tuple[float, int | None] | None:
        rows = run.history(keys=["epoch", metric], samples=10_000, pandas=False)
        values = [(row[metric], int(row["epoch"])) for row in rows if _is_number(row[metric])]
        if values:
            return choose(values, key=lambda pair: pair[0])  # type: ignore[no-any-return]
        last = run.summary.get(metric)
        return (last, None) if _is_number(last) else None

    with _explained(), ThreadPoolExecutor(8) as pool:  # a request per run
        peaks = list(pool.map(peak, finished))
        ranked = [(*found, run) for found, run in zip(peaks, finished, strict=True) if found]
        if not ranked:
            aside = ("_", "epoch", "raw/", "band_")
            names = [k for k in sorted(finished[0].summary.keys()) if not k.startswith(aside)]
            raise ConfigError(
                f"no run of W&B {project} has the metric {metric!r}",
                hint="set training.best_training_metric_name to one of " + ", ".join(names),
            )
        value, epoch, run = choose(ranked, key=lambda entry: entry[0])
        recorded = run.config
    number = re.search(r"trial_(\d+)", run.name)
    source = f"W&B {project} run {run.name}"
    return Best(
        source=source,
        number=int(number[1]) if number else None,
        metric=metric,
        value=value,
        epoch=epoch,
        params=_params(recorded, config, source),
        # The id, because two studies of a project both have a trial_00012.
        name=re.sub(r"[^A-Za-z0-9._-]+", "_", f"{run.name}_{run.id}"),
    )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What the W&B client raises, in one sentence; never with what the server echoes of a key."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("wandb", "requests")):
            raise
        cause = error.__cause__ or error
        if getattr(cause, "response", error) is None:  # neither HTTP status nor answer
            _stop_service()
            raise StorageError(
                "Weights & Biases does not answer",
                hint="check the network and WANDB_BASE_URL; without W&B, take the best trial "
                "from the study",
            ) from error
        if type(error).__name__ in ("AuthenticationError", "UsageError"):
            raise ConfigError(
                "Weights & Biases knows no API key of yours, or refuses it",
                hint="`wandb login` on this machine, or WANDB_API_KEY in the environment",
            ) from error
        raise StorageError(f"Weights & Biases: {error}") from error


def _stop_service() -> None:
    """Stop the process behind the W&B client now, and do not wait for it for long.

    After a request that timed out it can miss that it is to stop, and the client would wait for
    it without end when our process exits (wandb 0.31: one exit in seven).
    """
    import wandb

    stopping = threading.Thread(target=wandb.teardown, daemon=True)
    stopping.start()
    stopping.join(timeout=5)


def _finished(runs: Sequence[Any], pattern: str, project: str) -> list[Any]:
    """The runs that are called like `pattern` and finished."""
    matching = [run for run in runs if fnmatch.fnmatchcase(run.name or "", pattern)]
    if not matching:
        names = ", ".join(sorted({str(run.name) for run in runs})[:3])
        raise ConfigError(
            f"no run of W&B {project} is called {pattern!r}; "
            + (f"it has, for example, {names}" if names else "it has no runs at all"),
            hint="set training.best_training_trial_name_pattern (* and ? stand for anything)",
        )
    finished = [run for run in matching if run.state == "finished"]
    others = _counted(Counter(run.state for run in matching if run.state != "finished"))
    if not finished:
        raise StorageError(
            f"no run of W&B {project} called {pattern!r} is finished: {others}",
            hint="wait for one, or take the best trial from the study",
        )
    logger.info(
        "W&B %s: %d finished runs are called %r%s",
        project,
        len(finished),
        pattern,
        f"; left out: {others}" if others else "",
    )
    return finished


def _is_number(value: object) -> bool:
    """W&B writes "NaN" and "Infinity" as text."""
    return isinstance(value, int | float) and math.isfinite(value)


def _params(recorded: Mapping[str, Any], config: Config, source: str) -> dict[str, Any]:
    """The parameters in a run's configuration, with a warning about what they do not cover."""

    def lookup(key: str) -> Any:
        table = recorded.get(section_of(key))
        return table[key] if isinstance(table, dict) and key in table else recorded.get(key)

    wanted = tuple(config.tuning.space) or LEARNED
    params = {key: value for key in wanted if (value := lookup(key)) is not None}
    if not params:
        raise ConfigError(
            f"the configuration of {source} has none of " + ", ".join(wanted),
            hint="was it written by `tripletkit tune`? [tuning.space] names what is looked for",
        )
    if missing := [key for key in wanted if key not in params]:
        logger.warning(
            "%s does not record %s: your configuration decides", source, ", ".join(missing)
        )
    other = []
    for key in LEARNED:
        ours, theirs = getattr(getattr(config, section_of(key)), key), lookup(key)
        if key not in wanted and theirs is not None and theirs != ours:
            other.append(f"{section_of(key)}.{key} = {theirs!r} (yours: {ours!r})")
    if other:
        logger.warning(
            "%s was trained with %s; yours is used, as [tuning.space] does not name it",
            source,
            ", ".join(other),
        )
    return params


def final_config(config: Config, best: Best, *, folder: Path | None = None) -> Config:
    """The configuration of the final training: the trial's parameters, all data, all epochs.

    It goes on by itself after an interruption, stops early (after PATIENCE validations unless the
    configuration says when), and monitors what the trial was chosen by; a metric that cannot be
    monitored, such as train_loss, gives way to `tuning.objective`. Everything is written to
    `folder`, by default `<checkpoint_dir>/best_<best.name>`. Raises ConfigError naming the
    parameter that cannot be used.
    """
    tuned: dict[str, dict[str, Any]] = {"training": {}, "training_model": {}}
    for key, value in best.params.items():
        try:
            tuned[section_of(key)][key] = value
        except ValueError:
            raise ConfigError(
                f"{best.source} has a parameter {key!r}, which is no key that can be tuned",
                hint="was it made by another version? give its parameters with --set instead",
            ) from None
    monitorable = re.fullmatch(rf"val_loss|{RETRIEVAL_METRIC}", best.metric)
    monitor = best.metric if monitorable else config.tuning.objective
    top_k = config.training.retrieval_metric_top_k
    if monitor.startswith("recall@"):
        top_k = sorted({*top_k, int(monitor.removeprefix("recall@"))})
    run = f"best_{best.name}"
    return configuration.with_values(
        config,
        paths={"checkpoint_dir": (folder or config.checkpoint_dir / run).absolute()},
        training_model=tuned["training_model"],
        training={
            **tuned["training"],
            "sample_fraction": 1.0,
            "sample_buildings": 0,
            "val_sample_fraction": 1.0,
            "val_sample_buildings": 0,
            "monitor": monitor,
            "retrieval_metric_top_k": top_k,
            "early_stopping_patience": config.training.early_stopping_patience or PATIENCE,
            "resume_from_checkpoint": "auto",
        },
        logging={"wandb_run_name": run} if config.logging.wandb_enabled else {},
    )


def comparison(best: Best, metrics: Mapping[str, float], epoch: int | None = None) -> str:
    """The trial's metric beside that of the final training's best `epoch`, for the user.

    A second line warns when the final value is worse by more than NOISE of the trial's.
    """
    trial = f"{best.metric}: {best.name if best.number is None else f'trial {best.number}'}"
    line = f"{trial} {best.value:.4f}{_at(best.epoch)} -> final "
    if best.metric not in metrics:
        return line + "not computed"
    final = metrics[best.metric]
    line += f"{final:.4f}{_at(epoch)}"
    worse = (final - best.value) * (1 if "loss" in best.metric else -1)
    if worse > NOISE * abs(best.value):
        line += (
            f"\nwarning: the final training is worse than the trial by {worse:.4f}. If the trials "
            "validated on a sample of the buildings, their gallery was smaller and their numbers "
            "flatter them; else look at metrics.jsonl for when it fell behind."
        )
    return line


def _at(epoch: int | None) -> str:
    return "" if epoch is None else f" (epoch {epoch})"
