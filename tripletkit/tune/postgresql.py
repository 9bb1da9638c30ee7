"""Connections to a PostgreSQL: for the study's storage, and for turns at the study."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
from sqlalchemy.pool import NullPool

from tripletkit.config import Tuning
from tripletkit.log import logger
from tripletkit.tune.retry import Retry, TurnLost

POOLED_WORKERS = 90  # more of them hold no connection between calls: a server's default is 100
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


class Server:
    """Connections to a PostgreSQL, which may come back on another node.

    Engines get them from a function, so no address with a password is stored, pickled or printed.
    """

    def __init__(self, tuning: Tuning, retry: Retry) -> None:
        self._url, self._folder = tuning.storage_url, tuning.storage_path
        self._name = f"tripletkit {tuning.study_name}"
        self._retry = retry
        self._turn: Any = None  # the connection that holds our turn

    def engine(self, workers: int) -> dict[str, Any]:
        """Arguments for an SQLAlchemy engine; each of many workers holds no idle connection."""
        if workers > POOLED_WORKERS:
            return {"creator": self._connect_in_turn, "poolclass": NullPool}
        pool = {"pool_size": 1, "max_overflow": 2, "pool_pre_ping": True}
        return {"creator": self._connect_in_turn, **pool}

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
        """Read at every connection: the server's job may have been requeued onto another node."""
        if self._url is None:
            from tripletkit.tune import database

            found = database.connection(self._folder)
            return {
                "host": found.host,
                "port": found.port,
                "user": found.user,
                "password": found.password,
                "dbname": found.database,
                "sslmode": "disable",  # what the environment says is about other servers
                "gssencmode": "disable",
            }
        url = urlunsplit(urlsplit(self._url)._replace(scheme="postgresql"))
        return dict(psycopg2.extensions.parse_dsn(url))
