"""What the job of a database does.

Two servers on one data folder would destroy it, and PostgreSQL itself notices the other one only
within a machine. So the server of a folder holds its lease (lease.py), and who takes over from one
that may be alive on another machine first removes the lock file in the data folder: PostgreSQL looks
for it every minute, and ends at once where it is gone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from tripletkit import fsio
from tripletkit.cluster import jobs
from tripletkit.errors import StorageError
from tripletkit.log import logger
from tripletkit.tune.database import lease, programs, server
from tripletkit.tune.database.lease import PAUSE, Hold, Lease, LeaseLostError
from tripletkit.tune.database.programs import Tick
from tripletkit.tune.database.server import DATABASE, USER, DatabasePaths, Postgres

# "Worst case, at most two minutes", says PostgreSQL's commit 7e2a18a9.
FENCE = 125.0
# A signal to every process of a job may reach the server before us.
SIGNAL_SECONDS = 5.0
POLL = 0.5  # seconds between two looks at the server
BY_SIGNAL, BY_DOWN = "a signal", "`tripletkit db down`"  # who asks a server to stop


def serve(folder: Path, *, max_connections: int, should_stop: Callable[[], bool]) -> str:
    """Run the PostgreSQL of `folder`, in the foreground, until asked to stop; returns who asked.

    On first use it is made, from the dump if there is one; in the end it leaves a dump. Raises
    StorageError if another server holds the folder, if it cannot be run, and when it dies.
    """
    paths = DatabasePaths(folder)

    def tick() -> None:
        if should_stop():
            raise _AskedToStop(BY_SIGNAL)

    with _private_files():
        _prepare(paths)
        try:
            with lease.hold(paths.record, jobs.current_job(), tick) as hold:
                stopped_by = _serve(paths, hold, max_connections, tick)
            # `down` may have come while we stopped, and has said that we do. From now on it finds
            # that we have stopped, and sees to our job.
            return BY_DOWN if _asked_down(paths, hold.lease) else stopped_by
        except _AskedToStop as stop:  # before the folder was ours
            return str(stop)


class _AskedToStop(Exception):  # noqa: N818 - not an error
    """By whom."""


def _serve(paths: DatabasePaths, hold: Hold, max_connections: int, check_signal: Tick) -> str:
    ours = hold.lease
    fsio.write_text(paths.stop, "")  # there from the start: a network file system caches absence

    def tick() -> None:
        ours.beat()
        check_signal()
        if _asked_down(paths, ours):
            raise _AskedToStop(BY_DOWN)

    found = programs.find(paths.data)
    _give_to(found.owner, paths.root)
    with server.socket_folder(found.owner) as sockets:
        postgres = Postgres(found, paths, sockets, server.passwords(paths), ours.beat)
        try:
            _make_way(paths, hold, tick)
            if not paths.data.exists():
                postgres.make(tick)
            _run(postgres, ours, max_connections, tick)
        except _AskedToStop as stop:
            logger.info("asked to stop by %s", stop)
            if ours.holder.state == "stopping":
                _dump(postgres, ours)
            return str(stop)


def _asked_down(paths: DatabasePaths, ours: Lease) -> bool:
    with contextlib.suppress(OSError):
        return paths.stop.read_text() == ours.holder.token
    return False


def _run(postgres: Postgres, ours: Lease, max_connections: int, tick: Tick) -> NoReturn:
    """Accept clients until `tick` raises; StorageError if the server dies."""
    paths = postgres.paths
    address = "127.0.0.1" if ours.holder.job.startswith(jobs.LOCAL) else _node_address()
    port = _free_port(address)
    logger.info(
        "PostgreSQL of %s; data in %s (on a network file system every commit waits for the network)",
        postgres.programs.folder,
        paths.data,
    )
    with postgres.running(
        paths.data, tick, address=address, port=port, most=max_connections
    ) as process:
        try:
            client = postgres.connection(address, port, USER, DATABASE)
            ours.note("up")
            fsio.write_json(paths.connection, client._asdict() | {"node": ours.holder.host})
            logger.info("up at %s:%d, for %d connections", address, port, max_connections)
            while process.poll() is None:
                tick()
                time.sleep(POLL)
            # Slurm signals every process of a job: ours may be on its way.
            deadline = time.monotonic() + SIGNAL_SECONDS
            while time.monotonic() < deadline:
                tick()
                time.sleep(PAUSE)
            raise postgres.failure("PostgreSQL stopped by itself")
        except LeaseLostError:
            raise  # the file is another's by now
        except BaseException:
            ours.note("stopping")
            paths.connection.unlink(missing_ok=True)
            raise


def _dump(postgres: Postgres, ours: Lease) -> None:
    """Started anew for us alone: the old server may have been signalled, too, and nobody writes."""
    try:
        postgres.dump()
        logger.info("dump: %s", postgres.paths.dump)
    except StorageError as error:
        message = f"no new dump: {error.message}"
        logger.warning("%s\nthe data are safe in %s", message, postgres.paths.data)
        ours.note("stopping", message)


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _prepare(paths: DatabasePaths) -> None:
    folder = paths.root
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (paths.record.exists() or paths.dump.exists()):
        raise StorageError(f"{folder} holds other files", hint="name a folder that is new or empty")
    folder.chmod(0o700)


def _give_to(owner: str | None, folder: Path) -> None:
    """PostgreSQL does not run as root, but as `owner`."""
    if owner is None:
        return
    shutil.chown(folder, owner)
    test = ["test", "-w", str(folder)]
    if subprocess.run(test, user=owner, extra_groups=[], check=False).returncode:  # noqa: S603
        raise StorageError(
            f"as root PostgreSQL runs as user {owner}, who cannot reach {folder}",
            hint="name a folder below one that everybody may enter",
        )


def _make_way(paths: DatabasePaths, hold: Hold, tick: Tick) -> None:
    """Return when no other server can write into the folder any more."""
    if hold.former_may_live and paths.data.exists():
        logger.warning("waiting %.0f s, in which a server on another machine would stop", FENCE)
        (paths.data / "postmaster.pid").unlink(missing_ok=True)
        deadline = time.monotonic() + FENCE
        while time.monotonic() < deadline:
            tick()
            time.sleep(PAUSE)
    server.end_leftovers(paths.data, tick)


def _node_address() -> str:
    """Where the other nodes reach this one."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        found = [row[4][0] for row in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        for address in sorted(map(ipaddress.ip_address, found), key=lambda a: a.version):
            if not (address.is_loopback or address.is_link_local):
                return str(address)
    # Debian names the loopback after the host. The kernel knows from where it would send; 192.0.2.1
    # is nobody's address (RFC 5737), and connecting UDP sends nothing.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def _free_port(address: str) -> int:
    """Below the ports that the kernel gives to clients, 32768 and up."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(100):
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((address, port))
            return port
    raise StorageError(f"no free port at {address} between 20000 and 32000")
