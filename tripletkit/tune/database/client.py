"""What users of a database and its commands need: how to reach it, how it is, stop it."""

from __future__ import annotations

import contextlib
import ipaddress
import shlex
import socket
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg2

from tripletkit import fsio
from tripletkit.cluster import jobs, queue
from tripletkit.errors import ClusterError, ConfigError, StorageError
from tripletkit.log import logger
from tripletkit.tune.database import lease, server
from tripletkit.tune.database.lease import STALE_AFTER, Beats, Holder
from tripletkit.tune.database.programs import tail
from tripletkit.tune.database.server import SUPERUSER, Connection, DatabasePaths

POOLED_WORKERS = 90  # as in tune/postgresql.py
ROOM = 20  # connections for commands, people, and PostgreSQL's reserve for its superuser
LEAST = 300  # connections, as in slurm/database.sbatch
DOWN_SECONDS = 300.0  # to stop and write the dump
LEAVE_SECONDS = 30.0  # for a job to leave the queue; then it is there for something else
LOOK_AT_LOCAL, LOOK_AT_SLURM = 1.0, 15.0  # seconds between two looks at a job
LOOK_AT_LEAVING = 2.0  # and at one that is to end soon
POLL = 0.5  # seconds between two looks at the folder


@dataclass(frozen=True)
class Status:
    """What is known of a database.

    `state` is up, starting, stopping, down or unreachable; `connections` and `size` (bytes) are known
    only while it is up.
    """

    state: str
    job: str = ""
    host: str = ""
    port: int = 0
    since: str = ""
    connections: int = 0
    max_connections: int = 0
    size: int = 0
    message: str = ""

    def __str__(self) -> str:
        text = self.state
        if self.state == "up":
            text += (
                f" since {self.since}: job {self.job}, {self.host}:{self.port}, "
                f"{self.connections} of {self.max_connections} connections, {self.size / 1e6:.1f} MB"
            )
        elif self.job:
            text += f": job {self.job} on {self.host}, started {self.since}"
        return f"{text}; {self.message}" if self.message else text


def max_connections_for(workers: int) -> int:
    """Connections that a server needs for so many workers.

    Up to POOLED_WORKERS of them keep one and use three at times. Of more workers each has one for a
    moment, between trainings; the server needs memory for a connection only while it is open. So
    there are LEAST: who starts a database may not know yet how many workers it will have.
    """
    return max(LEAST, workers + 2 * min(workers, POOLED_WORKERS) + ROOM)


def connection(folder: Path) -> Connection:
    """How to reach the database of `folder`, now: it may move.

    Raises StorageError if it is down, and ConfigError if it is not for this host: no waiting mends
    that.
    """
    path = DatabasePaths(folder).connection
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(
            f"no PostgreSQL runs in {folder}",
            hint=f"`tripletkit db up {shlex.quote(str(folder))}` starts one",
        ) from None
    except PermissionError:
        raise StorageError(
            f"the PostgreSQL in {folder} is another user's",
            hint="`tripletkit db up` starts your own",
        ) from None
    try:
        found = fsio.parse_json(content)
        node = found.pop("node")
        loopback = ipaddress.ip_address(found["host"]).is_loopback
        known = Connection(**found)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise lease.damaged(path) from None
    if loopback and node != socket.gethostname():
        word = shlex.quote(str(folder))
        raise ConfigError(
            f"the PostgreSQL in {folder} serves only processes on {node}",
            hint=f"`tripletkit db down {word}`, then `tripletkit db up {word} --cluster slurm`",
        )
    return known


def wait_until_up(
    folder: Path, deadline: float, job: str | None = None, log: Path | None = None
) -> Connection:
    """Wait until the database accepts connections, at most until time.monotonic() is `deadline`.

    With `job`, the one that is to serve, a job that ends is noticed, and the end of its `log` shown.
    Raises StorageError.
    """
    paths = DatabasePaths(folder)
    before = lease.read(paths.record)
    job_state, next_look = "", 0.0
    while True:
        try:
            found = connection(folder)
            found.open().close()
            return found
        except (StorageError, ConfigError) as error:  # perhaps a former server's address
            why = error.message
        except psycopg2.OperationalError as error:
            why = " ".join(str(error).split())
        holder = lease.read(paths.record)
        if holder and holder.state == "failed" and (holder != before or holder.job == job):
            raise StorageError(
                f"{holder}: {holder.message}", hint=f"`tripletkit logs {holder.job}` shows more"
            )
        if job is not None and time.monotonic() >= next_look:
            pause = LOOK_AT_LOCAL if job.startswith(jobs.LOCAL) else LOOK_AT_SLURM
            next_look = time.monotonic() + pause
            before_state, job_state = job_state, _job_state(job, log)
            if job_state != before_state:
                logger.info("%s", job_state)
        if time.monotonic() > deadline:
            raise StorageError(
                "; ".join(filter(None, [why, job_state])),
                hint=f"`tripletkit db status {shlex.quote(str(folder))}` and the job's log tell more; "
                "the job goes on",
            )
        time.sleep(POLL)


def _job_state(job: str, log: Path | None) -> str:
    """How the job is. Raises StorageError if it has ended."""
    ended = f"job {job} has ended"
    if job.startswith(jobs.LOCAL):
        stat = Path("/proc", job.removeprefix(jobs.LOCAL), "stat")  # proc_pid_stat(5)
        with contextlib.suppress(FileNotFoundError):
            if stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
                return f"job {job} runs"
    else:
        try:
            if rows := queue.queued([job]):
                return f"job {job} is {rows[0].state}" + (
                    f" ({rows[0].reason})" if rows[0].reason else ""
                )
            if runs := queue.past([job]):
                ended += f" ({runs[-1].state})"
        except ClusterError as error:
            return f"cannot ask Slurm about job {job}: {error.message}"
    message = f"{ended}, and its database is not up"
    if log is not None and log.exists() and (said := tail(log.read_text(errors="replace"))):
        message += f"; the end of {log}:\n{said}"
    raise StorageError(message, hint=f"`tripletkit logs {job}` shows more")


def status(folder: Path) -> Status:
    """Whether the database is up, and how much it is used."""
    paths = DatabasePaths(folder)
    holder = lease.read(paths.record)
    if holder is None:
        return Status("down")
    known = Status("down", holder.job, holder.host, since=holder.since, message=holder.message)
    if holder.over:
        return known
    try:
        found = connection(folder)
        # Also when the workers use up all others, connections are reserved for the superuser.
        secret = server.passwords(paths)[SUPERUSER]
        superuser = found._replace(user=SUPERUSER, password=secret)
        with closing(superuser.open()) as opened, opened.cursor() as cursor:
            cursor.execute(_USE, [found.database])
            used, most, size = cursor.fetchone()
    except (StorageError, ConfigError, psycopg2.OperationalError) as error:
        silent = time.time() - paths.record.stat().st_mtime
        if silent > 2 * STALE_AFTER:  # clocks differ
            return replace(known, message=f"not heard of for {silent:.0f} s")
        if holder.state != "up":
            return replace(known, state=holder.state)
        why = " ".join(str(error).split())
        return replace(known, state="unreachable", message=why)
    return replace(
        known, state="up", host=found.host, port=found.port,
        connections=used, max_connections=most, size=size,
    )  # fmt: skip


_USE = """
    SELECT count(*) FILTER (WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()),
           current_setting('max_connections')::int, pg_database_size(%s)
    FROM pg_stat_activity
"""


def down(folder: Path) -> None:
    """Stop the database and wait for its dump; its job, if it is to run again, is cancelled.

    The request lies in the folder, so it reaches every machine, and leaves time for the dump, unlike
    a signal. Raises StorageError if there is no database, and if its server does not react.
    """
    paths = DatabasePaths(folder)
    holder = lease.read(paths.record)
    if holder is None:
        raise StorageError(
            f"there is no database in {folder}",
            hint="for a job that has not started yet: `tripletkit cancel JOB`",
        )
    complaint = ""
    if holder.over:
        logger.info("the database in %s is down already", folder)
    elif _queue_state(holder.job) not in jobs.PENDING:
        complaint = _stop(paths, holder)
    _keep_down(paths, holder)
    if complaint:
        raise StorageError(f"{holder} has stopped: {complaint}")


def _stop(paths: DatabasePaths, holder: Holder) -> str:
    """Ask a server to stop, and wait until it has; returns what went wrong."""
    paths.stop.write_text(holder.token)  # in place: a network file system sees it at once
    beats, deadline = Beats(paths.record), time.monotonic() + DOWN_SECONDS
    while (now := lease.read(paths.record)) and now.token == holder.token and not now.over:
        if beats.silent() > STALE_AFTER:
            logger.warning("%s died without a dump; its data are in %s", holder, paths.data)
            return ""
        if time.monotonic() > deadline:
            raise StorageError(
                f"{holder} does not stop", hint=f"`tripletkit cancel {holder.job}` ends its job"
            )
        time.sleep(POLL)
    if now is not None and now.token == holder.token and now.message:
        return now.message
    logger.info("stopped; dump: %s", paths.dump)
    return ""


def _keep_down(paths: DatabasePaths, holder: Holder) -> None:
    """See the job of a server that has stopped out of the queue.

    It may be about to ask for another start, or Slurm be about to requeue it: until it has ended it
    is COMPLETING, and then it waits.
    """
    deadline = time.monotonic() + LEAVE_SECONDS
    while state := _queue_state(holder.job):
        if state in jobs.PENDING or state == "COMPLETING":  # if it ends anyway, nothing happens
            queue.cancel([holder.job])
            if state in jobs.PENDING:
                logger.info("cancelled job %s, which waited to run again", holder.job)
        elif (now := lease.read(paths.record)) and now.token != holder.token:
            down(paths.root)  # it runs again
            return
        if time.monotonic() > deadline:
            logger.warning("job %s is still %s", holder.job, state)
            return
        time.sleep(LOOK_AT_LEAVING)


def _queue_state(job: str) -> str:
    """Of a job in the queue; "" if it is not there, or is the one that we run in ourselves."""
    if job.startswith(jobs.LOCAL) or job == jobs.current_job():
        return ""
    try:
        return next((row.state for row in queue.queued([job])), "")
    except ClusterError as error:
        logger.warning("cannot ask Slurm about job %s: %s", job, error.message)
        return ""
