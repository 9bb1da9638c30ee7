"""Which trial a worker works on next: claims, and trials whose worker is gone.

A trial in work is RUNNING and carries its owner, the job that works on it, as an attribute. Who
lives is asked of the scheduler. A trial that stopped midway goes on under the same number, with
the same parameters, reports and checkpoint, at whichever worker takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tripletkit import fsio
from tripletkit.cluster.jobs import JobState
from tripletkit.log import logger
from tripletkit.tune.storage import SharedStudy, TurnLost

# User attributes of a trial.
OWNER = "tripletkit:owner"
CAUSE = "tripletkit:cause"
# User attributes of the study.
OBJECTIVE = "tripletkit:objective"

# What the scheduler says of a job: "pending" jobs were requeued and come back, "gone" ones never.
JobStates = Callable[[Iterable[str]], Mapping[str, JobState]]


@dataclass(frozen=True)
class Worker:
    """A worker process. `job` stays the same when the job is requeued."""

    job: str
    restart: int
    host: str
    pid: int


@dataclass(frozen=True)
class Claim:
    """A trial that is ours for as long as `holds` says so."""

    shared: SharedStudy
    trial: optuna.Trial
    owner: Mapping[str, Any]

    def holds(self) -> bool:
        """Whether nobody has taken the trial over meanwhile. One read of the storage."""
        stored = self.shared.study._storage.get_trial(self.trial._trial_id)
        return stored.state == TrialState.RUNNING and owner(stored) == self.owner

    def release(self) -> None:
        """Let whoever is free go on with the trial."""
        if self.holds():
            self.shared.study._storage.set_trial_state_values(
                self.trial._trial_id, TrialState.WAITING
            )

    def fail(self, kind: str, message: str) -> None:
        """End the trial as failed, saying why."""
        self.trial.set_user_attr(CAUSE, {"kind": kind, "message": message})
        self.shared.study.tell(self.trial, state=TrialState.FAIL, skip_if_finished=True)


def owner(trial: FrozenTrial) -> dict[str, Any] | None:
    """The job that works on the trial, or did so last."""
    found: dict[str, Any] | None = trial.user_attrs.get(OWNER)
    return found


def claim(shared: SharedStudy, worker: Worker, total: int, job_states: JobStates) -> Claim | None:
    """The next trial for this worker, or None when nothing is left to do.

    In this order: what this job worked on before it was requeued; trials whose job is gone;
    trials that were handed back; a new one while there are fewer than `total`; at last, trials
    whose job was requeued and has not come back yet.
    """
    while True:
        rivals = _rivals(shared, worker)
        states = job_states({found["job"] for found in rivals.values()}) if rivals else {}
        try:
            with shared.turn():
                return _choose(shared, worker, total, rivals, states)
        except TurnLost:
            logger.debug("lost the turn at the study: choosing anew")


def _choose(
    shared: SharedStudy,
    worker: Worker,
    total: int,
    rivals: Mapping[int, Mapping[str, Any]],
    states: Mapping[str, JobState],
) -> Claim | None:
    trials = shared.study.get_trials(deepcopy=False)
    running = [t for t in trials if t.state == TrialState.RUNNING]

    def left_by(state: JobState) -> list[FrozenTrial]:
        """Trials of such jobs; unless somebody took them since we asked the scheduler."""
        return [
            t
            for t in running
            if (was := rivals.get(t.number)) and was == owner(t) and states.get(was["job"]) == state
        ]

    mine = [t for t in running if (mark := owner(t)) and mark["job"] == worker.job]
    # Owners are written before the turn ends: without one, the creator died in between.
    nobodys = [t for t in running if owner(t) is None]
    for found in (*mine, *nobodys, *left_by("gone")):
        return _take(shared, worker, optuna.Trial(shared.study, found._trial_id))
    if len(trials) < total or any(t.state == TrialState.WAITING for t in trials):
        trial = shared.study.ask()
        if trial.number >= total and OWNER not in trial.user_attrs:
            # Two at once in their turn, on a file system without locks: one too many.
            shared.study.tell(trial, state=TrialState.FAIL)
            return None
        return _take(shared, worker, trial)
    for found in left_by("pending"):
        return _take(shared, worker, optuna.Trial(shared.study, found._trial_id))
    return None


def _take(shared: SharedStudy, worker: Worker, trial: optuna.Trial) -> Claim:
    before = trial.user_attrs.get(OWNER)
    mark = {
        **asdict(worker),
        "attempt": before["attempt"] + 1 if before else 1,
        "since": fsio.timestamp(),
    }
    trial.set_user_attr(OWNER, mark)
    return Claim(shared, trial, mark)


def _rivals(shared: SharedStudy, worker: Worker) -> dict[int, dict[str, Any]]:
    """Trials in work at other jobs, and their owners."""
    running = shared.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {
        t.number: found
        for t in running
        if (found := owner(t)) is not None and found["job"] != worker.job
    }


def open_trials(shared: SharedStudy, total: int) -> int:
    """How many trials nobody has taken yet."""
    trials = shared.study.get_trials(deepcopy=False)
    waiting = sum(t.state == TrialState.WAITING for t in trials)
    return waiting + max(0, total - len(trials))


def lost(shared: SharedStudy, job_states: JobStates) -> list[FrozenTrial]:
    """RUNNING trials whose job does not come back, or that never had one."""
    running = shared.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    owners = {t.number: owner(t) for t in running}
    states = job_states({found["job"] for found in owners.values() if found})
    return [
        t
        for t in running
        if (found := owners[t.number]) is None or states.get(found["job"]) == "gone"
    ]


def hand_back(shared: SharedStudy, trials: Iterable[FrozenTrial]) -> list[int]:
    """Make lost trials WAITING, so that the next worker goes on with them; returns the numbers.

    Trials that somebody took over or finished meanwhile are left alone.
    """
    done = []
    with shared.turn():
        for trial in trials:
            now = shared.study._storage.get_trial(trial._trial_id)
            if now.state == TrialState.RUNNING and owner(now) == owner(trial):
                shared.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                done.append(trial.number)
    return done
