"""A PostgreSQL server for tests: its own folder and port, gone without a trace afterwards.

PYTEST_DONT_REWRITE: it is a helper and a plugin (`pytest_plugins = ["tests.postgres"]`) at once.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg2
import pytest

from tests.cluster.settings import ours

OWNER = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
USER = "tuner"


def binary(name: str) -> str:
    """The newest one that Debian installed, or the one on PATH."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: float(p.parts[4])
    )
    found = str(debian[-1]) if debian else shutil.which(name)
    assert found, f"{name} is missing: install PostgreSQL (Debian: apt-get install postgresql)"
    return found


def free_port() -> int:
    """Below the ports that the kernel gives to clients, so that it stays free over a restart."""
    while True:
        port = random.choice(ours(range(20_000, 32_000)))
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


class Server:
    """A running server; use it as a context manager. `folder` is made, and removed at the end.

    It listens on the loopback interface only. With `password` every connection needs it, else
    none does. The server dies with this process, however that dies.
    """

    def __init__(
        self, folder: Path | None = None, *, password: str | None = None, max_connections: int = 100
    ) -> None:
        # Not below pytest's tmp_path, which is closed to the user that the server runs as.
        self.folder = folder or Path(tempfile.mkdtemp(prefix="pg_"))
        self.folder.mkdir(exist_ok=True)
        self.password = password
        self.max_connections = max_connections
        self.port = free_port()
        self.log = self.folder / "log"
        self._process: subprocess.Popen | None = None
        try:
            self._initdb()
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Of the server's first database; never with a password."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"db_{random.getrandbits(48):x}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url_of(name)

    def execute(self, sql: str) -> list[tuple]:
        """Run one statement; returns its rows."""
        with closing(psycopg2.connect(self.url, password=self.password)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []

    def clients(self, application: str = "tripletkit%") -> int:
        """Connections open now, of programs of that name."""
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE"
        return self.execute(f"{count} '{application}'")[0][0]

    def start(self) -> None:
        """Start it (again) on its port; returns when it answers."""
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "fsync": "off",
            "unix_socket_directories": self.folder, "max_connections": self.max_connections,
            "shared_buffers": "16MB", "autovacuum": "off",
        }  # fmt: skip
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        user = [f"--reuid={OWNER}", f"--regid={OWNER}", "--init-groups"] if OWNER else []
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig=QUIT", *user, binary("postgres"), "-D", self._data, *options],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        ready = [binary("pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, timeout=60).returncode != 0:
            alive = self._process.poll() is None and time.monotonic() < deadline
            assert alive, f"PostgreSQL does not start:\n{self.log.read_text()}"
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it and cut its clients off: SIGINT in order, SIGQUIT like a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def restart(self) -> None:
        """Stop and start: every connection breaks."""
        self.stop()
        self.start()

    def move(self) -> None:
        """Restart on another port, as a server job that was requeued onto another node."""
        self.stop()
        self.port = free_port()
        self.start()

    def close(self) -> None:
        """Stop it and remove its folder."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _initdb(self) -> None:
        secret = self.folder / "secret"
        secret.write_text(self.password or "unused")
        if OWNER:
            shutil.chown(self.folder, OWNER, OWNER)
            shutil.chown(secret, OWNER, OWNER)
        auth = "scram-sha-256" if self.password else "trust"
        subprocess.run(
            [binary("initdb"), "-D", self._data, "-U", USER, "-A", auth, f"--pwfile={secret}",
             "--no-sync", "--encoding=UTF8", "--no-locale"],
            user=OWNER, group=OWNER, cwd=self.folder, check=True, capture_output=True, text=True,
        )  # fmt: skip
        secret.unlink()


start = Server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One server for the whole session, without passwords. Leave it running."""
    with Server() as server:
        yield server


@pytest.fixture
def database(postgres: Server) -> str:
    """The URL of an empty database, for one test."""
    return postgres.database()


@pytest.fixture
def start_postgres() -> Iterator[Callable[..., Server]]:
    """Starts a server of one test's own: `start_postgres(password="...", max_connections=20)`."""
    with ExitStack() as servers:
        yield lambda **options: servers.enter_context(Server(**options))
