"""`tripletkit status`: every trial beside the job that works on it, and the jobs without a trial."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from tripletkit.cluster import jobs as records
from tripletkit.cluster.jobs import LOCAL, JobState
from tripletkit.errors import StorageError
from tripletkit.monitor.inventory import OF_STUDY, Inventory, Job, owner
from tripletkit.tune import budget, claims, storage
from tripletkit.tune.claims import JobStates

DAY = 86400.0  # seconds; jobs that ended before are history
OPEN = (TrialState.RUNNING, TrialState.WAITING)
STATES = (*OPEN, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
PACE = 3  # finished trials, before they say anything about the next


class Room(NamedTuple):
    """How many lines of each kind there are to show."""

    trials: int = 30
    jobs: int = 12
    done: int = 3  # of these: jobs that did what they were to do


class Best(NamedTuple):
    """The best complete trial."""

    number: int
    value: float
    epoch: int | None


class Study(NamedTuple):
    """The study as a whole."""

    name: str
    storage: str
    objective: str
    direction: str
    total: int
    max_epochs: int
    states: Mapping[str, int]
    best: Best | None
    workers: int  # that run
    seconds_left: float | None  # at this pace, None if nobody can say
    budget: str | None = None  # that is used up, so that no trial starts


class Row(NamedTuple):
    """One trial. None where there is nothing yet."""

    number: int
    state: str
    cause: Mapping[str, str] | None
    job: str | None
    host: str
    attempt: int | None
    epoch: int | None  # the last one reported, like `last`
    best: float | None
    last: float | None
    seconds: float | None  # since its newest start


@dataclass(frozen=True)
class Status:
    """What `status` shows. `jobs` has those of the rows too, `others` those without a trial."""

    study: Study | None
    rows: Sequence[Row]
    hidden: int
    jobs: Mapping[str, Job]
    others: Sequence[Job]
    warnings: Sequence[str]


def gather(inventory: Inventory, room: Room | None = None) -> Status:
    """Ask the study, the queue and the accounting, once each; all trials unless `room` is given."""
    inventory.warnings.clear()
    trials = inventory.trials()
    jobs = inventory.jobs(job for trial in trials or () if (job := owner(trial)))
    working = {owner(trial) for trial in trials or () if trial.state == TrialState.RUNNING}
    study = None if trials is None else study_of(inventory, trials, jobs.values())
    shown = _newest(trials or [], room)
    rows = [_row(trial, inventory) for trial in shown]
    # How the job of a finished trial ended is of interest to programs only.
    told = {row.job for row in rows if room is None or row.state not in ("COMPLETE", "PRUNED")}
    ended = _ended(inventory, jobs.values(), told)
    asked = {*told, *ended}
    settled = inventory.settled(job for job in jobs.values() if job.id in asked)
    others = _news(inventory, [settled[id_] for id_ in ended])
    others += _active(inventory, jobs.values(), working)
    beside = {id_: job for id_, job in settled.items() if id_ in told}
    return Status(
        study=study,
        rows=rows,
        hidden=len(trials or ()) - len(rows),
        jobs={**beside, **{job.id: job for job in others}},
        others=others,
        warnings=list(inventory.warnings),
    )


def as_json(status: Status) -> dict[str, Any]:
    """The status for programs.

    `study` (null without one): name, storage, objective, direction, total, max_epochs, states
    (number of trials by state), best (number, value, epoch; or null), workers (that run),
    seconds_left (null if unknown), budget (what is said of one that is used up; else null).
    `trials`: number, state (of Optuna), cause (kind, message; or null), job (id), host, attempt,
    epoch, best, last, seconds (since its newest start).
    `jobs`: id, name, state, reason, node, elapsed, limit (seconds), exit_code, message, trials
    (numbers of those that it works on). `warnings`: what could not be asked.
    Values that are no finite number are null.
    """
    running: dict[str | None, list[int]] = {}
    for row in status.rows:
        if row.state == "RUNNING":
            running.setdefault(row.job, []).append(row.number)
    study = status.study
    return {
        "study": study
        and {**study._asdict(), "best": study.best and study.best._asdict()},
        "trials": [row._asdict() for row in status.rows],
        "jobs": [
            {
                "id": job.id, "name": job.name, "state": job.state, "reason": job.reason,
                "node": job.node, "elapsed": job.elapsed and round(job.elapsed), "limit": job.limit,
                "exit_code": job.record.exit_code if job.record else None,
                "message": job.record.message if job.record else None,
                "trials": running.get(job.id, []),
            }
            for job in status.jobs.values()
        ],
        "warnings": list(status.warnings),
    }  # fmt: skip


# The study and its trials


def study_of(inventory: Inventory, trials: Sequence[FrozenTrial], jobs: Iterable[Job]) -> Study:
    """The study as a whole; `jobs` say who works on it."""
    tuning, total = inventory.config.tuning, inventory.total()
    counts = Counter(trial.state for trial in trials)
    name = f"tune:{inventory.study_name}"
    workers = {job.id for job in jobs if job.name == name and job.state == "RUNNING"}
    in_work = sum(t.state == TrialState.RUNNING and owner(t) in workers for t in trials)
    return Study(
        name=inventory.study_name,
        storage=storage.location(tuning),
        objective=tuning.objective,
        direction=storage.direction(tuning.objective),
        total=total,
        max_epochs=tuning.max_epochs,
        states={state.name: counts[state] for state in STATES},
        best=_best(trials, storage.direction(tuning.objective)),
        workers=len(workers),
        # Some work on several trials at once.
        seconds_left=_seconds_left(trials, total, max(len(workers), in_work)),
        budget=_budget(inventory, trials, jobs),
    )


def _budget(inventory: Inventory, trials: Sequence[FrozenTrial], jobs: Iterable[Job]) -> str | None:
    known: dict[str, JobState] = {job.id: "gone" if job.over else "running" for job in jobs}

    def states(ids: Iterable[str]) -> Mapping[str, JobState]:
        return {**records.states(inventory.logs, set(ids) - known.keys()), **known}

    try:
        reached = used_up(inventory, trials, states)
    except StorageError:
        return None
    return str(reached) if reached else None


def used_up(
    inventory: Inventory, trials: Sequence[FrozenTrial], job_states: JobStates
) -> budget.Reached | None:
    """The budget that lets no trial of the study start, though some are left.

    As the worker saw it that last looked; but one that was killed did not look any more, so where
    nobody works on a trial it is asked anew.
    """
    config = inventory.config
    at_work = claims.at_work(trials, job_states)
    left = [t for t in trials if not t.state.is_finished() and t.number not in at_work]
    if not left and len(trials) >= inventory.total():
        return None
    if not config.tuning.budget_gpu_hours or at_work:
        return budget.of_study(inventory.study())
    slurm = any(not job.startswith(LOCAL) for trial in trials if (job := owner(trial)))
    return budget.asked_anew(config, inventory.paths, trials, job_states, slurm=slurm)


def _best(trials: Sequence[FrozenTrial], direction: str) -> Best | None:
    complete = [
        (t, t.value)
        for t in trials
        if t.state == TrialState.COMPLETE and t.value is not None and math.isfinite(t.value)
    ]
    if not complete:
        return None
    trial, value = _extreme(direction)(complete, key=lambda pair: pair[1])
    reports = sorted(trial.intermediate_values.items())
    return Best(
        trial.number, value, next((e for e, reported in reports if reported == value), None)
    )


def _extreme(direction: str) -> Callable[..., Any]:
    return max if direction == "maximize" else min


def _seconds_left(trials: Sequence[FrozenTrial], total: int, at_once: int) -> float | None:
    """As long as a trial took on average, for what is left, so many at once."""
    done = [t for t in trials if t.state.is_finished()]
    took = [t.duration.total_seconds() for t in done if t.state != TrialState.FAIL and t.duration]
    if not at_once or len(took) < PACE or len(done) >= total:
        return None
    mean = sum(took) / len(took)
    running = [
        max(mean - _seconds(t, time.time()), 0.0) for t in trials if t.state == TrialState.RUNNING
    ]
    untouched = max(total - len(done) - len(running), 0)
    return max((sum(running) + untouched * mean) / at_once, max(running, default=0.0))


def _newest(trials: Sequence[FrozenTrial], room: Room | None) -> list[FrozenTrial]:
    """Those in work and the newest others, by number."""
    if room is None or len(trials) <= room.trials:
        return list(trials)
    ranked = sorted(trials, key=lambda t: (t.state in OPEN, t.number))
    return sorted(ranked[-room.trials :], key=lambda t: t.number)


def _row(trial: FrozenTrial, inventory: Inventory) -> Row:
    mark = claims.owner(trial) or {}
    steps = sorted(trial.intermediate_values)
    said = (*trial.intermediate_values.values(), trial.value)
    values = [value for value in said if value is not None and math.isfinite(value)]
    choose = _extreme(storage.direction(inventory.config.tuning.objective))
    last = trial.intermediate_values[steps[-1]] if steps else None
    return Row(
        number=trial.number,
        state=trial.state.name,
        cause=trial.user_attrs.get(claims.CAUSE) if trial.state == TrialState.FAIL else None,
        job=mark.get("job"),
        host=mark.get("host", ""),
        attempt=mark.get("attempt"),
        epoch=steps[-1] if steps else None,
        best=choose(values) if values else None,
        last=last if last is not None and math.isfinite(last) else None,
        seconds=None if trial.state == TrialState.WAITING else _seconds(trial, time.time()),
    )


def _seconds(trial: FrozenTrial, now: float) -> float:
    """How long the trial took, or has been running, since its newest start."""
    assert trial.datetime_start
    ended = trial.datetime_complete.timestamp() if trial.datetime_complete else now
    return round(ended - trial.datetime_start.timestamp(), 3)


# Jobs


def _is_ours(inventory: Inventory, job: Job) -> bool:
    """It works for the study, may do so, or was started with our log folder."""
    if job.stage in OF_STUDY:
        return job.subject in (inventory.study_name, "")
    return job.here


def _ended(inventory: Inventory, jobs: Iterable[Job], told: Collection[str | None]) -> list[str]:
    """Jobs that ended of late, the newest last, and that no trial's row tells of."""
    late = time.time() - DAY
    found = {
        job.id: ended
        for job in jobs
        if job.over
        and job.id not in told
        and _is_ours(inventory, job)
        and (ended := inventory.ended(job)) > late
    }
    return sorted(found, key=lambda id_: found[id_])


def _news(inventory: Inventory, ended: Iterable[Job]) -> list[Job]:
    """That a worker, or the job that tidies up behind it, is done is no news."""
    return [
        job
        for job in ended
        if (job.failed or job.stage not in ("tune", "tidy")) and _is_ours(inventory, job)
    ]


def _active(
    inventory: Inventory, jobs: Iterable[Job], working: Collection[str | None]
) -> list[Job]:
    """Jobs that wait or run without a trial."""
    return [
        job for job in jobs if not job.over and job.id not in working and _is_ours(inventory, job)
    ]
