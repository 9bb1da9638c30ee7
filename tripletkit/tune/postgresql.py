"""Connections to a PostgreSQL: for the study's storage, and for turns at the study."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import random
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import psycopg2
from sqlalchemy.pool import NullPool

from tripletkit.config import Tuning
from tripletkit.errors import ConfigError, StorageError
from tripletkit.log import logger
from tripletkit.tune.retry import Retry, TurnLost, redacted

POOLED_WORKERS = 90  # more of them hold no connection between calls: a server's default is 100
SPARE = 5  # connections for turns, beside those that workers hold; with fewer, nobody gets on
TURN_PAUSE = 5.0  # seconds, the longest between two looks whether it is our turn

# Without these, a call waits for hours for a node that is gone, and a node that is gone keeps
# its locks for as long. An address of the user's own may say otherwise.
_CLIENT = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}
_SESSION = """
    SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3;
    SET idle_in_transaction_session_timeout = '10min'
"""
# The last one is new in PostgreSQL 16.
_ALLOWED = """
    SELECT current_setting('max_connections')::int
        - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true), '0')::int
"""


def is_private(tuning: Tuning) -> bool:
    """Whether only processes of this host reach it: over a Unix socket or the loopback.

    Raises StorageError and ConfigError as `database.connection`.
    """
    address = _address(tuning)
    named = [
        address.get(key) or os.environ.get(f"PG{key.upper()}")  # as libpq does
        for key in ("hostaddr", "host", "service")
    ]
    if not any(named[:2]):
        return not named[2]  # a file names the host of a service
    names = (named[0] or named[1] or "").split(",")
    return all(_is_loopback(name) for name in names)


def _is_loopback(name: str) -> bool:
    """Not asking what the name stands for: Debian names the loopback after the host."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return not name or name.startswith(("/", "@", "localhost"))


def _address(tuning: Tuning) -> dict[str, Any]:
    """Where the server is now, as psycopg2.connect takes it."""
    if tuning.storage_url is None:
        from tripletkit.tune import database

        found = database.connection(tuning.storage_path)
        return {
            "host": found.host,
            "port": found.port,
            "user": found.user,
            "password": found.password,
            "dbname": found.database,
            "sslmode": "disable",  # what the environment says is about other servers
            "gssencmode": "disable",
        }
    url = "postgresql:" + tuning.storage_url.partition(":")[2]  # without the name of a driver
    try:
        return dict(psycopg2.extensions.parse_dsn(url))
    except psycopg2.ProgrammingError as error:
        raise ConfigError(
            f"tuning.storage_url = {_without_values(redacted(url))}: {_unquoted(error)}",
            hint="write it as postgresql://USER@HOST:PORT/DATABASE",
        ) from None


def _without_values(url: str) -> str:
    address, found, options = url.partition("?")
    address = re.sub("=.*", "=***", address)  # the question mark was forgotten
    pairs = (option.partition("=") for option in options.split("&"))
    shown = [key + "=***" if equals else "***" for key, equals, _ in pairs]
    return address + found + "&".join(shown) if found else address


def _unquoted(error: Exception) -> str:
    """libpq's words without the parts of the address that it quotes: a secret may be misspelt."""
    return re.sub(r'"[^"]*"?', '"..."', " ".join(str(error).split()))


class Server:
    """Connections to a PostgreSQL, which may come back on another node.

    Engines get them from a function, so no address with a password is stored, pickled or printed.
    """

    def __init__(self, tuning: Tuning, retry: Retry) -> None:
        self._tuning = tuning
        self._name = f"tripletkit {tuning.study_name}"
        self._retry = retry
        self._turn: Any = None  # the connection that holds our turn

    def engine(self, workers: int) -> dict[str, Any]:
        """Arguments for an SQLAlchemy engine; each of many workers holds no idle connection."""
        if workers > POOLED_WORKERS:
            return {"creator": self._connect_in_turn, "poolclass": NullPool}
        pool = {"pool_size": 1, "max_overflow": 2, "pool_pre_ping": True}
        return {"creator": self._connect_in_turn, **pool}

    def check_room(self, workers: int, at_once: int, slots: int = 1) -> None:
        """That the server has connections for so many workers, of whom `at_once` run at a time.

        Each of them has `slots` processes. Warns if some will have to wait for a connection. Raises
        StorageError.
        """
        held = at_once * slots if workers * slots <= POOLED_WORKERS else 0
        used = held + min(at_once * slots, POOLED_WORKERS)
        allowed = self._retry(self._allowed)
        if allowed >= used:
            return
        where, hint = self._retry.where, f"set the server's max_connections to {used + 10} or more"
        if self._tuning.storage_url is None:
            folder = shlex.quote(str(self._tuning.storage_path))
            hint = (
                f"`tripletkit db down {folder}`, then `tripletkit db up {folder} --workers "
                f"{workers * slots}` with your other flags"
            )
        hint += ", or let fewer workers run at once (--max-concurrent)"
        who = f"{at_once} workers" + (f" with {slots} trials at once" if slots > 1 else "")
        if allowed < held + SPARE:
            raise StorageError(
                f"{where} allows {allowed} connections, too few for {who}: they hold "
                f"{held} and use up to {used} at times",
                hint=hint,
            )
        logger.warning(
            "%s allows %d connections, and %s use up to %d at times: some will have to "
            "wait; %s", where, allowed, who, used, hint,
        )  # fmt: skip

    def _allowed(self) -> int:
        """How many connections the server lets in, beside those it reserves for its superuser."""
        with closing(self._connect()) as connection, connection.cursor() as cursor:
            cursor.execute(_ALLOWED)
            return int(cursor.fetchone()[0])

    @contextlib.contextmanager
    def exclusive(self, what: str) -> Iterator[None]:
        """A lock of the whole database under the name `what`, freed when its holder dies.

        Whoever waits holds no connection. The lock lasts as long as a transaction, so that the
        server frees it (_SESSION) when its holder is frozen.
        """
        key = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big", signed=True)
        began, said = time.monotonic(), False
        while (connection := self._retry(lambda: self._try_lock(key))) is None:
            waited = time.monotonic() - began
            if waited > 30 and not said:
                logger.info("another process holds the lock %r of the study: waiting for it", what)
                said = True
            # In proportion to the wait: few waiters lose little, many do not storm the server.
            pause = min(TURN_PAUSE, max(0.02, waited / 3))
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - no secret
        with closing(connection):
            self._turn = connection
            try:
                yield
                self._check_turn()
            finally:
                self._turn = None

    def _try_lock(self, key: int) -> Any:
        with ExitStack() as stack:
            connection = stack.enter_context(closing(self._connect()))
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [key])
                if cursor.fetchone() != (True,):
                    return None
            stack.pop_all()
            return connection

    def _connect_in_turn(self) -> Any:
        """A connection for the engine. When it needs one within a turn, perhaps because one broke."""
        if self._turn is not None:
            self._check_turn()
        return self._connect()

    def _check_turn(self) -> None:
        try:
            with self._turn.cursor() as cursor:
                cursor.execute("SELECT 1")
        except psycopg2.Error as error:
            raise TurnLost(f"{self._retry.where}: the connection broke") from error

    def _connect(self) -> Any:
        connection = psycopg2.connect(
            **{"application_name": self._name, **_CLIENT, **self._address()}
        )
        with connection.cursor() as cursor:
            cursor.execute(_SESSION)
        connection.commit()
        return connection

    def _address(self) -> dict[str, Any]:
        """Read at every connection: the server's job may have been requeued onto another node.

        Raises StorageError, as for an outage, and ConfigError if we come to the wrong host.
        """
        try:
            return _address(self._tuning)
        except ConfigError as error:
            if not self._retry.worked:
                raise
            raise StorageError(error.message, hint=error.hint) from None  # it may move once more
