"""A PostgreSQL in a folder: make it, run it, dump and restore it.

No password is ever on a command line, in the server's log or in a file that others can read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2

from tripletkit import fsio
from tripletkit.errors import StorageError
from tripletkit.log import logger
from tripletkit.tune.database.lease import PAUSE, LeaseLostError
from tripletkit.tune.database.programs import Programs, Tick, tail

SUPERUSER = "postgres"  # for us; the server keeps connections in reserve for it
USER = DATABASE = "tripletkit"

START_SECONDS = 600.0  # after a crash it first reads its log, maybe over a slow network
# Then it is ended as in a crash, which loses nothing. PostgreSQL 15 hangs when it is asked to stop
# while it starts again after a signal to all of its processes.
STOP_SECONDS = 15.0
LEFTOVER_SECONDS = 120.0

SOCKET_BYTES = 107  # the longest path of a socket, unix(7)
SOCKET_PORT = 5432  # only names the socket of a server that has no other port

# Everybody has to know the password, also over the socket.
HBA = "local all all scram-sha-256\nhost all all all scram-sha-256\n"
_ANEW = "move {} away: it is then made anew, from the dump if there is one"


@dataclass(frozen=True)
class DatabasePaths:
    """The files of a database."""

    root: Path

    @property
    def connection(self) -> Path:
        """How to connect; there while the server is up."""
        return self.root / "connection.json"

    @property
    def record(self) -> Path:
        """Who serves, or served last."""
        return self.root / "server.json"

    @property
    def stop(self) -> Path:
        """Holds the token of the server that is asked to stop."""
        return self.root / "stop"

    @property
    def passwords(self) -> Path:
        """The passwords, as PGPASSFILE."""
        return self.root / "pgpass"

    @property
    def data(self) -> Path:
        """PostgreSQL's own files; whole or absent."""
        return self.root / "data"

    @property
    def unfinished(self) -> Path:
        """What becomes `data`."""
        return self.root / ".data.tmp"

    @property
    def dump(self) -> Path:
        """The database as it was when the server last stopped, for pg_restore."""
        return self.root / "tripletkit.dump"

    @property
    def log(self) -> Path:
        """What the server said."""
        return self.root / "postgresql.log"


class Connection(NamedTuple):
    """How to reach a database. Printed, it does not show the password."""

    host: str
    port: int
    user: str
    password: str
    database: str

    def __repr__(self) -> str:
        return f"Connection({self.user}@{self.host}:{self.port}/{self.database})"

    def open(self) -> Any:
        """Connect; psycopg2.OperationalError within seconds."""
        return psycopg2.connect(
            host=self.host, port=self.port, user=self.user, password=self.password,
            dbname=self.database, connect_timeout=5,
            sslmode="disable", gssencmode="disable",  # the environment's are about other servers
        )  # fmt: skip


class Postgres(NamedTuple):
    """A PostgreSQL in its folder. `beat` is called while we wait for it, also for its end."""

    programs: Programs
    paths: DatabasePaths
    sockets: Path
    passwords: dict[str, str]  # by user
    beat: Tick

    def make(self, tick: Tick) -> None:
        """Make the data folder: new, or from the dump if there is one. Raises StorageError."""
        aside, dump = self.paths.unfinished, self.paths.dump
        logger.info("making %s%s", self.paths.data, f" from {dump}" if dump.exists() else "")
        shutil.rmtree(aside, ignore_errors=True)
        with _only_for(self.programs.owner, self.sockets / "secret") as secret:
            secret.write_text(self.passwords[SUPERUSER])
            self.programs.run(
                "initdb", f"--pgdata={aside}", f"--username={SUPERUSER}", f"--pwfile={secret}",
                "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--data-checksums",
                tick=tick, as_owner=True, cwd=self.paths.root,
            )  # fmt: skip
        (aside / "pg_hba.conf").write_text(HBA)
        with self.running(aside, tick):
            self._create_database()
            if dump.exists():
                self._as_superuser(
                    "pg_restore", "--single-transaction", "--exit-on-error", "--no-owner",
                    f"--role={USER}", dump, tick=tick,
                )  # fmt: skip
        aside.rename(self.paths.data)
        fsio.sync_folder(self.paths.root)

    def dump(self) -> None:
        """Write the dump, with a server that nobody else can reach. Raises StorageError."""
        with self.running(self.paths.data, self.beat), fsio.atomic_write(self.paths.dump) as file:
            self._as_superuser("pg_dump", "--format=custom", tick=self.beat, stdout=file)

    @contextlib.contextmanager
    def running(
        self, data: Path, tick: Tick, *, address: str = "", port: int = SOCKET_PORT, most: int = 20
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A server that accepts connections, at `most` so many; without address over the socket.

        Raises StorageError with the end of its log if it does not start.
        """
        settings = {
            "listen_addresses": address,
            "port": port,
            "unix_socket_directories": self.sockets,
            "max_connections": most,
            "password_encryption": "scram-sha-256",
        }
        arguments = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with self.paths.log.open("ab") as log:
            process = self.programs.start(
                "postgres", "-D", data, *arguments, killed_by=signal.SIGQUIT, as_owner=True,
                cwd=self.paths.root, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._wait_until_ready(process, tick, address or str(self.sockets), port)
            yield process
        except LeaseLostError:
            process.send_signal(signal.SIGQUIT)  # at once, without another write
            raise
        finally:
            _stop(process, self.beat)

    def connection(
        self, host: str, port: int, user: str = SUPERUSER, database: str = "postgres"
    ) -> Connection:
        """How to reach it."""
        return Connection(host, port, user, self.passwords[user], database)

    def failure(self, what: str) -> StorageError:
        """An error with the end of the server's log."""
        said = tail(self.paths.log.read_text(errors="replace"))
        return StorageError(
            f"{what}; the end of {self.paths.log}:\n{said}",
            hint=f"if files are lost or damaged, {_ANEW.format(self.paths.data)}",
        )

    def _wait_until_ready(
        self, process: subprocess.Popen[bytes], tick: Tick, host: str, port: int
    ) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.connection(host, port).open().close()
            except psycopg2.OperationalError as error:
                if "authentication failed" in str(error):
                    raise StorageError(
                        f"{self.paths.passwords} does not hold the password of {self.paths.data}",
                        hint=_ANEW.format(self.paths.data),
                    ) from None
            else:
                return
            tick()
            if process.poll() is not None:
                raise self.failure("PostgreSQL does not start")
            if time.monotonic() > deadline:
                raise self.failure(f"PostgreSQL does not answer after {START_SECONDS:.0f} s")
            time.sleep(PAUSE)

    def _create_database(self) -> None:
        with closing(self.connection(str(self.sockets), SOCKET_PORT).open()) as opened:
            opened.autocommit = True
            with opened.cursor() as cursor:
                # A verifier: what the server logs when a statement fails is not the password.
                verifier = psycopg2.extensions.encrypt_password(
                    self.passwords[USER], USER, opened, "scram-sha-256"
                )
                cursor.execute(f"CREATE ROLE {USER} LOGIN PASSWORD %s", [verifier])
                cursor.execute(f"CREATE DATABASE {DATABASE} OWNER {USER}")

    def _as_superuser(self, program: str, *arguments: object, **options: Any) -> None:
        self.programs.run(
            program, f"--host={self.sockets}", f"--port={SOCKET_PORT}", f"--username={SUPERUSER}",
            f"--dbname={DATABASE}", *arguments,
            variables={"PGPASSFILE": str(self.paths.passwords)}, **options,
        )  # fmt: skip


def passwords(paths: DatabasePaths) -> dict[str, str]:
    """The passwords by user, made at random on first use. Raises StorageError."""
    if not paths.passwords.exists():
        if paths.data.exists():
            raise StorageError(
                f"{paths.passwords} is gone, and with it the password of {paths.data}",
                hint=_ANEW.format(paths.data),
            )
        lines = (f"*:*:*:{user}:{secrets.token_urlsafe(24)}\n" for user in (SUPERUSER, USER))
        fsio.write_text(paths.passwords, "".join(lines))
    fields = (line.split(":") for line in paths.passwords.read_text().splitlines())
    return {user: password for *_, user, password in fields}


@contextlib.contextmanager
def socket_folder(owner: str | None) -> Iterator[Path]:
    """A folder that only we and the server's user can enter, for its socket."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) + len("/tripletkit-db-12345678/.s.PGSQL.12345") > SOCKET_BYTES:
        parent = "/tmp"  # noqa: S108 - a name that nobody can guess
    with tempfile.TemporaryDirectory(prefix="tripletkit-db-", dir=parent) as name:
        if owner:
            shutil.chown(name, owner)
        yield Path(name)


@contextlib.contextmanager
def _only_for(owner: str | None, path: Path) -> Iterator[Path]:
    """A file that only its owner can read, gone afterwards."""
    try:
        path.touch(0o600)
        if owner:
            shutil.chown(path, owner)
        yield path
    finally:
        path.unlink(missing_ok=True)


def end_leftovers(data: Path, tick: Tick) -> None:
    """End the processes of a server that was killed on this machine, and free its folder.

    PostgreSQL takes the number in its lock file for a server's if any process has it by now. So the
    file goes, once no server works in the folder. Raises StorageError if one stays.
    """
    deadline = time.monotonic() + LEFTOVER_SECONDS
    told: set[int] = set()
    while left := servers_in(data):
        for process in left - told:
            logger.info("ending process %d, left over from a server that was killed", process)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGQUIT)
        told |= left
        if time.monotonic() > deadline:
            raise StorageError(
                f"processes {sorted(left)} still work in {data}", hint="`kill -9` ends them"
            )
        tick()
        time.sleep(PAUSE)
    (data / "postmaster.pid").unlink(missing_ok=True)


def servers_in(data: Path) -> set[int]:
    """The server and its children: they work in their data folder, proc_pid_cwd(5)."""
    found, data = set(), data.resolve()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or of another user
            name = (process / "comm").read_text().strip()
            if name in ("postgres", "postmaster") and (process / "cwd").readlink() == data:
                found.add(int(process.name))
    return found


def _stop(process: subprocess.Popen[bytes], beat: Tick) -> None:
    """Stop a server and cut its clients off; if it takes too long, as in a crash."""
    deadline = time.monotonic() + STOP_SECONDS
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            beat()
            time.sleep(PAUSE)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)
            process.wait()
