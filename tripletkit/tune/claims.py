"""Which trial a worker works on next: claims, and trials whose worker is gone.

A trial in work is RUNNING and carries its owner, the job that works on it, as an attribute. Who
lives is asked of the scheduler. A trial that stopped midway goes on under the same number, with
the same parameters, reports and checkpoint, at whichever worker takes it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tripletkit import fsio
from tripletkit.cluster.jobs import LOCAL, JobState
from tripletkit.log import logger
from tripletkit.tune.storage import SharedStudy, TurnLost

# User attributes of a trial.
OWNER = "tripletkit:owner"
CAUSE = "tripletkit:cause"
# User attributes of the study.
OBJECTIVE = "tripletkit:objective"

# What the scheduler says of a job: "pending" jobs were requeued and come back, "gone" ones never.
JobStates = Callable[[Iterable[str]], Mapping[str, JobState]]
Owners = Mapping[int, Mapping[str, Any]]  # of trials, by number
# Whether a trial may start, or a new one (None): of all trials, and the numbers of those that are
# RUNNING while nobody works on them.
MayStart = Callable[[Sequence[FrozenTrial], Collection[int], FrozenTrial | None], bool]


@dataclass(frozen=True)
class Worker:
    """A worker process. `job` and `slot` stay the same when the job is requeued."""

    job: str
    restart: int
    host: str
    pid: int
    slot: int = 0  # which of the processes of the job


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


def claim(
    shared: SharedStudy,
    worker: Worker,
    total: int,
    job_states: JobStates,
    may_start: MayStart = lambda *_: True,
) -> Claim | None:
    """The next trial for this worker, or None when nothing is left to do, or it may not start.

    In this order: what this worker worked on before it was killed or requeued; trials whose job is
    gone; trials that were handed back; a new one while there are fewer than `total`; at last,
    trials whose job was requeued and has not come back yet.
    """
    while True:
        rivals = _rivals(shared, worker)
        gone, pending = _by_state(rivals, worker.host, job_states)
        try:
            with shared.turn():
                return _choose(shared, worker, total, gone, pending, may_start)
        except TurnLost:
            logger.debug("lost the turn at the study: choosing anew")


def _choose(
    shared: SharedStudy,
    worker: Worker,
    total: int,
    gone: Owners,
    pending: Owners,
    may_start: MayStart,
) -> Claim | None:
    trials = shared.study.get_trials(deepcopy=False)
    running = [t for t in trials if t.state == TrialState.RUNNING]

    def still(owners: Owners) -> list[FrozenTrial]:
        """Their trials; unless somebody took them since we asked the scheduler."""
        return [t for t in running if t.number in owners and owners[t.number] == owner(t)]

    mine = [t for t in running if (mark := owner(t)) and _is_ours(mark, worker)]
    # Owners are written before the turn ends: without one, the creator died in between.
    nobodys = [t for t in running if owner(t) is None]
    idle = {t.number for t in (*mine, *nobodys, *still(gone), *still(pending))}

    def taken(found: FrozenTrial) -> Claim | None:
        if not may_start(trials, idle, found):
            return None
        return _take(shared, worker, optuna.Trial(shared.study, found._trial_id))

    for found in (*mine, *nobodys, *still(gone)):
        return taken(found)
    waiting = [t for t in trials if t.state == TrialState.WAITING]
    if len(trials) < total or waiting:
        if not may_start(trials, idle, waiting[0] if waiting else None):
            return None
        trial = shared.study.ask()
        if trial.number >= total and OWNER not in trial.user_attrs:
            # Two at once in their turn, on a file system without locks: one too many.
            shared.study.tell(trial, state=TrialState.FAIL)
            return None
        return _take(shared, worker, trial)
    for found in still(pending):
        return taken(found)
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


def _is_ours(mark: Mapping[str, Any], worker: Worker) -> bool:
    """Whether we made this mark, maybe in a former life of our process or job.

    Background processes are numbered by each host anew.
    """
    same_host = mark["host"] == worker.host or not worker.job.startswith(LOCAL)
    slot = mark.get("slot", 0)
    return bool(mark["job"] == worker.job and slot == worker.slot and same_host)


def _rivals(shared: SharedStudy, worker: Worker) -> Owners:
    """Trials in work at other workers, also those of our job, and their owners."""
    running = shared.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {
        t.number: found
        for t in running
        if (found := owner(t)) is not None and not _is_ours(found, worker)
    }


def _by_state(owners: Owners, host: str, job_states: JobStates) -> tuple[Owners, Owners]:
    """Those whose job is gone, and those whose job is pending.

    Of another host's background processes nobody here knows.
    """
    known = {
        number: mark
        for number, mark in owners.items()
        if mark["host"] == host or not mark["job"].startswith(LOCAL)
    }
    states = job_states({mark["job"] for mark in known.values()}) if known else {}
    gone = {n: mark for n, mark in known.items() if states.get(mark["job"]) == "gone"}
    pending = {n: mark for n, mark in known.items() if states.get(mark["job"]) == "pending"}
    return gone, pending


def open_trials(shared: SharedStudy, total: int) -> int:
    """How many trials nobody has taken yet."""
    trials = shared.study.get_trials(deepcopy=False)
    waiting = sum(t.state == TrialState.WAITING for t in trials)
    return waiting + max(0, total - len(trials))


def at_work(trials: Iterable[FrozenTrial], job_states: JobStates) -> set[int]:
    """The trials that a job works on; also where nobody knows, as it may be silence for a moment."""
    owners = {
        trial.number: mark["job"]
        for trial in trials
        if trial.state == TrialState.RUNNING and (mark := owner(trial))
    }
    states = job_states(owners.values()) if owners else {}
    return {n for n, job in owners.items() if states.get(job) in ("running", "unknown")}


def lost(shared: SharedStudy, job_states: JobStates) -> list[FrozenTrial]:
    """RUNNING trials whose job does not come back, or that never had one."""
    running = shared.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    owners = {t.number: found for t in running if (found := owner(t)) is not None}
    gone, _ = _by_state(owners, socket.gethostname(), job_states)
    return [t for t in running if t.number not in owners or t.number in gone]


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
