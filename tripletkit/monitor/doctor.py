"""Reconciles the study, the queue and the folders: what does not fit together, and its repair.

Whatever is changed is changed in a turn at the study, in which no worker can take a trial, and only
after a second look; a trial whose job lives, or may live, is never touched.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from optuna.trial import FrozenTrial, TrialState

from tripletkit import fsio
from tripletkit.cluster import jobs
from tripletkit.cluster.jobs import LOCAL, JobState
from tripletkit.errors import ConfigError, NoStudyError, StorageError
from tripletkit.monitor import checks
from tripletkit.monitor.checks import Finding, some
from tripletkit.monitor.inventory import Inventory
from tripletkit.monitor.remedies import never_starts, waits
from tripletkit.monitor.status import used_up
from tripletkit.monitor.why import workers
from tripletkit.paths import StudyPaths, TrialPaths
from tripletkit.tune import attempts, budget, claims
from tripletkit.tune.claims import JobStates
from tripletkit.tune.storage import SharedStudy, TurnLost
from tripletkit.tune.study import ID, TOTAL

LEFTOVER = 600  # seconds: a temporary file that old is not being written any more
MANY_ATTEMPTS = 10

T = TypeVar("T")


class _Seen(NamedTuple):
    """The study as it was when the scheduler was asked."""

    shared: SharedStudy
    paths: StudyPaths
    trials: Sequence[FrozenTrial]
    states: Mapping[str, JobState]  # of the jobs that own trials in work
    lost: Sequence[FrozenTrial]
    workers: Mapping[str, str]  # and why they wait
    used_up: budget.Reached | None
    total: int

    @property
    def left(self) -> int:
        """Trials that somebody still has to work on, and nobody does."""
        waiting = sum(t.state == TrialState.WAITING for t in self.trials)
        return max(0, self.total - len(self.trials)) + waiting + len(self.lost)


def examine(inventory: Inventory, *, change: bool = True) -> Iterator[Finding]:
    """Everything that does not fit together, the storage first; to `change` it where that helps."""
    yield from checks.sick_database(inventory.config.tuning)
    at_work = workers(inventory)  # warns if Slurm does not answer; then nobody asks it again
    silent = bool(inventory.warnings)
    for warning in inventory.warnings:
        yield Finding("queue", warning, "`scontrol ping` asks whether Slurm's controller is up")

    def job_states(ids: Iterable[str]) -> Mapping[str, JobState]:
        known = {job for job in ids if job.startswith(LOCAL) or not silent}
        unknown: dict[str, JobState] = dict.fromkeys(ids, "unknown")
        return {**unknown, **jobs.states(inventory.logs, known)}

    left = 0
    try:
        seen = _look(inventory, job_states, at_work, change=change)
    except NoStudyError as error:
        # Nothing is wrong before the first `tune`: there are neither workers nor a folder yet.
        new = not at_work and not inventory.paths.identity.exists()
        yield Finding("no_study", error.message, error.hint or "", harmless=new)
    except (StorageError, ConfigError) as error:
        yield Finding("storage", error.message, error.hint or "see `tripletkit tune --help`")
    else:
        left = seen.left
        yield from _lost(seen)
        yield from _unseen(seen)
        if not silent:
            yield from _work(seen)
        foreign = list(_identity(seen))
        yield from foreign or _folders(seen)
    yield from checks.open_records(inventory.logs, job_states)
    yield from checks.full_disk("global.log_dir", inventory.logs.root)
    yield from checks.full_disk(
        "tuning.output_dir", inventory.paths.root, *checks.needs(inventory.paths, left)
    )


def _look(
    inventory: Inventory, job_states: JobStates, at_work: Mapping[str, str], *, change: bool
) -> _Seen:
    shared = inventory.study(change=change)
    states: dict[str, JobState] = {}

    def noted(ids: Iterable[str]) -> Mapping[str, JobState]:
        states.update(job_states(ids))
        return states

    lost = {t.number: t for t in claims.lost(shared, noted)}
    # In a turn nobody is about to sign a trial; and meanwhile some may have been told or taken.
    trials = _in_turn(shared, lambda: shared.study.get_trials(deepcopy=False))
    return _Seen(
        shared=shared,
        paths=inventory.paths,
        trials=trials,
        states=states,
        lost=[t for t in trials if (was := lost.get(t.number)) and _is_same(t, was)],
        workers=at_work,
        used_up=used_up(inventory, trials, job_states),
        total=shared.study.user_attrs.get(TOTAL, inventory.config.tuning.total),
    )


def _is_same(trial: FrozenTrial, before: FrozenTrial) -> bool:
    return trial.state == TrialState.RUNNING and claims.owner(trial) == claims.owner(before)


def _unclaimed(seen: _Seen, trial: FrozenTrial, call: Callable[[], T]) -> T | None:
    """Call in a turn, in which nobody can claim the trial; None if somebody has done so before."""

    def called() -> T | None:
        now = seen.shared.study._storage.get_trial(trial._trial_id)
        if now.state == TrialState.RUNNING and (
            trial.state != TrialState.RUNNING or claims.owner(now) != claims.owner(trial)
        ):
            return None
        return call()

    return _in_turn(seen.shared, called)


def _in_turn(shared: SharedStudy, call: Callable[[], T]) -> T:
    while True:
        try:
            with shared.turn():
                return call()
        except TurnLost:
            continue


def _lost(seen: _Seen) -> Iterator[Finding]:
    for trial in seen.lost:
        paths, owner = seen.paths.trial(trial.number), claims.owner(trial)
        what = f"trial {trial.number} is RUNNING, but " + (
            f"its job {owner['job']} is gone" if owner else "nobody signed it: its creator died"
        )
        # A worker that finds the lock of a folder taken, if only by us, would give up.
        if paths.lock.exists() and _unclaimed(seen, trial, partial(_is_busy, paths)):
            yield Finding(
                "busy",
                f"{what}, while a process holds {paths.lock}",
                "wait for that process, or end it: it was cut off from the scheduler",
            )
            continue
        finished = paths.final.exists() and paths.metrics.exists()
        epoch = max(trial.intermediate_values, default=0)
        yield Finding(
            "untold" if finished else "lost",
            f"{what}; its training is finished, only the study was not told" if finished else what,
            "hand it back: the next worker "
            + ("tells the study at once" if finished else f"goes on after epoch {epoch}"),
            apply=partial(_hand_back, seen, trial),
        )


def _hand_back(seen: _Seen, trial: FrozenTrial) -> bool:
    while True:
        try:
            return bool(claims.hand_back(seen.shared, [trial]))
        except TurnLost:
            continue


def _unseen(seen: _Seen) -> Iterator[Finding]:
    for trial in seen.trials:
        owner = claims.owner(trial) if trial.state == TrialState.RUNNING else None
        if not owner or not owner["job"].startswith(LOCAL):
            continue
        if seen.states.get(owner["job"], "unknown") == "unknown":
            yield Finding(
                "unseen",
                f"trial {trial.number} is RUNNING at {owner['job']} on {owner['host']}, which "
                "cannot be seen from here",
                f"look at it from {owner['host']}",
                harmless=True,
            )


def _work(seen: _Seen) -> Iterator[Finding]:
    name = seen.shared.study.study_name
    if seen.left and not seen.workers:
        done = sum(
            t.state == TrialState.WAITING and seen.paths.trial(t.number).final.exists()
            for t in seen.trials
        )
        told = f" ({done} only to be told)" if done else ""
        if seen.used_up:
            more = "`tripletkit tune` with a larger --budget-gpu-hours goes on"
            yield Finding("budget", str(seen.used_up), more, harmless=True)
        else:
            yield Finding(
                "no_worker",
                f"{seen.left} of {seen.total} trials are left{told}, and no worker runs or waits",
                f"start some: `tripletkit tune --config {shlex.quote(str(seen.paths.config))}`",
            )
    owners = {
        o["job"] for t in seen.trials if t.state == TrialState.RUNNING and (o := claims.owner(t))
    }
    if not seen.left and (idle := sorted(seen.workers.keys() - owners)):
        yield Finding(
            "idle",
            f"study {name} needs no more work, and has {len(idle)} workers in the queue: "
            f"{some(idle)}",
            f"they end at once when they start; `tripletkit cancel {some(idle)}` is faster",
            harmless=True,
        )
    for job, reason in seen.workers.items():
        if never_starts(reason):
            why, what = waits(reason)
            array = job.partition("_")[0]
            yield Finding(
                "stuck",
                f"job {job} of the study cannot start: {why} ({reason})",
                what.format(job=job, array=array),
            )
    if len(seen.trials) > seen.total:
        yield Finding(
            "surplus",
            f"study {name} has {len(seen.trials)} trials, and was to have {seen.total}",
            "nothing: its total was lowered, or somebody added trials",
            harmless=True,
        )
    for trial in (t for t in seen.trials if not t.state.is_finished()):
        count = len(attempts.read(seen.paths.trial(trial.number).attempts))
        if count > MANY_ATTEMPTS:
            yield Finding(
                "many_attempts",
                f"trial {trial.number} is at its attempt {count}",
                f"`tripletkit why {trial.number}` says how they ended",
                harmless=True,
            )


def _identity(seen: _Seen) -> Iterator[Finding]:
    path, ours = seen.paths.identity, seen.shared.study.user_attrs.get(ID)
    try:
        theirs = fsio.parse_json(path.read_text())["id"] if path.exists() else None
    except (ValueError, KeyError, TypeError):
        theirs = "unreadable"
    if theirs is not None and theirs != ours:
        yield Finding(
            "foreign_study",
            f"{seen.paths.root} holds the trials of another study: {path.name} says {theirs}, the "
            f"study says {ours}",
            "name the right one with --study-name, --storage-path or tuning.output_dir, or move "
            "the folder away",
        )


def _folders(seen: _Seen) -> Iterator[Finding]:
    folders = {
        int(match[1]): folder
        for folder in sorted(seen.paths.root.glob("trial_*"))
        if (match := re.fullmatch(r"trial_(\d{5,})", folder.name))
    }
    for number, folder in folders.items():
        if number >= len(seen.trials):
            yield Finding(
                "foreign_folder",
                f"{folder} belongs to no trial: the study has {len(seen.trials)}",
                "it is of another study, or of an older one of that name: move it away",
            )
        else:
            yield from _leftovers(seen, seen.trials[number])
    missing = [
        str(t.number) for t in seen.trials if t.intermediate_values and t.number not in folders
    ]
    if missing:
        yield Finding(
            "missing_folder",
            f"the folders of trials {some(missing)} are gone from {seen.paths.root}",
            "their values are in the study; those that are not finished start from their first "
            "epoch again",
            harmless=True,
        )


def _leftovers(seen: _Seen, trial: FrozenTrial) -> Iterator[Finding]:
    paths = seen.paths.trial(trial.number)
    if not (left := _old_leftovers(paths)) or not _is_at_rest(seen, trial):
        return
    yield Finding(
        "leftover",
        f"{paths.root}: {some([file.name for file in left])}, left behind by a process that was "
        "killed",
        "remove it",
        apply=lambda: bool(_unclaimed(seen, trial, partial(_remove, paths, left))),
    )


def _remove(paths: TrialPaths, left: Iterable[Path]) -> bool:
    with fsio.exclusive_lock(paths.lock, wait=False) as lock:
        if lock.ours and lock.sure:
            for file in left:
                file.unlink(missing_ok=True)
        return lock.ours and lock.sure


def _old_leftovers(paths: TrialPaths) -> list[Path]:
    now = time.time()
    return [
        file
        for file in sorted(paths.root.glob(".*.tmp"))
        if file.is_file() and now - file.stat().st_mtime > LEFTOVER
    ]


def _is_at_rest(seen: _Seen, trial: FrozenTrial) -> bool:
    """Whether nobody works on the trial, for sure."""
    return trial.state != TrialState.RUNNING or trial.number in {t.number for t in seen.lost}


def _is_busy(paths: TrialPaths) -> bool:
    """Whether a process holds the trial's folder, whatever the scheduler says of its job."""
    with fsio.exclusive_lock(paths.lock, wait=False) as lock:
        return not lock.ours
