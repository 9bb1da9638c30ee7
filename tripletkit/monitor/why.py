"""Collects what is known of a trial or a job; diagnosis.py says what it means."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tripletkit import config as configuration
from tripletkit.cluster import jobs, queue
from tripletkit.cluster.jobs import JobState
from tripletkit.cluster.queue import PastJob, QueuedJob
from tripletkit.errors import ClusterError, ConfigError, StorageError
from tripletkit.log import logger
from tripletkit.monitor import diagnosis
from tripletkit.monitor.diagnosis import Diagnosis
from tripletkit.monitor.facts import JobFacts, Line, TrialFacts
from tripletkit.monitor.inventory import Inventory
from tripletkit.paths import LogPaths, TrialPaths
from tripletkit.tune import attempts, claims

LINES = 200  # of the end of each log
WIDTH = 300  # characters of a line


class Attempt(NamedTuple):
    """One attempt at a trial, or one start of a job. Times are UTC, ISO 8601, "" if unknown."""

    attempt: int
    job: str
    node: str
    from_epoch: int | None
    started: str
    ended: str
    how: str


class Why(NamedTuple):
    """A diagnosis, and what led there."""

    diagnosis: Diagnosis
    history: Sequence[Attempt]


def why_trial(inventory: Inventory, number: int) -> Why:
    """Why a trial is as it is. Raises ConfigError if the study has no such trial."""
    trial = trial_facts(inventory, number)
    ids = {str(attempt["job"]) for attempt in trial.attempts}
    asked = _ask(inventory.logs, ids | ({trial.owner["job"]} if trial.owner else set()))
    job = None
    if newest := _newest_attempt(trial):
        job = _job_facts(inventory.logs, newest["job"], asked, inventory.paths.trial(number))
        if trial.state != "RUNNING":
            job = _as_of(job, newest["restart"])
    going_on = trial.attempts[-1] if trial.attempts and trial.state in ("RUNNING", "") else None
    history = [_attempt(each, asked.runs, goes_on=each is going_on) for each in trial.attempts]
    return Why(diagnosis.diagnose(trial, job), history)


def why_jobs(inventory: Inventory, ids: Collection[str]) -> dict[str, Why]:
    """Why jobs, or elements of arrays, are as they are: one call of each of Slurm's commands.

    Raises ConfigError for one that nobody knows.
    """
    logs = inventory.logs
    asked = _ask(logs, ids)
    answers = {}
    for job in ids:
        facts = _job_facts(logs, job, asked)
        if facts.state == "gone" and not (
            facts.runs or facts.never_ran or facts.record or facts.log
        ):
            raise ConfigError(
                f"nobody knows a job {job}: neither the queue, nor the accounting, nor {logs.root}",
                hint="`tripletkit status` lists the jobs; see also global.log_dir",
            )
        history = [
            Attempt(n, job, run.node, None, _utc(run.start), _utc(run.end), run.state)
            for n, run in enumerate(facts.runs, 1)
        ]
        answers[job] = Why(diagnosis.diagnose(None, facts), history)
    return answers


def workers(inventory: Inventory) -> dict[str, str]:
    """The study's workers that run or wait, and the reason why those wait."""
    name = f"tune:{inventory.study_name}"
    return {
        job.id: "" if job.state == "RUNNING" else job.reason
        for job in inventory.jobs().values()
        if job.active and job.name == name
    }


def trial_facts(inventory: Inventory, number: int) -> TrialFacts:
    """What the study and the trial's folder say; without the study, the folder alone."""
    paths, tuning = inventory.paths.trial(number), inventory.config.tuning
    ran = None
    if paths.config.exists():
        ran = configuration.load(paths.config, environ={})
    facts = TrialFacts(
        number=number,
        state="",
        objective=tuning.objective,
        folder=str(paths.root),
        epochs=ran.training.num_epochs if ran else tuning.max_epochs,
        workers=len(workers(inventory)),
        batch_size=ran.training.batch_size if ran else None,
        per_gpu=ran.tuning.trials_per_gpu if ran else 1,
        attempts=attempts.read(paths.attempts),
    )
    try:
        study = inventory.study().study
        trials = study.get_trials(deepcopy=False)
    except StorageError as error:
        return facts._replace(message=error.message)
    if number >= len(trials):
        raise ConfigError(
            f"study {tuning.study_name!r} has no trial {number}: it has {len(trials)} trials",
            hint="`tripletkit status` lists them; see also --study-name",
        )
    trial = trials[number]
    return facts._replace(
        state=trial.state.name,
        value=trial.value,
        cause=trial.user_attrs.get(claims.CAUSE),
        owner=claims.owner(trial),
        reports=trial.intermediate_values,
        params=trial.params,
        pruned_by=_pruned_by(tuning.pruner, study.direction, trial, trials),
    )


class _Asked(NamedTuple):
    """What was asked about some jobs."""

    states: Mapping[str, JobState]
    queued: Mapping[str, QueuedJob]
    runs: Sequence[PastJob]


def _ask(logs: LogPaths, ids: Collection[str]) -> _Asked:
    """Ask Slurm, as far as it answers: the accounting may, where the controller does not."""
    states, queued, runs = jobs.states(logs, ids), {}, []
    slurm = [job for job in ids if not job.startswith(jobs.LOCAL)]
    there = [job for job in slurm if states[job] in ("running", "pending")]
    try:
        queued = {row.id: row for row in queue.queued(there)}
        runs = queue.past(slurm)
    except ClusterError as error:
        logger.warning("cannot ask Slurm: %s", error.message)
    return _Asked(states, queued, runs)


def _job_facts(
    logs: LogPaths, job: str, asked: _Asked, trial: TrialPaths | None = None
) -> JobFacts:
    """One job from all sides. The log of a trial stands in where the job has none of its own."""
    files = logs.of_job(job)[::-1] or ([trial.log] if trial and trial.log.exists() else [])
    written = [file.stat().st_mtime for file in files]
    mine = [run for run in asked.runs if run.id == job]
    return JobFacts(
        id=job,
        state=asked.states[job],
        queued=asked.queued.get(job),
        runs=tuple(run for run in mine if run.node and run.end),
        never_ran=next((run for run in mine if run.state == "CANCELLED" and not run.node), None),
        record=jobs.read(logs.record(job)),
        record_file=str(logs.record(job)),
        log=tuple(itertools.chain.from_iterable(_end_of(file, job) for file in files)),
        silent=time.time() - max(written) if written else None,
    )


def _newest_attempt(trial: TrialFacts) -> Mapping[str, Any] | None:
    """Whose end, or life, explains the trial: a FAIL may be told by a worker that came after."""
    if trial.owner is not None and (trial.state == "RUNNING" or not trial.attempts):
        return trial.owner
    return trial.attempts[-1] if trial.attempts else None


def _as_of(job: JobFacts, restart: int) -> JobFacts:
    """The job in this start of it, if it has started again since."""
    if job.record is None or job.record.restart <= restart:
        return job
    runs = job.runs[: restart + 1]
    return job._replace(state="gone", queued=None, runs=runs, record=None, log=())


def _end_of(file: Path, job: str) -> list[Line]:
    """The end of a log, since the newest start of the job as far as that wrote its line."""
    with file.open(errors="replace") as lines:
        last = deque(enumerate(lines, 1), LINES)
    found: list[Line] = []
    for number, text in last:
        if f"job {job} on " in text:
            found.clear()
        if text.strip():
            found.append(Line(str(file), number, text.strip()[:WIDTH]))
    return found


def _attempt(each: Mapping[str, Any], runs: Iterable[PastJob], *, goes_on: bool) -> Attempt:
    started = [run for run in runs if run.id == each["job"] and run.node]
    restart = int(each.get("restart", 0))
    run = started[restart] if 0 <= restart < len(started) else None
    ended = each.get("ended") or (_utc(run.end) if run else "")
    how = diagnosis.how_it_ended(each, run if run and run.end else None)
    return Attempt(
        each.get("attempt", 0), each["job"], (run.node if run else "") or each.get("host", ""),
        each["from_epoch"], each["started"], ended, how or ("" if goes_on else "killed"),
    )  # fmt: skip


def _utc(local: str) -> str:
    """Slurm's local time as UTC; "" stays."""
    if not local:
        return ""
    return datetime.fromisoformat(local).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _pruned_by(
    pruner: str, direction: StudyDirection, trial: FrozenTrial, trials: Sequence[FrozenTrial]
) -> str:
    """The values that decided, as the pruner saw them when it decided."""
    if trial.state != TrialState.PRUNED or not trial.intermediate_values:
        return ""
    epoch = max(trial.intermediate_values)
    up = direction == StudyDirection.MAXIMIZE
    if pruner == "median":
        before = [
            t.intermediate_values[epoch]
            for t in trials
            if t.state == TrialState.COMPLETE
            and epoch in t.intermediate_values
            and t.datetime_complete
            and trial.datetime_complete
            and t.datetime_complete <= trial.datetime_complete
        ]
        if not before:
            return ""
        best = (max if up else min)(trial.intermediate_values.values())
        return (
            f"its best value, {best:.4f}, is {'below' if up else 'above'} {median(before):.4f}, "
            f"the median at epoch {epoch} of the {len(before)} trials that were complete"
        )
    rungs = [key for key in trial.system_attrs if key.startswith("completed_rung_")]
    if not rungs:
        return ""
    rung = max(rungs, key=lambda key: int(key.rpartition("_")[2]))
    count = sum(rung in t.system_attrs for t in trials)
    return (
        f"{trial.system_attrs[rung]:.4f} at epoch {epoch} is not in the best third of the "
        f"{count} trials that got there"
    )
