"""One worker: takes trials of the shared study until there is nothing left to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import optuna
import torch

from tripletkit import config as configuration
from tripletkit import fsio, log
from tripletkit.cluster.jobs import LOCAL
from tripletkit.config import Config
from tripletkit.errors import (
    ConfigError,
    DataError,
    DivergedError,
    RunError,
    StorageAway,
    TripletkitError,
    is_out_of_memory,
)
from tripletkit.log import logger
from tripletkit.paths import StudyPaths, TrialPaths
from tripletkit.train import checkpoint, loop
from tripletkit.train.assembly import Data
from tripletkit.train.trackers import read_metrics
from tripletkit.tune import attempts, budget, claims, cost, space
from tripletkit.tune.claims import Claim, JobStates, Worker
from tripletkit.tune.storage import SharedStudy

# Three in a row are no accident: something is wrong with the data, the machine or the space.
FAILURES_IN_A_ROW = 3
# Killed so often at the same epoch, a trial will be killed again (memory, mostly).
KILLS_IN_A_ROW = 3
# What a trial needs at least: start, one epoch and a checkpoint. Learned from the first one.
FIRST_EPOCH_SECONDS = 60.0
# For so long we wait for another process to leave the trial's folder.
BUSY_SECONDS = 600
# Of a worker's time, at the most this share goes into asking the storage about pruning.
ASKING_SHARE = 0.02


class TakenOver(Exception):  # noqa: N818 - not an error
    """Another worker goes on with our trial: the scheduler said that our job was gone."""


@dataclass(frozen=True)
class Surroundings:
    """What a worker has to be told: which jobs live, and when to stop."""

    load_data: Callable[[Config], Data]  # opens what a trial's configuration names
    job_states: JobStates
    should_stop: Callable[[], bool]
    seconds_left: Callable[[], float]  # to the time limit; infinite without one


class Ended(NamedTuple):
    """How a trial ended here. Stopped before its first step, it made no progress."""

    outcome: Literal["complete", "pruned", "stopped", "failed", "taken over"]
    progress: bool = True


@dataclass
class Summary:
    """What a worker did; `open` says whether there is work left that it could do.

    `outdated`: why it did no more of it, when the study was prepared otherwise meanwhile.
    """

    ended: list[str] = field(default_factory=list)
    progress: bool = False
    open: bool = False
    outdated: str = ""


def run(
    shared: SharedStudy,
    config: Config,
    paths: StudyPaths,
    worker: Worker,
    surroundings: Surroundings,
) -> Summary:
    """Work until the study has its total or its budget is used up, or until time is up.

    Raises RunError after three failed trials in a row, and at once what is no fault of a trial:
    ConfigError, DataError, StorageError.
    """
    should_stop, seconds_left = surroundings.should_stop, surroundings.seconds_left
    summary, failures, needed = Summary(), 0, FIRST_EPOCH_SECONDS
    slurm, name = not worker.job.startswith(LOCAL), config.tuning.study_name
    outdated = ""
    purse, held = budget.Budget(config, paths, slurm=slurm), cost.share(config, slurm=slurm)

    def may_start(*asked: Any) -> bool:
        """In our turn at the study, so that the newest answer is what it keeps."""
        nonlocal outdated
        if outdated := _prepared_otherwise(config, paths):
            return False
        allowed = purse.allows(*asked)
        budget.note(shared, purse.refused)
        return allowed

    while not should_stop():
        if seconds_left() < needed:
            logger.info("%.0f s to the time limit: too few for another trial", seconds_left())
            break
        total, job_states = config.tuning.total, surroundings.job_states
        if purse.limit:  # files may be many and slow: before it is our turn
            purse.measure(shared.study.get_trials(deepcopy=False))
        claim = claims.claim(shared, worker, total, job_states, may_start)
        if claim is None:
            _say_why(name, outdated or purse.refused)
            _clear_away(config, _over(shared, paths))
            summary.outdated = outdated
            summary.open = bool(outdated)  # in its next start a job reads the new configuration
            return summary
        proven = not {"complete", "pruned"}.isdisjoint(summary.ended)
        trial = _Trial(claim, config, paths.trial(claim.trial.number), held=held, proven=proven)
        ended = trial.run(surroundings.load_data, should_stop)
        needed = trial.first_epoch_seconds or needed
        summary.ended.append(ended.outcome)
        summary.progress |= ended.progress
        failures = failures + 1 if ended.outcome == "failed" else 0
        if failures == FAILURES_IN_A_ROW:
            raise RunError(
                f"{failures} trials in a row failed",
                hint=f"see {trial.paths.log} and `tripletkit why {claim.trial.number}`",
            )
    try:
        summary.open = claims.open_trials(shared, config.tuning.total) > 0
    except StorageAway:
        summary.open = True  # nobody can say
    return summary


def _say_why(name: str, refused: object) -> None:
    if refused:
        logger.info("study %s: %s", name, refused)
    else:
        logger.info("nothing left to do in study %s", name)


def _over(shared: SharedStudy, paths: StudyPaths) -> Iterator[TrialPaths]:
    """Trials that are over: who told the study of an end may have been killed before it cleared away."""
    for trial in shared.study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            yield paths.trial(trial.number)


def _clear_away(config: Config, over: Iterable[TrialPaths]) -> None:
    """Of trials that are over, and so never go on, delete the checkpoints nobody asked for."""
    if config.tuning.keep_checkpoints != "best":
        return
    for paths in over:
        for path in paths.saved():
            if path != paths.best:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:  # the trial is well
                    logger.warning("%s stays: %s", path, error.strerror or error)


def _prepared_otherwise(config: Config, paths: StudyPaths) -> str:
    """That the study's folder has other values by now of what trials depend on; "" if it has not."""
    if not paths.config.exists():
        return ""
    now = configuration.load(paths.config, environ={})
    changed = space.differences(config, now)
    if all(isinstance(each, dict) for pair in changed.values() for each in pair):
        return ""  # ranges alone: a trial that goes on keeps its values
    return (
        "prepared with another configuration since this worker began, which takes no more trials; "
        f"changed: {', '.join(changed)}"
    )


def _cause(error: Exception) -> tuple[str, str] | None:
    """What about the trial itself made it fail; None if it was something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return "cuda_oom", str(error).splitlines()[0]
    if is_out_of_memory(error):
        return "host_oom", f"out of memory: {str(error).splitlines()[0] if str(error) else ''}"
    if isinstance(error, DivergedError):
        return "nan", error.message
    if isinstance(error, _BadParametersError):
        return "bad_configuration", error.message
    if isinstance(error, TripletkitError | OSError) or "CUDA error" in str(error):
        return None  # configuration, data, storage, disk, a broken GPU
    return "bug", f"{type(error).__name__}: {error}"


class _BadParametersError(ConfigError):
    """Parameters of the trial that cannot be used, whatever the others are."""


class _Trial:
    """One attempt at one trial."""

    def __init__(
        self,
        claim: Claim,
        config: Config,
        paths: TrialPaths,
        *,
        held: Mapping[str, float] | None = None,
        proven: bool = False,
    ) -> None:
        """`held`: its part of the job. `proven`: this worker has trained another, so it can."""
        self.claim = claim
        self.held = held or {}
        self.proven = proven
        self.trial = claim.trial
        self.config = config
        self.objective = config.tuning.objective
        self.paths = paths
        self.attempting = False
        self.signs: Mapping[str, float] = {}
        self.began = 0.0
        self.first_epoch_seconds: float | None = None
        self.asked_at = -float("inf")
        self.asking_took = 0.0

    def run(self, load_data: Callable[[Config], Data], should_stop: Callable[[], bool]) -> Ended:
        """Train the trial, or go on with it, and tell the study how it ended."""
        self.signs = cost.signs_of_life(self.paths)  # of the attempt before this one
        with log.also_to(self.paths.log):
            try:
                if (kills := attempts.killed_in_a_row(self.paths.attempts)) >= KILLS_IN_A_ROW:
                    return self._failed("killed", f"killed {kills} times without getting further")
                self._report_what_is_on_file()
                attempts.begin(
                    self.paths.attempts,
                    self.claim.owner,
                    from_epoch=max(self._reported(), default=0),
                    from_step=self._step_on_file(),
                    facts={**self.held, **self.signs},
                )
                self.attempting = True
                return self._train(load_data, should_stop)
            except optuna.TrialPruned:
                return self._finish("pruned", state=optuna.trial.TrialState.PRUNED)
            except (TakenOver, optuna.exceptions.UpdateFinishedTrialError):
                return self._taken_over()
            except Exception as error:
                if (cause := _cause(error)) is None:
                    self._give_back(str(error), storage=not isinstance(error, StorageAway))
                    raise
                ended = self._failed(*cause)
                if cause[0] == "bug":
                    raise
                return ended

    def _train(self, load_data: Callable[[Config], Data], should_stop: Callable[[], bool]) -> Ended:
        if not self._has_folder(should_stop):
            self._give_back("asked to stop")
            return Ended("stopped", progress=False)
        try:
            params = space.suggest(self.trial, self.config.tuning.space)
            logger.info("trial %d: %s", self.trial.number, json.dumps(params))
            config = space.trial_config(self.config, params, self.paths)
        except ConfigError as error:
            raise _BadParametersError(error.message, hint=error.hint) from error
        data = load_data(config)
        self._drop_torn_checkpoints()
        self.began = time.monotonic()
        try:
            result = loop.train(
                config, data, self.paths, report=self._report, should_stop=should_stop
            )
        except ConfigError as error:  # the trial's, or what all trials have in common
            if not self.proven:
                raise
            raise _BadParametersError(error.message, hint=error.hint) from error
        if result.status == "stopped":
            self._give_back("asked to stop")
            return Ended("stopped", progress=result.steps > 0)
        return self._finish("complete", value=result.best_metrics[self.objective])

    def _has_folder(self, should_stop: Callable[[], bool]) -> bool:
        """Wait for a process that was cut off from the scheduler, until it sees that it lost.

        False if we are asked to stop meanwhile.
        """
        for _ in range(BUSY_SECONDS):
            with fsio.exclusive_lock(self.paths.lock, wait=False) as lock:
                if lock.ours:
                    return True
            if should_stop():
                return False
            time.sleep(1)
        return True  # training says who holds it

    def _report(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Tell the study an epoch's value; ends the trial if it is pruned, or no longer ours."""
        if self.first_epoch_seconds is None and epoch > 0:
            self.first_epoch_seconds = time.monotonic() - self.began
        if epoch not in self._reported():
            self.trial.report(metrics[self.objective], epoch)
        if epoch == self.config.tuning.max_epochs:
            return  # it is done anyway
        now = time.monotonic()
        if now - self.asked_at < self.asking_took / ASKING_SHARE:
            return
        if not self.claim.holds():
            raise TakenOver
        # An epoch that is trained again was let pass, and what is judged is the newest report.
        prune = epoch == max(self._reported()) and self.trial.should_prune()
        self.asked_at = time.monotonic()
        self.asking_took = self.asked_at - now
        if prune:
            logger.info("trial %d: pruned at epoch %d", self.trial.number, epoch)
            raise optuna.TrialPruned

    def _report_what_is_on_file(self) -> None:
        """Report epochs that an earlier attempt finished but did not get to report."""
        try:
            records = read_metrics(self.paths.metrics)
        except DataError as error:  # the checkpoints are what training goes on from
            logger.warning("%s: its epochs are not reported again", error.message)
            return
        for record in records:
            if self.objective in record and record["epoch"] not in self._reported():
                self.trial.report(record[self.objective], record["epoch"])

    def _step_on_file(self) -> int:
        """The step of the newest checkpoint."""
        try:
            found = checkpoint.newest(self.paths.saved())
        except DataError:
            return 0  # training says what is wrong with them
        return found[1].get("global_step", 0) if found else 0

    def _drop_torn_checkpoints(self) -> None:
        """If none is whole, start over: it gives the same. Else every worker would die of the trial."""
        saved = self.paths.saved()
        if saved and all(checkpoint.is_torn(path) for path in saved):
            logger.warning("trial %d: no checkpoint is whole: starting it over", self.trial.number)
            for path in saved:
                path.unlink()

    def _reported(self) -> Mapping[int, float]:
        return self.trial._cached_frozen_trial.intermediate_values

    def _finish(self, outcome: Literal["complete", "pruned"], **how: Any) -> Ended:
        if not self.claim.holds():
            return self._taken_over()
        self.claim.shared.study.tell(self.trial, how.get("value"), state=how.get("state"))
        self._note(outcome)
        _clear_away(self.config, [self.paths])
        value = f", {self.objective} {how['value']:.4f}" if "value" in how else ""
        logger.info("trial %d: %s%s", self.trial.number, outcome, value)
        return Ended(outcome)

    def _failed(self, kind: str, message: str) -> Ended:
        if not self.claim.holds():
            return self._taken_over()
        logger.error("trial %d failed (%s): %s", self.trial.number, kind, message)
        self.claim.fail(kind, message)
        if self.paths.attempts.exists():
            at = None if self.attempting else self.signs.get("seen")  # it was killed before we came
            self._note("failed", cause=kind, message=message, at=at)
        _clear_away(self.config, [self.paths])
        return Ended("failed")

    def _taken_over(self) -> Ended:
        logger.warning("trial %d was taken over by another worker", self.trial.number)
        return Ended("taken over")

    def _give_back(self, why: str, *, storage: bool = True) -> None:
        """Let others go on; where the `storage` is away, our job itself does when it is back."""
        try:
            if storage and not self.claim.holds():
                self._taken_over()
                return
            self._note_end(why)  # before the next owner writes there
            if storage:
                logger.info("trial %d: %s; whoever is free goes on with it", self.trial.number, why)
                self.claim.release()
        except StorageAway as error:
            logger.warning("trial %d stays with this job: %s", self.trial.number, error.message)
            self._note_end(why)

    def _note_end(self, why: str) -> None:
        if self.attempting:
            self._note("stopped", cause="stopped", message=why)

    def _note(self, outcome: str, **how: Any) -> None:
        """In attempts.jsonl. It is the study that counts: a full disk must not keep it from knowing."""
        try:
            attempts.end(self.paths.attempts, outcome, **how)
        except OSError as error:
            logger.warning(
                "%s: cannot note that the attempt ended: %s", self.paths.attempts, error.strerror
            )
