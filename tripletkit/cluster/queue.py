"""The only caller of Slurm's commands: squeue, sacct, scancel, scontrol, sinfo, sacctmgr, sbatch.

Job ids are `"123"`, or `"123_4"` for an element of an array. Where ids are asked for, `"123"` also
stands for every element of the array 123. Written for Slurm 21.08 and later.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tripletkit.errors import ClusterError
from tripletkit.log import logger

TIMEOUT = 60.0  # seconds that one command may take; Slurm's own patience is shorter
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between tries when the controller does not answer
BUSY = re.compile(
    r"Unable to contact slurm controller|timed out|Zero Bytes|Unexpected message received"
    r"|Connection (?:refused|reset)|temporarily unable|standby mode",
    re.IGNORECASE,
)
SILENCE = "is the Slurm controller up? `scontrol ping` asks it"
UNKNOWN_ID = "Invalid job id"
# Variables of these names change what the commands print.
OVERRIDES = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SINFO_", "SLURM_TIME_FORMAT")
# What Slurm prints instead of nothing.
NOTHING = {"N/A", "None", "Unknown", "None assigned", "(null)", "NOT_SET"}


class QueuedJob(NamedTuple):
    """A job in the queue, as squeue sees it. Text is "" where there is nothing to say."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    elapsed: str  # [days-]hours:minutes:seconds, like `limit`
    limit: str
    start: str  # local time, ISO 8601; of a pending job Slurm's estimate, if it has one
    node: str
    reason: str  # why it waits
    name: str


class PastJob(NamedTuple):
    """One run of a job, as the accounting sees it; a requeued job has several."""

    id: str
    state: str  # COMPLETED, FAILED, TIMEOUT, CANCELLED, PREEMPTED, NODE_FAIL, REQUEUED, ...
    exit_code: str  # "code:signal"
    node: str
    elapsed: str
    limit: str
    submit: str  # local time, ISO 8601, like `start` and `end`
    start: str
    end: str
    req_mem: str
    reason: str
    name: str
    max_rss: int | None  # bytes, of the largest step; None if nobody measured


def available() -> bool:
    """Whether jobs can be submitted from here."""
    return all(shutil.which(program) for program in ("sbatch", "srun"))


def queued(ids: Iterable[str] | None = None) -> list[QueuedJob]:
    """These jobs, or all of this user, as far as they are in the queue; one call of squeue.

    Raises ClusterError if squeue fails.
    """
    command = ["squeue", "--noheader", "--array", "--all", "--format=%i|%T|%M|%l|%S|%N|%r|%j"]
    if ids is None:
        wanted = None
        command.append(f"--user={os.getuid()}")
    else:
        wanted = set(ids)
        if not wanted:
            return []
        command.append(f"--jobs={_numbers(wanted)}")
    done = _call(*command)
    if done.returncode:
        if UNKNOWN_ID in done.stderr:  # only said when it was asked for a single one
            return []
        raise _failure(done)
    rows = [QueuedJob(*cells) for cells in _rows(done.stdout, len(QueuedJob._fields))]
    return [row for row in rows if wanted is None or _is_among(row.id, wanted)]


def past(ids: Iterable[str]) -> list[PastJob]:
    """Every run of these jobs, oldest first; one call of sacct, [] where accounting is off.

    A run that goes on is there too. Raises ClusterError if sacct fails.
    """
    wanted = set(ids)
    if not wanted:
        return []
    fields = "MaxRSS,JobID,State,ExitCode,NodeList,Elapsed,Timelimit,Submit,Start,End,ReqMem,Reason"
    done = _call(
        "sacct", "--parsable2", "--noheader", "--duplicates",
        f"--jobs={_numbers(wanted)}", f"--format={fields},JobName",
    )  # fmt: skip
    if done.returncode:
        if "accounting storage is disabled" in done.stderr:
            logger.debug("sacct: accounting is off")
            return []
        raise _failure(done)
    runs: list[PastJob] = []
    for rss, job, state, *facts in _rows(done.stdout, len(PastJob._fields)):
        size = _bytes(rss)
        if "." not in job:
            state = state.partition(" ")[0]  # "CANCELLED by 0"
            runs += (PastJob._make([each, state, *facts, size]) for each in _elements(job))
        elif size is not None and runs:  # a step; the steps of a run follow its own row
            runs[-1] = runs[-1]._replace(max_rss=max(size, runs[-1].max_rss or 0))
    return sorted((r for r in runs if _is_among(r.id, wanted)), key=lambda run: run.submit)


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; those that are gone already are fine. Raises ClusterError."""
    if jobs := sorted(set(ids)):
        done = _call("scancel", "--quiet", *jobs)
        errors = [line for line in done.stderr.splitlines() if not _is_gone(line)]
        if done.returncode and errors:
            raise _failure(done)


def requeue(job: str) -> bool:
    """Have Slurm run a job again from the start; False if it is waiting for that already.

    Slurm also revives a job that was cancelled a moment ago: look before you ask. Raises
    ClusterError if Slurm refuses.
    """
    done = _call("scontrol", "requeue", job)
    if done.returncode == 0:
        return True
    if "pending execution" in done.stderr:
        return False
    raise _failure(done)


def job_facts(job: str) -> dict[str, str]:
    """Everything Slurm says about a job in its memory, by `scontrol`'s names; {} if it forgot it.

    Of an array asked for as a whole, the first record. Raises ClusterError.
    """
    done = _call("scontrol", "show", "job", "--oneliner", job)
    if done.returncode:
        if UNKNOWN_ID in done.stderr:
            return {}
        raise _failure(done)
    return next(_records(done.stdout), {})


def settings() -> dict[str, str]:
    """The configuration of the cluster, by the names of slurm.conf. Raises ClusterError."""
    lines = (line.partition("=") for line in _output("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, found, value in lines if found}


def partitions() -> list[dict[str, str]]:
    """The partitions, by `scontrol`'s names. Raises ClusterError."""
    found = _records(_output("scontrol", "show", "partition", "--oneliner"))
    return [each for each in found if each.keys() >= {"PartitionName", "MaxTime", "Default"}]


def nodes(partition: str | None = None) -> list[str]:
    """The kinds of nodes, of all partitions or of some (`a,b`), a line each. Raises ClusterError."""
    where = [f"--partition={partition}"] if partition else []
    lines = _output("sinfo", "--noheader", "--format=%c CPUs, %m MB, gres %G", *where)
    return sorted({line.replace("(null)", "none") for line in lines.splitlines()})


def node_hosts() -> set[str]:
    """The short host names of the nodes. Raises ClusterError."""
    names = _output("sinfo", "--noheader", "--Node", "--format=%n").split()
    return {name.partition(".")[0] for name in names}


def accounts() -> list[str]:
    """The accounts that this user may charge; [] where nobody keeps accounts."""
    if shutil.which("sacctmgr") is None:
        return []
    done = _call(
        "sacctmgr", "--noheader", "--parsable2", "--readonly", "show", "associations",
        f"user={_user()}", "format=account",
    )  # fmt: skip
    return sorted(set(done.stdout.split())) if done.returncode == 0 else []


def test_only(script: str, environment: Mapping[str, str]) -> str:
    """When and where Slurm would start this script, in its own words; nothing is submitted.

    Raises ClusterError with sbatch's words if it would refuse it.
    """
    done = _call("sbatch", "--test-only", text=script, environment=environment)
    if done.returncode:
        raise _failure(done)
    verdict = re.search(r"to start at .*", done.stderr)
    return verdict.group() if verdict else done.stderr.strip()


def _call(
    *command: str, text: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, again if the controller does not answer.

    Raises ClusterError if it stays silent; a refusal is for the caller to judge.
    """
    kept = {k: v for k, v in (environment or os.environ).items() if not k.startswith(OVERRIDES)}
    variables = {**kept, "SLURM_BITSTR_LEN": "0"}  # do not abbreviate lists of elements
    pauses = iter(PAUSES)
    while True:
        try:
            done = subprocess.run(  # noqa: S603 - a list of words, no shell
                command, input=text, env=variables, capture_output=True, text=True, errors="replace",
                timeout=TIMEOUT, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise ClusterError(
                f"{command[0]}: command not found",
                hint="run this where Slurm is installed, or use --cluster local",
            ) from None
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{command[0]} did not answer within {TIMEOUT:.0f} s",
                hint=SILENCE,
            ) from None
        if done.returncode == 0 or not BUSY.search(done.stderr):
            return done
        pause = next(pauses, None)
        if pause is None:
            raise ClusterError(_said(done), hint=SILENCE)
        logger.info("%s; asking again in %.0f s", _said(done), pause)
        time.sleep(pause)


def _output(*command: str) -> str:
    done = _call(*command)
    if done.returncode:
        raise _failure(done)
    return done.stdout


def _failure(done: subprocess.CompletedProcess[str]) -> ClusterError:
    return ClusterError(_said(done))


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The words of a command that failed, which begin with its name."""
    command = done.args[0]
    words = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
    return (
        words if words.startswith(command) else f"{command}: {words or f'exit {done.returncode}'}"
    )


def _numbers(ids: Iterable[str]) -> str:
    """The jobs and arrays that these ids belong to, for --jobs."""
    return ",".join(sorted({job.partition("_")[0] for job in ids}))


def _is_among(job: str, wanted: set[str]) -> bool:
    return job in wanted or job.partition("_")[0] in wanted


def _is_gone(line: str) -> bool:
    return UNKNOWN_ID in line or "already completing or completed" in line


def _rows(text: str, columns: int) -> Iterator[list[str]]:
    """Cells of the lines; the last one is the job's name, which may hold the separator."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|", columns - 1)]
        if len(cells) == columns:  # not so: the headline that names one of several clusters
            yield ["" if cell in NOTHING else cell for cell in cells[:-1]] + cells[-1:]


def _records(text: str) -> Iterator[dict[str, str]]:
    """The `Key=value` pairs of each line; values may hold spaces."""
    for line in text.splitlines():
        pairs = (word.partition("=") for word in re.split(r" +(?=[A-Z][\w/:]*=)", line.strip()))
        if record := {key: value for key, found, value in pairs if found}:
            yield record


def _elements(job: str) -> list[str]:
    """`12_[0-2,5%2]`, the elements of an array that have not been looked at yet, one by one."""
    array, bracket, rest = job.partition("[")
    if not bracket:
        return [job]
    found: list[int] = []
    for part in rest.rstrip("]").partition("%")[0].split(","):
        bounds = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7})(?::([1-9][0-9]{0,6}))?)?", part)
        if bounds is None:  # nothing that Slurm writes
            return [job]
        found += range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1, int(bounds[3] or 1))
    return [f"{array}{index}" for index in found]


def _bytes(size: str) -> int | None:
    """`1.5M`, in bytes."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([KMGT]?)", size)
    return round(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
