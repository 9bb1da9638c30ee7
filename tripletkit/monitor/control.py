"""`tripletkit cancel` and `tripletkit wait`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tripletkit import log
from tripletkit.cluster import jobs as records
from tripletkit.cluster import queue
from tripletkit.cluster.jobs import LOCAL
from tripletkit.errors import ClusterError, ConfigError, RunError, StorageError
from tripletkit.log import logger
from tripletkit.monitor.inventory import (
    GONE,
    UNKNOWN,
    Inventory,
    Job,
    is_on_this_host,
    of_study,
    owner,
    spans,
)
from tripletkit.monitor.status import study_of
from tripletkit.monitor.tables import summary
from tripletkit.monitor.targets import Target
from tripletkit.paths import LogPaths

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

LEAVING = 120.0  # seconds for a cancelled job to save its state and leave: KillWait and more
LAG = 15.0  # seconds by which the accounting may lag behind the queue
STARTING = 60.0  # seconds for a background process to say what it is
POLLS = (1.0, 15.0)  # seconds between two looks at what we wait for: first, longest


def cancel(target: Target) -> None:
    """Cancel the jobs of a target and wait until they left; their trials wait for other workers.

    Raises ConfigError for processes that cannot be reached from here, ClusterError if Slurm
    refuses, RunError if a job does not leave.
    """
    if target.kind == "trial" and not _is_in_work(target):
        return
    jobs = [job for job in _known(target).values() if not job.over]
    silence = "" if target.kind == "trial" else _silence(target)
    _check_reach(jobs)
    for job in jobs:
        if job.id.startswith(LOCAL):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(_pid(job), signal.SIGTERM)
    slurm = [job for job in jobs if not job.id.startswith(LOCAL)]
    whole = target.kind == "study" or (target.kind == "job" and "_" not in target.name)
    queue.cancel({job.array if whole else job.id for job in slurm})
    for array in dict.fromkeys(job.array for job in jobs):
        group = [job for job in jobs if job.array == array]
        states = _counted(job.state for job in group)
        _say(f"cancelled {' '.join(spans(job.id for job in group))} {group[0].name} ({states})")
    if not jobs and not silence:
        _say(f"{target}: nothing of it runs or waits in the queue")
    still = _wait_for_end(target.inventory, [job.id for job in jobs])
    studies = {_study(job) for job in jobs if job.stage == "tune"} - {""}
    for name in sorted(studies | ({target.name} if target.kind == "study" else set())):
        _look_after(name, target.inventory)
    if still:
        raise RunError(
            f"still there after {LEAVING:.0f} s: {' '.join(spans(still))}",
            hint="`tripletkit status` shows when they are gone, and `tripletkit doctor --fix` "
            "then looks after their trials",
        )
    if silence:
        raise ClusterError(silence, hint=queue.SILENCE)


def wait(target: Target, timeout: float | None) -> None:
    """Return when the jobs of a target are over, or the study has its total, and all is well.

    A study whose budget is used up is well, too.

    Raises RunError if something failed, if trials are left, or after `timeout` seconds.
    """
    began, pause = time.monotonic(), POLLS[0]
    watched: dict[str, Job] = {}
    warned: set[str] = set()
    with log.progress(1, str(target)) as update:
        while True:
            target.inventory.warnings.clear()
            trials, jobs = target.trials(), _jobs(target, or_others=True)
            busy = [job for job in jobs.values() if not job.over]
            watched |= {job.id: job for job in busy}
            if _is_done(target, trials):
                break
            if not busy and (not _silence(target) or _is_used_up(target, trials)):
                break
            _check_visible(busy)
            for warning in sorted({*target.inventory.warnings} - warned):
                logger.warning("%s; asking again", warning)
            warned |= {*target.inventory.warnings}
            said = _how_far(target, trials, busy)
            left = pause if timeout is None else began + timeout - time.monotonic()
            if left < 0:
                raise RunError(f"{target} is not over after {timeout:g} s: {said}")
            update(0, f"{target}: {said}")
            time.sleep(min(pause, left))
            pause = min(1.3 * pause, POLLS[1])
    over = {job.id: job for job in jobs.values() if job not in busy}
    newest = {job.stage: job.id for job in over.values()}
    for id_, job in over.copy().items():  # what failed before we came is history
        made_good = target.kind == "run" and newest[job.stage] != id_
        if id_ not in watched and (target.kind == "study" or made_good):
            del over[id_]
    for id_, job in watched.items():  # one that was cancelled before it started leaves no trace
        if id_ not in jobs or jobs[id_].state == GONE:
            over[id_] = replace(job, state=GONE)
    ended = [] if target.kind == "trial" else _settled(target.inventory, over.values())
    _judge(target, trials, ended)


def _jobs(target: Target, *, or_others: bool = False) -> dict[str, Job]:
    """The jobs that count; a study is over before its final training and its report.

    `or_others`: for a trial, also the workers that may go on with it. Background processes that
    start count for every study.
    """
    if target.kind in ("job", "run"):
        return target.jobs()
    study = target.inventory.study_name
    if target.kind == "trial" and or_others:
        target = Target("study", study, target.inventory)
    jobs = target.jobs(_starting(target.inventory.logs) if target.kind == "study" else ())
    # A process of another study may have got the id of one that worked on ours.
    ours = (study, "")
    others = ("best", "report")
    return {i: job for i, job in jobs.items() if job.stage not in others and _study(job) in ours}


def _study(job: Job) -> str:
    """Which study a worker is of; "" if nobody says."""
    said = job.record.name.partition(":")[2] if job.record is not None else ""
    return job.subject or said


def _starting(logs: LogPaths) -> list[str]:
    """Background workers that have not said yet which study they are of."""
    ids = (path.stem.removeprefix("tune_") for path in logs.root.glob(f"tune_{LOCAL}*.err"))
    return [id_ for id_ in ids if not logs.record(id_).exists()]


def _silence(target: Target) -> str:
    """What there is instead of Slurm's answer. It alone knows of jobs that have not started yet."""
    return "" if target.name.startswith(LOCAL) else target.inventory.silence


# cancel


def _known(target: Target) -> dict[str, Job]:
    """Its jobs, when all background processes have said whether they are."""
    deadline = time.monotonic() + STARTING
    while True:
        jobs = _jobs(target)
        unknown = {id_ for id_, job in jobs.items() if job.reason == "starting"}
        if target.kind != "study" or not unknown:
            return jobs
        if time.monotonic() > deadline:
            raise RunError(f"{' '.join(unknown)} starts and starts", hint="cancel it by its id")
        time.sleep(0.2)


def _is_in_work(target: Target) -> bool:
    """Whether a job works on the trial; says what it means to cancel that."""
    trials = target.trials()
    if trials and trials[0].state.name != "RUNNING":
        _say(f"{target} is {trials[0].state.name}: no job works on it")
        return False
    numbers = [
        str(each.number)
        for each in target.inventory.trials() or ()
        if trials and each.state.name == "RUNNING" and owner(each) == owner(trials[0])
    ]
    who = f"trials {', '.join(numbers)} wait" if len(numbers) > 1 else f"{target} waits"
    logger.info(
        "a worker takes one trial after another: its job ends, and %s for another worker", who
    )
    return True


def _check_reach(jobs: Iterable[Job]) -> None:
    for job in jobs:
        if not job.id.startswith(LOCAL):
            continue
        if not is_on_this_host(job) and job.record is not None:
            raise ConfigError(f"{job.id} runs on {job.record.host}", hint="cancel it there")
        if job.state == UNKNOWN:
            raise ConfigError(
                f"{job.id}: its file system has no locks, so nobody knows whether it lives",
                hint=f"look with `ps {_pid(job)}`, and `kill {_pid(job)}` if it is ours",
            )


def _pid(job: Job) -> int:
    return job.record.pid if job.record is not None else int(job.id.removeprefix(LOCAL))


def _wait_for_end(inventory: Inventory, ids: Collection[str]) -> list[str]:
    """Wait until these jobs left; returns those that did not."""
    deadline, pause = time.monotonic() + LEAVING, 0.5
    left = list(ids)
    while left:
        states = records.states(inventory.logs, left)
        left = [job for job in left if states[job] != "gone"]
        if not left or time.monotonic() > deadline:
            break
        if pause == 0.5:
            logger.info("waiting for %s to save its state and leave", " ".join(spans(left)))
        time.sleep(pause)
        pause = min(1.5 * pause, 5.0)
    return left


def _look_after(name: str, inventory: Inventory) -> None:
    """Hand back the trials of jobs that are gone, and say what is left in the study."""
    from tripletkit.tune import claims

    if name != inventory.study_name:
        inventory = Inventory(of_study(inventory.config, name), inventory.patience)
    try:
        shared = inventory.study(change=True)
        lost = claims.lost(shared, lambda ids: records.states(inventory.logs, ids))
        for number in claims.hand_back(shared, lost):
            _say(f"trial {number}: its worker is gone; it waits for the next one")
        trials = shared.study.get_trials(deepcopy=False)
    except StorageError as error:
        logger.warning(
            "cannot look after the trials of %s: %s; `tripletkit doctor --fix` can, later",
            name, error.message,
        )  # fmt: skip
        return
    _say(summary(study_of(inventory, trials, ())))
    if sum(trial.state.is_finished() for trial in trials) < inventory.total():
        _say("`tripletkit tune` with the same flags goes on with what is left")


# wait


def _is_done(target: Target, trials: Sequence[FrozenTrial]) -> bool:
    """Whether all trials came to an end, whatever its workers still do."""
    if target.kind not in ("study", "trial"):
        return False
    wanted = target.inventory.total() if target.kind == "study" else 1
    finished = [trial.state.is_finished() for trial in trials]
    return sum(finished) >= wanted and all(finished)


def _is_used_up(target: Target, trials: Sequence[FrozenTrial]) -> bool:
    """Whether the study's budget lets no trial start, and no job works on one."""
    from tripletkit.tune import claims

    if target.kind != "study" or study_of(target.inventory, trials, ()).budget is None:
        return False
    return not claims.at_work(trials, lambda ids: records.states(target.inventory.logs, ids))


def _check_visible(jobs: Iterable[Job]) -> None:
    for job in jobs:
        if job.state == UNKNOWN and job.id.startswith(LOCAL) and job.record is not None:
            raise ConfigError(f"{job.id} runs on {job.record.host}", hint="wait for it there")
        if job.state == UNKNOWN and not queue.available():
            raise ClusterError(
                f"job {job.id} is a Slurm job, and there is no Slurm here",
                hint="wait for it where `squeue` works",
            )


def _how_far(target: Target, trials: Sequence[FrozenTrial], busy: Collection[Job]) -> str:
    jobs = "jobs: " + _counted(job.state for job in busy)
    if target.kind == "study":
        return f"{summary(study_of(target.inventory, trials, busy))}; {jobs}"
    return f"{trials[0].state.name}; {jobs}" if trials else jobs


def _settled(inventory: Inventory, jobs: Collection[Job]) -> list[Job]:
    """How the jobs ended, also if they did not say so and the accounting does not know yet."""
    deadline = time.monotonic() + LAG
    while True:
        found = list(inventory.settled(jobs).values())
        if all(job.state != GONE for job in found) or time.monotonic() > deadline:
            return found
        time.sleep(1)


def _judge(target: Target, trials: Sequence[FrozenTrial], jobs: Sequence[Job]) -> None:
    """Say how it ended. Raises RunError unless all is well."""
    problems = []
    for job in jobs:
        if job.failed:
            said = f", {job.record.message}" if job.record and job.record.message else ""
            problems.append(f"{job.id} {job.name}: {job.state}{said}")
    if target.kind == "trial":
        states = [trial.state.name for trial in trials] or ["out of reach"]
        problems += [f"{target} is {s}" for s in states if s not in ("COMPLETE", "PRUNED")]
    study = study_of(target.inventory, trials, ()) if target.kind == "study" else None
    if study is not None and not (_is_done(target, trials) or _is_used_up(target, trials)):
        problems.append(f"{summary(study)}; trials are left, and no worker is")
    elif study is not None:  # others went on with what a worker left
        for problem in problems:
            logger.warning("%s", problem)
        problems.clear()
    if problems:
        raise RunError(
            "\n".join([*target.inventory.warnings, *problems]),
            hint="`tripletkit status`, `tripletkit logs` and `tripletkit why`",
        )
    if study is not None:
        _say(summary(study))
    else:
        states = [trial.state.name for trial in trials] or [job.state for job in jobs]
        _say(f"{target}: {_counted(states)}")


def _counted(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def _say(line: str) -> None:
    log.out.print(line, soft_wrap=True)
