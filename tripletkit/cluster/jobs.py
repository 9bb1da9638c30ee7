"""Jobs and what they say about themselves: who am I, until when, and who else lives.

A job writes a record when it starts and when it ends, and holds a lock for as long as its process
lives. Slurm knows more about its own jobs; for background processes the records are all there is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from tripletkit import fsio
from tripletkit.cluster import queue
from tripletkit.errors import ClusterError, Interrupted, RunError
from tripletkit.log import logger
from tripletkit.paths import LogPaths

JobState = Literal["running", "pending", "gone", "unknown"]

LOCAL = "local-"
# For so long we wait for a process that its node's failure cut off from the scheduler.
ORPHAN_SECONDS = 600.0
# Of the states that squeue shows, those of a job that is over, and that does not run but will.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "TIMEOUT",
)  # fmt: skip
PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


@dataclass(frozen=True)
class Record:
    """What a job says about itself. Times are UTC, ISO 8601; `ended` is absent while it runs."""

    job: str
    stage: str
    name: str
    host: str
    pid: int
    restart: int
    config: str
    started: str
    ended: str | None = None
    exit_code: int | None = None
    message: str | None = None
    fruitless: int = 0  # starts in a row, up to the newest, that ended without progress

    def fruitless_after(self, *, progress: bool) -> int:
        """What `fruitless` is when this start has ended."""
        return 0 if progress else self.fruitless + 1


class Ended(Protocol):
    """Notes the end of a job in its record."""

    def __call__(self, exit_code: int, message: str | None, *, progress: bool = True) -> None:
        """`progress`: whether this start of it got anywhere."""


def current_job() -> str:
    """`123`, `123_4` in an array, `local-<pid>` outside of Slurm. The same after a requeue."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    if "SLURM_JOB_ID" in env:
        return env["SLURM_JOB_ID"]
    return LOCAL + env.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))


def restart_count() -> int:
    """How often Slurm has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def deadline(job: str) -> float | None:
    """When Slurm ends this job, as Unix time; None without a limit or when it cannot be asked."""
    if job.startswith(LOCAL):
        return None
    try:
        end = queue.job_facts(job).get("EndTime", "Unknown")
    except ClusterError as error:
        logger.warning("cannot ask Slurm for the time limit: %s", error.message)
        return None
    try:
        return datetime.fromisoformat(end).timestamp()  # local time, as Slurm prints it
    except ValueError:
        return None


@contextlib.contextmanager
def recorded(
    logs: LogPaths, record: Record, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Ended]:
    """Keep the record of a running job; yields what notes its end.

    A process of the job's former start may live on when its node was cut off from the scheduler:
    then we wait for it, and raise Interrupted if that takes too long. Raises RunError if another
    process runs under the same job id.
    """
    with _own_lock(logs.lock(record.job), record, should_stop) as ours:
        if not ours and record.restart:
            raise Interrupted(
                f"a process of the former start of job {record.job} still runs",
                hint="its node was cut off from Slurm; it ends when the node is back",
                progress=False,
            )
        if not ours:
            raise RunError(
                f"job {record.job} already runs a process of ours",
                hint="ask for one task per job (--ntasks=1)",
            )
        path = logs.record(record.job)
        fsio.write_json(path, asdict(record))

        def ended(exit_code: int, message: str | None, *, progress: bool = True) -> None:
            done = replace(
                record, ended=fsio.timestamp(), exit_code=exit_code, message=message,
                fruitless=record.fruitless_after(progress=progress),
            )  # fmt: skip
            fsio.write_json(path, asdict(done))

        yield ended


@contextlib.contextmanager
def _own_lock(path: Path, record: Record, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock, or yield False. Who asks whether we live holds it for a moment, too."""
    began, said = time.monotonic(), False
    while True:
        with fsio.exclusive_lock(path, wait=False) as lock:
            waited = time.monotonic() - began
            if lock.ours or should_stop() or waited > (ORPHAN_SECONDS if record.restart else 2):
                yield lock.ours
                return
        if waited > 2 and not said:
            logger.warning(
                "job %s: a process of its former start still runs, cut off from Slurm: waiting "
                "for its end", record.job,
            )  # fmt: skip
            said = True
        time.sleep(0.05)


def records(logs: LogPaths) -> list[Record]:
    """The records of all jobs that ever ran, by id."""
    return [found for path in logs.records() if (found := read(path)) is not None]


def read(path: Path) -> Record | None:
    """One record, or None where there is none."""
    try:
        return Record(**fsio.parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def new_record(
    job: str, stage: str, name: str, config: str, *, before: Record | None = None
) -> Record:
    """The record of a job that starts here and now; `before` is that of its former start."""
    again = before if before is not None and before.restart < restart_count() else None
    return Record(
        job=job,
        stage=stage,
        name=name,
        host=socket.gethostname(),
        pid=os.getpid(),
        restart=restart_count(),
        config=config,
        started=fsio.timestamp(),
        fruitless=again.fruitless if again is not None else 0,
    )


def states(logs: LogPaths, ids: Iterable[str]) -> dict[str, JobState]:
    """What has become of these jobs; asks Slurm once, and the locks of local processes."""
    ids = sorted(set(ids))
    found: dict[str, JobState] = {
        job: _state_of_process(logs, job) for job in ids if job.startswith(LOCAL)
    }
    if slurm := [job for job in ids if not job.startswith(LOCAL)]:
        try:
            queued = {row.id: row.state for row in queue.queued(slurm)}
        except ClusterError as error:
            logger.warning("cannot ask Slurm who lives: %s", error.message)
            return found | dict.fromkeys(slurm, "unknown")
        for job in slurm:
            state = queued.get(job)
            found[job] = "gone" if state is None else "pending" if state in PENDING else "running"
    return found


def _state_of_process(logs: LogPaths, job: str) -> JobState:
    record = read(logs.record(job))
    if record is not None and record.host != socket.gethostname():
        return "unknown"  # a lock may not be seen from another host
    if not logs.lock(job).exists():  # it may have another log folder
        return "unknown" if _is_a_worker(job) else "gone"
    with fsio.exclusive_lock(logs.lock(job), wait=False) as lock:
        return "gone" if lock.ours and lock.sure else "running" if lock.sure else "unknown"


def _is_a_worker(job: str) -> bool:
    """Whether a process of ours has this number on this host."""
    try:
        command = Path(f"/proc/{job.removeprefix(LOCAL)}/cmdline").read_bytes()
    except OSError:
        return False
    return b"tripletkit" in command or b"submitit.core" in command
