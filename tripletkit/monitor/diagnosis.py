"""Why a trial or a job is as it is: from recorded facts to a cause, its evidence and the remedy.

Pure: what Slurm, the study and the files say comes in, words go out. why.py collects.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tripletkit.cluster import resources
from tripletkit.cluster.queue import PastJob
from tripletkit.errors import REQUEUE
from tripletkit.monitor.facts import JobFacts, Line, TrialFacts, bytes_of, seconds, size
from tripletkit.monitor.remedies import remedy, waits

SILENT = 1800  # seconds without a line in the log, after which a job that runs is suspect
NEAR = 0.9  # of the memory asked for: killed up there, it was killed for it


class Diagnosis(NamedTuple):
    """What happened, who says so, and what to do."""

    kind: str
    summary: str
    evidence: tuple[str, ...]
    remedy: str


class _Cause(NamedTuple):
    kind: str
    words: str  # of a job: "lost its node"
    evidence: tuple[str, ...]


# How a start of a job ended, where Slurm's own state says so.
_STATES = {
    "OUT_OF_MEMORY": ("host_oom", "ran out of memory"),
    "TIMEOUT": ("timeout", "was ended at its time limit"),
    "DEADLINE": ("timeout", "was ended at its deadline"),
    "PREEMPTED": ("preempted", "had to make room for a job of higher priority"),
    "NODE_FAIL": ("node_failure", "lost its node"),
    "BOOT_FAIL": ("node_failure", "could not start: its node did not boot"),
    "CANCELLED": ("cancelled", "was cancelled"),
    "REQUEUED": ("requeued", "was sent back to the queue"),
}
_MEMORY = {
    "host_oom": (
        "ran out of memory",
        re.compile(
            r"oom[-_ ]?kill|exceeded (job )?memory limit|Out of memory: Killed"
            r"|\bMemoryError\b|Unable to allocate",
            re.IGNORECASE,
        ),
    ),
    "cuda_oom": (
        "ran out of GPU memory",
        re.compile(
            r"CUDA out of memory|OutOfMemoryError|GPU ran out of memory|CUBLAS_STATUS_ALLOC_FAILED"
        ),
    ),
}
# slurmstepd's last words, for where there is no accounting.
_LAST_WORDS = {
    "DUE TO TIME LIMIT": "TIMEOUT",
    "DUE TO PREEMPTION": "PREEMPTED",
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "DUE TO JOB REQUEUE": "REQUEUED",
    "CANCELLED AT": "CANCELLED",
}
_NO_START = re.compile(
    r"No module named|ModuleNotFoundError|ImportError|not found|No such file or directory"
    r"|cannot execute|Permission denied"
)
_TOO_LATE = re.compile(r"s to the time limit: too few")  # a worker that stops by itself
# The family of tripletkit/errors.py.
_EXIT_CODES = {
    2: ("bad_configuration", "was given a configuration that cannot be used"),
    3: ("data_error", "was given data that cannot be used"),
    4: ("cluster_error", "could not talk to Slurm"),
    5: ("storage_lost", "lost the study's storage"),
    130: ("stopped", "was asked to stop, and saved its state"),
}
_NO_LOG = 53  # what Slurm gives as the signal of a job whose log it cannot create


def diagnose(trial: TrialFacts | None, job: JobFacts | None) -> Diagnosis:
    """The cause, its evidence and the remedy: of a trial and its newest job, or of a job alone."""
    if trial is not None:
        return _of_trial(trial, job)
    assert job is not None
    found = _of_job(job)
    words = f"job {job.id} {found.words}"
    return Diagnosis(found.kind, words, found.evidence, remedy(found.kind, None, job))


def how_it_ended(attempt: Mapping[str, Any], run: PastJob | None) -> str:
    """One attempt's end in a few words: its own, and Slurm's if that says more."""
    words = str(attempt.get("outcome", ""))
    if words == "failed":
        return f"failed ({attempt.get('cause', 'unknown')})"
    if words == "stopped" and attempt.get("message"):
        words = f"stopped: {attempt['message']}"
    if run is None or attempt.get("outcome") not in (None, "stopped"):
        return words
    if run.state in _STATES:
        return f"{words or 'killed'} ({run.state})"
    return words or f"killed ({run.state}, exit code {run.exit_code})"


def _of_trial(trial: TrialFacts, job: JobFacts | None) -> Diagnosis:
    name, reached = f"trial {trial.number}", _reached(trial)
    stated = f"the study: {name} is {trial.state}"
    match trial.state:
        case "COMPLETE":
            value = "" if trial.value is None else f": {trial.objective} {trial.value:.4f}"
            tries = f" in {len(trial.attempts)} attempts" if len(trial.attempts) > 1 else ""
            words = f"{name} is complete{tries}{value}"
            return Diagnosis("complete", words, (stated,), "nothing to do")
        case "PRUNED":
            words = f"{name} was pruned {reached}: {trial.pruned_by or 'it was worse than others'}"
            why = "nothing to do: it counts, and left its time to better ones"
            return Diagnosis("pruned", words, (stated, *_last_report(trial)), why)
        case "FAIL":
            return _of_failed(trial, job)
        case "":
            said = (*_last_attempt(trial), *(_of_job(job).evidence if job else ()))
            words = f"the study cannot be reached: {trial.message}"
            return Diagnosis("storage_lost", words, said, remedy("storage_lost", trial, job))
        case "WAITING":
            return _of_waiting(trial, job, stated)
        case _:
            return _of_work(trial, job, stated)


def _of_work(trial: TrialFacts, job: JobFacts | None, stated: str) -> Diagnosis:
    name, reached = f"trial {trial.number}", _reached(trial)
    if job is None:
        return Diagnosis(
            "lost",
            f"{name} has no worker: the one that created it died before it signed",
            (stated, "the study: the trial has no owner"),
            "`tripletkit doctor --fix` hands it to the next worker",
        )
    found = _of_job(job)
    ending = {
        "running": f": its job {job.id} {found.words}",
        "pending": f": its job {job.id} {found.words}, and then goes on with it",
        "unknown": f": its job {job.id} {found.words}",
        "gone": f", has lost its worker: job {job.id} {found.words}",
    }[job.state]
    what = remedy(found.kind, trial, job)
    if job.state == "gone":
        what = f"`tripletkit doctor --fix` hands it to the next worker; {what}"
    evidence = (stated, *_last_report(trial), *found.evidence)
    return Diagnosis(found.kind, f"{name}, {reached}{ending}", evidence, what)


def _of_waiting(trial: TrialFacts, job: JobFacts | None, stated: str) -> Diagnosis:
    name = f"trial {trial.number}"
    if job is None or not trial.attempts:
        words = f"{name} waits for a worker; none has worked on it"
        return Diagnosis("waiting", words, (stated,), remedy("waiting", trial, job))
    found = _of_job(job)
    if found.kind in ("complete", "running", "pending", "silent", "unknown"):
        # The job went on to other trials, so its own end is not why it left this one.
        said = trial.attempts[-1].get("message")
        found = _Cause("stopped", f"left it: {said}" if said else "left it", ())
    return Diagnosis(
        found.kind,
        f"{name} waits for a worker, {_reached(trial)}; its last one, job {job.id}, {found.words}",
        (stated, *_last_attempt(trial), *found.evidence),
        remedy(found.kind, trial, job),
    )


def _of_failed(trial: TrialFacts, job: JobFacts | None) -> Diagnosis:
    cause = dict(trial.cause or {"kind": "unknown", "message": "nobody said why"})
    kind, words = cause["kind"], cause["message"]
    said = [f"the study: tripletkit:cause of trial {trial.number} is {json.dumps(cause)}"]
    if kind == "killed" and job is not None:  # by what, Slurm may know
        found = _of_job(job)
        said += found.evidence
        if found.kind not in ("complete", "running", "silent"):  # else a process of it was
            kind, words = found.kind, f"{words}: job {job.id} {found.words}"
    return Diagnosis(
        kind,
        f"trial {trial.number} failed: {words}",
        (*said, *_last_attempt(trial)),
        remedy(kind, trial, job),
    )


def _reached(trial: TrialFacts) -> str:
    epoch = max(trial.reports, default=0)
    return f"after epoch {epoch} of {trial.epochs}" if epoch else "before its first epoch"


def _last_report(trial: TrialFacts) -> tuple[str, ...]:
    if not trial.reports:
        return ()
    epoch = max(trial.reports)
    return (f"the study: {trial.objective} {trial.reports[epoch]:.4f} at epoch {epoch}",)


def _last_attempt(trial: TrialFacts) -> tuple[str, ...]:
    if not trial.attempts:
        return ()
    last = trial.attempts[-1]
    said = {key: last[key] for key in ("outcome", "cause", "message") if last.get(key)}
    words = json.dumps(said) if said else "no outcome: it was killed, or goes on"
    return (f"{trial.folder}/attempts.jsonl, line {len(trial.attempts)}: {words}",)


def _of_job(job: JobFacts) -> _Cause:
    match job.state:
        case "running":
            return _of_running(job)
        case "pending":
            return _of_pending(job)
        case "unknown":
            return _Cause("unknown", "cannot be seen from here", _by_record(job))
        case "gone":
            pass
    if job.never_ran is not None and not job.runs:
        return _Cause("cancelled", "was cancelled while it waited", _by_sacct(job.never_ran))
    return next(_endings(job))


def _of_running(job: JobFacts) -> _Cause:
    said = tuple(str(line) for line in job.log[-1:])
    where = f"runs on {job.queued.node} for {job.queued.elapsed}" if job.queued else "runs"
    silent = job.silent or 0
    if job.queued:  # it may have just started again, and the log be of the start before
        silent = min(silent, seconds(job.queued.elapsed) or 0)
    if silent > SILENT:
        minutes = round(silent / 60)
        return _Cause("silent", f"{where}, but its log is silent for {minutes} minutes", said)
    return _Cause("running", where, said)


def _of_pending(job: JobFacts) -> _Cause:
    if job.queued is None:
        return _Cause("pending", "waits in the queue", ())
    words = f"waits in the queue: {waits(job.queued.reason)[0]}"
    said = [f"squeue: {job.queued.state}, {job.queued.reason or 'no reason'}"]
    if job.queued.start:
        said.append(f"squeue: Slurm expects to start it at {job.queued.start}")
    if not job.runs:
        return _Cause("pending", words, tuple(said))
    before = next(_endings(job))
    return _Cause(before.kind, f"{before.words}; now it {words}", (*before.evidence, *said))


def _endings(job: JobFacts) -> Iterator[_Cause]:
    """What may have ended its newest start, the most certain first; always something."""
    run, record = job.newest, job.newest_record
    code = record.exit_code if record is not None else None
    slurm, own = _by_sacct(run) if run else (), _by_record(job)
    if code == 0 or (code is None and run is not None and run.state == "COMPLETED"):
        yield _Cause("complete", "is done", (*slurm, *own))
    if run is not None and run.state in _STATES:
        yield _of_state(job, run, code, (*slurm, *own))
    for kind, (words, pattern) in _MEMORY.items():
        if found := _last(job, pattern):
            yield _Cause(kind, words, (str(found), *slurm))
    if record is not None and code is not None:
        kind, words = _EXIT_CODES.get(code, ("failed", f"ended with exit code {code}"))
        if record.message and "is a bug" in record.message:
            kind = "bug"
        said = f": {record.message}" if record.message else ""
        yield _Cause(kind, words + said, (*own, *slurm))
    if run is not None:
        yield from _of_exit_code(job, run, slurm)
    elif not job.is_local:
        yield from _of_last_words(job)
    where = f" on {job.record.host}" if job.record else ""
    yield _Cause("killed", f"ended{where} without a word", (*own, *_tail(job)))


def _of_state(job: JobFacts, run: PastJob, code: int | None, said: tuple[str, ...]) -> _Cause:
    kind, words = _STATES[run.state]
    if kind == "requeued" and code == REQUEUE:  # it asked for that itself
        if _at_its_limit(run) or _last(job, _TOO_LATE):
            words = f"stopped before its time limit of {run.limit}, to go on in a new start"
            return _Cause("timeout", words, said)
        return _Cause("preempted", "was told to make room, and saved its state", said)
    if kind == "requeued":
        words += " by hand (scontrol requeue), or by the site"
    if kind == "host_oom" and run.max_rss:
        words += f": it used {size(run.max_rss)} of {run.req_mem}"
    if kind == "node_failure":
        words += f" {run.node}"
    if kind == "timeout":
        words += f" of {run.limit}"
    return _Cause(kind, words, said)


def _of_exit_code(job: JobFacts, run: PastJob, slurm: tuple[str, ...]) -> Iterator[_Cause]:
    """What the exit code alone tells: the process did not get to say anything."""
    code, number = (int(part) for part in (run.exit_code or "0:0").split(":"))
    # A shell adds 128 to the signal of what it ran; some versions of Slurm take that off again.
    number = number or (code - 128 if code > 130 else code if code == signal.SIGKILL else 0)
    asked, used = bytes_of(run.req_mem), run.max_rss or 0
    if number == signal.SIGKILL and asked and used >= NEAR * asked:
        words = f"was killed when it used {size(used)} of the {run.req_mem} that it asked for"
        yield _Cause("host_oom", words, slurm)
    if number == signal.SIGKILL:
        yield _Cause("killed", f"was killed (signal 9) on {run.node}", (*slurm, *_tail(job)))
    if number == _NO_LOG:
        yield _Cause("no_start", "could not start: its log could not be created", slurm)
    if number in (signal.SIGUSR1, signal.SIGUSR2):
        words = f"died of {_signal_name(number)}, the notice of its time limit of {run.limit}"
        yield _Cause("timeout", f"{words}, which came before it could listen", slurm)
    if number:
        words = f"died of {_signal_name(number)} on {run.node}"
        yield _Cause("killed", words, (*slurm, *_tail(job)))
    began = job.newest_record is not None
    if not began and (found := _last(job, _NO_START)):
        yield _Cause("no_start", "could not start", (str(found), *slurm))
    if not began and code in (126, 127):
        yield _Cause("no_start", "could not start: no such command", (*slurm, *_tail(job)))
    if code in _EXIT_CODES:
        kind, words = _EXIT_CODES[code]
        yield _Cause(kind, words, (*slurm, *_tail(job)))
    if code:
        yield _Cause("failed", f"ended with exit code {code}", (*slurm, *_tail(job)))


def _of_last_words(job: JobFacts) -> Iterator[_Cause]:
    for line in reversed(job.log):
        for words, state in _LAST_WORDS.items():
            if "slurmstepd" in line.text and words in line.text:
                kind, ending = _STATES[state]
                yield _Cause(kind, ending, (str(line),))
    if job.record is None and (found := _last(job, _NO_START)):
        yield _Cause("no_start", "could not start", (str(found),))


def _at_its_limit(run: PastJob) -> bool:
    """Whether it ended at a time at which Slurm announces the limit."""
    elapsed, limit = seconds(run.elapsed), seconds(run.limit)
    if not elapsed or not limit:
        return False
    return elapsed >= limit - resources.signal_delay(limit) - 60


def _last(job: JobFacts, pattern: re.Pattern[str]) -> Line | None:
    return next((line for line in reversed(job.log) if pattern.search(line.text)), None)


def _tail(job: JobFacts) -> tuple[str, ...]:
    return tuple(str(line) for line in job.log[-2:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _by_sacct(run: PastJob) -> tuple[str, ...]:
    used = f", MaxRSS {size(run.max_rss)} of {run.req_mem}" if run.max_rss else ""
    node = f" on {run.node}" if run.node else ""
    times = f"{run.elapsed} of {run.limit}"
    return (f"sacct: {run.state}, exit code {run.exit_code}, {times}{node}{used}",)


def _by_record(job: JobFacts) -> tuple[str, ...]:
    record = job.newest_record
    if record is None:
        return ()
    if record.ended is None:
        return (f"{job.record_file}: no end, so it was killed, or goes on",)
    said = f", {record.message!r}" if record.message else ""
    return (f"{job.record_file}: exit code {record.exit_code}{said}",)
