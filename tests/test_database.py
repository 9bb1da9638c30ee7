"""A PostgreSQL of one's own: `serve` is its job, the other functions look at it from outside."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import psycopg2
import pytest

from tests.cluster import wait
from tripletkit import config as configuration
from tripletkit import stages, submission
from tripletkit.config import Config, Tuning
from tripletkit.errors import DONE, ConfigError, Interrupted, StorageError
from tripletkit.paths import StudyPaths
from tripletkit.tune import database, postgresql, storage, study
from tripletkit.tune.database import client, job, lease, programs, server
from tripletkit.tune.database.server import DatabasePaths

pytest_plugins = ["tests.postgres"]

MAX_CONNECTIONS = 80

# What a job does, with less patience.
JOB = f"""
import sys
from pathlib import Path
from tripletkit import boundary
from tripletkit.cluster import preempt
from tripletkit.tune import database
from tripletkit.tune.database import job, lease

lease.BEAT, lease.STALE_AFTER, job.FENCE, job.SIGNAL_SECONDS, job.POLL = 0.2, 1.5, 1.0, 1.0, 0.1
boundary.prepare_process()
with preempt.watch() as stop:
    ending = boundary.run(lambda: print("stopped by", database.serve(
        Path(sys.argv[1]), max_connections={MAX_CONNECTIONS}, should_stop=stop)))
sys.exit(ending.exit_code)
"""


class Job:
    """A local job that serves `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.id = f"local-{self.process.pid}"

    def up(self) -> "Job":
        database.wait_until_up(self.folder, time.monotonic() + 60, self.id)
        return self

    def signal(self, number: int) -> "Job":
        self.process.send_signal(number)
        return self

    def ends(self, code: int) -> str:
        """Wait for its end; what it said."""
        said, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == code, said
        return said

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def server(self) -> int:
        """Process id of the server."""
        return int((self.folder / "data/postmaster.pid").read_text().split()[0])


@pytest.fixture(autouse=True, scope="module")
def impatient():
    """Look more often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "POLL", 0.05)
        yield


@pytest.fixture
def place():
    """Where the user that the server runs as may go, other than below tmp_path."""
    with tempfile.TemporaryDirectory(prefix="db_") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def start(place):
    """Starts jobs, which end before their place does."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(closing(Job(folder)))
    data = place / "db/data"
    wait(lambda: not server.servers_in(data), lambda: f"a server works in {data}", 30)


class Original(NamedTuple):
    """A database that is down, with a row in it, and its dump."""

    folder: Path
    said: str  # by its job
    seen: set[bytes]  # every command line while it was made, ran and ended


@pytest.fixture(scope="module")
def original():
    """One database for all tests, which work on copies."""
    with tempfile.TemporaryDirectory(prefix="db_") as name:
        Path(name).chmod(0o755)
        folder = Path(name, "db")
        with command_lines() as seen, closing(Job(folder)) as job:
            job.up()
            execute(folder, "CREATE TABLE kept AS SELECT 1 AS number")
            seen |= {Path(f"/proc/{job.server()}/environ").read_bytes()}
            database.down(folder)
            said = job.ends(0)
        yield Original(folder, said, seen)


@contextlib.contextmanager
def command_lines():
    """Watches those of all processes."""
    seen: set[bytes] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


@pytest.fixture
def folder(original, place):
    """A copy of it, for one test."""
    subprocess.run(["cp", "-a", original.folder, place / "db"], check=True)
    return place / "db"


def execute(folder: Path, sql: str) -> list[tuple]:
    """Run a statement as a worker would."""
    with closing(database.connection(folder).open()) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []


def numbers(folder: Path) -> list[int]:
    return [row[0] for row in execute(folder, "SELECT number FROM kept ORDER BY number")]


def add(folder: Path, number: int) -> None:
    execute(folder, f"INSERT INTO kept VALUES ({number})")


def alive(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def holder(folder: Path, **changes: str) -> None:
    """Change the record of who serves."""
    record = folder / "server.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


# --- up and down -----------------------------------------------------------------------------


def test_a_new_folder_becomes_a_database(place, start):
    job = start(place / "db").up()
    status = database.status(place / "db")
    assert (status.state, status.job, status.max_connections) == ("up", job.id, MAX_CONNECTIONS)
    assert status.size > 1_000_000
    assert f"0 of {MAX_CONNECTIONS} connections" in str(status)
    found = dict(execute(place / "db", "SELECT name, setting FROM pg_settings"))
    assert found["data_checksums"] == found["fsync"] == "on"
    assert found["server_encoding"] == "UTF8"
    assert found["password_encryption"] == "scram-sha-256"
    assert found["listen_addresses"] == "127.0.0.1"  # a local job serves this machine only
    assert execute(place / "db", "SELECT rolsuper FROM pg_roles WHERE rolname = user") == [(False,)]
    process = job.server()
    database.down(place / "db")
    assert "stopped by `tripletkit db down`" in job.ends(0)
    assert not alive(process)
    assert database.status(place / "db").state == "down"
    assert (place / "db/tripletkit.dump").exists()
    with pytest.raises(StorageError, match="no PostgreSQL runs in") as error:
        database.connection(place / "db")
    assert "tripletkit db up" in error.value.hint


def test_tables_survive_and_the_server_is_found_where_it_is_now(folder, start):
    first = start(folder).up()
    add(folder, 2)
    before = database.connection(folder)
    assert "stopped by a signal" in first.signal(signal.SIGTERM).ends(0)
    start(folder).up()
    after = database.connection(folder)
    assert after.port != before.port
    assert after.password == before.password
    assert numbers(folder) == [1, 2]


def test_a_killed_job_takes_its_server_along_and_the_next_one_recovers(folder, start):
    job = start(folder).up()
    add(folder, 2)
    process = job.server()
    job.signal(signal.SIGKILL).ends(-signal.SIGKILL)
    wait(lambda: not alive(process), lambda: "the server lives on", 10)
    start(folder).up()
    assert numbers(folder) == [1, 2]


def test_a_server_that_survived_its_job_is_ended_by_the_next_one(folder, start):
    job = start(folder).up()
    # Too deeply stopped to notice that its job is gone.
    process = job.signal(signal.SIGSTOP).server()
    os.kill(process, signal.SIGSTOP)
    job.signal(signal.SIGKILL).ends(-signal.SIGKILL)
    second = start(folder)
    time.sleep(1)
    assert second.process.poll() is None
    assert second.server() == process
    os.kill(process, signal.SIGCONT)
    second.up()
    assert not alive(process)
    assert numbers(folder) == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_every_process_of_the_job_loses_nothing(folder, start, number):
    job = start(folder).up()
    with closing(database.connection(folder).open()):  # a worker that does not let go
        add(folder, 2)
        for process in server.servers_in(folder / "data"):
            os.kill(process, number)
        job.signal(number).ends(0)
    shutil.rmtree(folder / "data")  # from the dump
    start(folder).up()
    assert numbers(folder) == [1, 2]


def test_a_server_that_dies_ends_the_job_with_its_last_words(folder, start):
    job = start(folder).up()
    os.kill(job.server(), signal.SIGKILL)
    said = job.ends(StorageError.exit_code)
    assert "PostgreSQL stopped by itself; the end of" in said
    assert "ready to accept connections" in said
    assert not (folder / "connection.json").exists()
    status = database.status(folder)
    assert (status.state, "stopped by itself" in status.message) == ("down", True)


# --- the dump --------------------------------------------------------------------------------


def test_lost_data_are_made_from_the_dump(folder, start):
    shutil.rmtree(folder / "data")
    (folder / "pgpass").unlink()
    (folder / ".data.tmp/base").mkdir(parents=True)  # from a job that was killed at this point
    start(folder).up()
    assert numbers(folder) == [1]
    add(folder, 2)  # the table is the worker's own
    execute(folder, "DROP TABLE kept")
    assert not (folder / ".data.tmp").exists()


def test_a_dump_that_cannot_be_restored_makes_no_data(folder, start):
    shutil.rmtree(folder / "data")
    dump = folder / "tripletkit.dump"
    whole = dump.read_bytes()
    dump.write_bytes(whole[:-100])
    assert "pg_restore failed" in start(folder).ends(StorageError.exit_code)
    assert not (folder / "data").exists()
    assert dump.read_bytes() == whole[:-100]


def test_a_dump_that_cannot_be_written_leaves_the_old_one(folder, start):
    old = (folder / "tripletkit.dump").read_bytes()
    job = start(folder).up()
    passwords = (folder / "pgpass").read_text()
    (folder / "pgpass").write_text(re.sub("postgres:.*", "postgres:wrong", passwords))
    with pytest.raises(StorageError, match="no new dump: pg_dump failed"):
        database.down(folder)
    assert "the data are safe in" in job.ends(0)
    assert (folder / "tripletkit.dump").read_bytes() == old
    assert list(folder.glob(".*.tmp")) == []


# --- secrets ---------------------------------------------------------------------------------


def test_only_their_owner_can_read_the_files(folder, start):
    for pid in ("before", "up"):
        for path in [folder, *folder.iterdir()]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        if pid == "before":
            start(folder).up()
    assert stat.S_IMODE(socket_folder(folder).stat().st_mode) == 0o700
    user = "postgres" if os.geteuid() == 0 else None
    assert user is None or (folder / "data").owner() == user


def socket_folder(folder: Path) -> Path:
    return Path((folder / "data/postmaster.pid").read_text().splitlines()[4])


def test_nobody_gets_in_without_the_password(folder, start):
    start(folder).up()
    found = database.connection(folder)
    (socket,) = socket_folder(folder).glob(".s.PGSQL.?????")
    assert len(os.fsencode(socket)) <= 107
    for host, user in itertools.product((found.host, str(socket.parent)), ("postgres", found.user)):
        there = found._replace(host=host, user=user)
        with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
            there._replace(password="wrong").open()
        with pytest.raises(psycopg2.OperationalError, match="no password supplied"):
            psycopg2.connect(host=host, port=found.port, user=user, dbname=found.database)
    found._replace(host=str(socket.parent)).open().close()


def test_the_passwords_are_in_no_command_line_log_or_other_file(original):
    names = {Path(os.fsdecode(line.split(b"\0")[0])).name for line in original.seen}
    assert {"initdb", "postgres", "pg_dump"} <= names
    secrets = list(server.passwords(DatabasePaths(original.folder)).values())
    assert len(set(secrets)) == 2
    for secret in secrets:
        assert len(secret) >= 32
        assert not [line for line in original.seen if secret.encode() in line]
        assert secret not in original.said
        files = [path for path in original.folder.rglob("*") if path.is_file()]
        assert len(files) > 100
        assert [p.name for p in files if secret.encode() in p.read_bytes()] == ["pgpass"]


def test_a_connection_is_printed_without_its_password():
    found = database.Connection("n1", 1, "me", "secret", "db")
    assert {f"{found}", f"{found!r}", str(found)} == {"Connection(me@n1:1/db)"}


# --- one server at a time --------------------------------------------------------------------


def test_up_again_starts_no_second_server(folder, start, capsys):
    job = start(folder).up()
    process = job.server()

    since = lease.read(DatabasePaths(folder).record).since
    assert submission.start_database(Config(), folder, "local", workers=20, asked=()) == DONE
    assert f"PostgreSQL is up since {since}" in capsys.readouterr().out
    assert job.server() == process


def test_a_second_server_is_refused_while_the_first_lives(folder, start):
    first = start(folder).up()
    said = start(folder).ends(StorageError.exit_code)
    assert f"job {first.id} on " in said
    assert f"serves {folder} already" in said
    assert numbers(folder) == [1]
    assert database.status(folder).state == "up"


def test_a_server_that_lives_on_another_machine_is_respected(folder, start):
    holder(folder, state="up", machine="another", job="77", host="n7")
    before = (folder / "server.json").read_bytes()
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.2):
            os.utime(folder / "server.json")

    other = threading.Thread(target=live)
    other.start()
    try:
        said = start(folder).ends(StorageError.exit_code)
    finally:
        over.set()
        other.join()
    assert "job 77 on n7 serves" in said
    assert (folder / "server.json").read_bytes() == before


def test_a_dead_server_of_another_machine_is_replaced_after_a_while(folder, start):
    holder(folder, state="up", machine="another", job="77", host="n7")
    # Its number is that of a living process here, which PostgreSQL would take for a server.
    lock = folder / "data/postmaster.pid"
    lock.write_text(f"{os.getpid()}\n{folder / 'data'}\n0\n5432\n\n\n")
    shutil.copymode(folder / "data/PG_VERSION", lock)
    shutil.chown(lock, *2 * ["postgres"] if os.geteuid() == 0 else [os.geteuid()])
    began = time.monotonic()
    job = start(folder).up()
    assert time.monotonic() - began > 1.5 + 1.0  # STALE_AFTER and FENCE of the job
    assert numbers(folder) == [1]
    database.down(folder)
    said = job.ends(0)
    assert "job 77 on n7 did not say that it is gone" in said
    assert "in which a server on another machine would stop" in said


def test_a_server_that_slept_through_its_replacement_gives_way(folder, start):
    job = start(folder).up()
    process = job.server()
    job.signal(signal.SIGSTOP)
    holder(folder, token="of another", job="78", host="n8", machine="another")
    record = (folder / "server.json").read_bytes()
    (folder / "connection.json").write_text("of another")
    job.signal(signal.SIGCONT)
    assert "is no longer ours: job 78 on n8 took it over" in job.ends(StorageError.exit_code)
    assert not alive(process)
    assert (folder / "server.json").read_bytes() == record
    assert (folder / "connection.json").read_text() == "of another"


def test_a_folder_with_other_files_is_refused(place):
    (place / "home").mkdir(mode=0o755)
    (place / "home/thesis.tex").touch()
    with pytest.raises(StorageError, match="holds other files"):
        database.serve(place / "home", max_connections=20, should_stop=lambda: False)
    assert stat.S_IMODE((place / "home").stat().st_mode) == 0o755


# --- the programs ----------------------------------------------------------------------------


def test_a_machine_without_postgresql_is_told_what_to_do(place, monkeypatch):
    monkeypatch.setattr(programs, "PLACES", ())
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(StorageError, match="are not on PATH") as error:
        database.serve(place / "db", max_connections=20, should_stop=lambda: False)
    for remedy in ("module load postgresql", "conda", "Debian"):
        assert remedy in error.value.hint
    status = database.status(place / "db")
    assert (status.state, "are not on PATH" in status.message) == ("down", True)
    with pytest.raises(StorageError, match="are not on PATH"):  # who waits for it hears of it
        database.wait_until_up(place / "db", time.monotonic() + 60, status.job)


def test_programs_of_another_version_are_not_let_at_the_data(tmp_path):
    (tmp_path / "PG_VERSION").write_text("9\n")
    with pytest.raises(
        StorageError, match=r"was made by PostgreSQL 9, and here is only \d+"
    ) as error:
        programs.find(tmp_path)
    assert "from the dump" in error.value.hint


def test_programs_on_the_path_come_first(tmp_path, monkeypatch):
    debian = programs.find(tmp_path).folder
    for name in programs.NEEDED:
        (tmp_path / name).symlink_to(debian / name)
    (tmp_path / "postgres").unlink()
    (tmp_path / "postgres").write_text('#!/bin/sh\necho "postgres (PostgreSQL) 99.1"\n')
    (tmp_path / "postgres").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert programs.find(tmp_path / "absent").folder == tmp_path
    (tmp_path / "PG_VERSION").write_text(debian.parent.name)
    assert programs.find(tmp_path).folder == debian  # it fits the data


def test_lost_passwords_are_said(folder, start):
    (folder / "pgpass").unlink()
    said = start(folder).ends(StorageError.exit_code)
    assert "and with it the password" in said
    assert f"move {folder / 'data'} away" in said


# --- many workers ----------------------------------------------------------------------------


def test_connections_fit_the_workers_they_were_made_for(folder, start):
    start(folder).up()
    with ExitStack() as stack:
        found = database.connection(folder)
        for _ in range(3 * 20):  # what 20 workers use at most
            stack.enter_context(closing(found.open()))
        status = database.status(folder)
        assert (status.connections, status.max_connections) == (60, MAX_CONNECTIONS)
        with contextlib.suppress(psycopg2.OperationalError):
            for _ in range(MAX_CONNECTIONS):
                stack.enter_context(closing(found.open()))
        with pytest.raises(psycopg2.OperationalError, match="connection slots are reserved"):
            found.open()
        assert database.status(folder).connections > 60  # we still see how it is


def test_the_cap_grows_with_the_workers_as_they_use_connections():
    assert client.POOLED_WORKERS == postgresql.POOLED_WORKERS
    cap = database.max_connections_for
    # Whoever starts it without saying for how many has room for many.
    assert [cap(workers) for workers in (1, 64, 90)] == [300, 300, 300]
    assert cap(200) == 400
    assert cap(201) == cap(200) + 1  # each one for a moment only
    assert cap(500) < 800


@pytest.fixture
def small(start_postgres):
    """A server that lets 17 in, and keeps 3 connections for its superuser."""
    return start_postgres(max_connections=20)


def prepare(place: Path, workers: int, max_concurrent: int = 0, **tuning: object) -> None:
    """What `tripletkit tune` does before it starts workers."""
    config = configuration.with_values(
        Config(),
        paths={"val_parquet_path": place / "val.parquet"},
        tuning={"workers": workers, "output_dir": place, **tuning},
        slurm={"max_concurrent": max_concurrent},
    )
    study.prepare(config, StudyPaths(place / "trials"))


def test_more_workers_than_a_server_lets_in_are_refused(small, tmp_path):
    with pytest.raises(
        StorageError, match="allows 17 connections, too few for 64 workers: they hold 64"
    ) as error:
        prepare(tmp_path, 64, storage_url=small.url)
    assert "max_connections to 138 or more" in error.value.hint
    assert not small.execute("SELECT * FROM pg_tables WHERE schemaname = 'public'")
    assert not (tmp_path / "trials").exists()

    announce(tmp_path / "db", small)
    with pytest.raises(StorageError, match="too few for 13 workers") as error:
        prepare(tmp_path, 13, storage_path=tmp_path / "db")
    assert f"`tripletkit db up {tmp_path / 'db'} --workers 13`" in error.value.hint


def test_workers_for_whom_a_server_is_tight_are_warned_of(small, tmp_path, caplog):
    prepare(tmp_path, 12, storage_url=small.url)
    assert "allows 17 connections, and 12 workers use up to 24 at times" in caplog.text
    caplog.clear()
    prepare(tmp_path, 500, storage_url=small.url)  # which hold none
    assert "allows 17 connections, and 500 workers use up to 90 at times" in caplog.text
    caplog.clear()
    prepare(tmp_path, 64, max_concurrent=8, storage_url=small.url)
    prepare(tmp_path, 8, storage_url=small.url)
    assert "connections" not in caplog.text


def test_every_trial_at_once_of_a_worker_needs_room(small, tmp_path, caplog):
    prepare(tmp_path, 4, trials_per_gpu=3, storage_url=small.url)
    assert "and 4 workers with 3 trials at once use up to 24 at times" in caplog.text
    announce(tmp_path / "db", small)
    with pytest.raises(StorageError, match="too few for 4 workers with 4 trials at once") as error:
        prepare(tmp_path, 4, trials_per_gpu=4, storage_path=tmp_path / "db")
    assert f"`tripletkit db up {tmp_path / 'db'} --workers 16`" in error.value.hint


@pytest.mark.parametrize("workers", [1, 48, 91, 500])
def test_a_server_with_the_default_limit_has_room_for_hundreds(
    postgres, database, tmp_path, caplog, workers
):
    assert postgres.max_connections == 100
    prepare(tmp_path, workers, storage_url=database)
    assert "connections" not in caplog.text


# --- looking from outside --------------------------------------------------------------------


def test_a_server_of_one_machine_is_not_looked_for_on_another(folder, start):
    start(folder).up()
    found = json.loads((folder / "connection.json").read_text())
    (folder / "connection.json").write_text(json.dumps(found | {"node": "n5"}))
    with pytest.raises(ConfigError, match="serves only processes on n5") as error:
        database.connection(folder)
    assert f"`tripletkit db up {folder} --cluster slurm`" in error.value.hint
    assert "serves only processes on n5" in database.status(folder).message
    with pytest.raises(StorageError, match="serves only processes on n5"):  # may change
        database.wait_until_up(folder, time.monotonic())


def announce(folder: Path, server, node: str | None = None, host: str = "127.0.0.1") -> None:
    """Write down where a server is, as our job does."""
    folder.mkdir(exist_ok=True)
    found = database.Connection(host, server.port, "tuner", "", "postgres")
    node = node or socket.gethostname()
    (folder / "connection.json").write_text(json.dumps(found._asdict() | {"node": node}))


def test_a_worker_on_the_wrong_host_says_so_at_once(postgres, tmp_path):
    announce(tmp_path / "db", postgres, node="login1")
    tuning = Tuning(storage_path=tmp_path / "db", study_name="elsewhere")
    began = time.monotonic()
    for open_ in (storage.create, lambda _: storage.open_study(tuning, seed=0, workers=200)):
        with pytest.raises(ConfigError, match="serves only processes on login1"):
            open_(tuning)
    assert time.monotonic() - began < 5


def test_a_server_that_moves_to_the_wrong_host_may_move_once_more(postgres, tmp_path, caplog):
    announce(tmp_path / "db", postgres)
    tuning = Tuning(storage_path=tmp_path / "db", study_name="moving")
    shared = storage.create(tuning)
    announce(tmp_path / "db", postgres, node="login1")

    def move() -> None:
        wait(lambda: "is away" in caplog.text, lambda: caplog.text, 30)
        announce(tmp_path / "db", postgres)

    mover = threading.Thread(target=move)
    mover.start()
    with shared.turn():
        pass
    mover.join()
    assert "serves only processes on login1; trying again" in caplog.text


# --- from the nodes of a cluster -------------------------------------------------------------


NODES = {"n1", "n2", "n3", "n4"}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me@localhost/db",
        "postgresql://me@127.0.0.1:5433/db",
        "postgresql://me@[::1]/db",
        "postgresql:///db",
        "postgresql://me@%2Frun%2Fpostgresql/db",
        "postgresql://me@/db?host=/run/postgresql",
        "postgresql://me@login1/db?hostaddr=127.0.0.1",
        "postgresql+psycopg2://me@127.0.0.1,localhost/db",
    ],
)
def test_an_address_that_means_another_server_on_each_node_is_refused(url):
    tuning = Tuning(storage_url=url)
    with pytest.raises(StorageError, match=r"for processes of this host .* n1, n2, n3") as error:
        study.check_reach(tuning, NODES)
    assert "as the nodes know it" in error.value.hint
    assert "tripletkit db up --cluster slurm" in error.value.hint
    study.check_reach(tuning, {socket.gethostname().partition(".")[0], "localhost"})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me@login1/db",
        f"postgresql://me@{socket.gethostname()}/db",  # may be the loopback here, but not there
        "postgresql://me@10.1.2.3/db",
        "postgresql://me@login1,localhost/db",
        "postgresql:///db?service=study",
    ],
)
def test_an_address_of_a_host_is_not(url):
    study.check_reach(Tuning(storage_url=url), NODES)


def test_variables_of_libpq_count(monkeypatch):
    tuning = Tuning(storage_url="postgresql:///db")
    monkeypatch.setenv("PGHOST", "login1")
    study.check_reach(tuning, NODES)
    monkeypatch.setenv("PGHOST", "/run/postgresql")
    with pytest.raises(StorageError, match="for processes of this host"):
        study.check_reach(tuning, NODES)
    monkeypatch.delenv("PGHOST")
    monkeypatch.setenv("PGSERVICE", "study")
    study.check_reach(tuning, NODES)


def test_an_address_that_is_none_is_refused():
    tuning = Tuning(storage_url="postgresql://me@db1/db?hots=db2")
    for check in (storage.create, lambda _: study.check_reach(tuning, NODES)):
        with pytest.raises(ConfigError, match=r"tuning\.storage_url = .*hots") as error:
            check(tuning)
        assert "postgresql://USER@HOST:PORT/DATABASE" in error.value.hint


def test_a_database_of_ours_that_serves_this_host_is_refused_to_others(postgres, tmp_path):
    folder = tmp_path / "db"
    tuning = Tuning(storage_path=folder)
    announce(folder, postgres)
    with pytest.raises(StorageError, match=f"{folder} is a PostgreSQL for .* n1, n2, n3") as error:
        study.check_reach(tuning, NODES)
    assert f"`tripletkit db up {folder} --cluster slurm`" in error.value.hint
    study.check_reach(tuning, {socket.gethostname().partition(".")[0]})
    announce(folder, postgres, node="n7")
    with pytest.raises(ConfigError, match="serves only processes on n7"):
        study.check_reach(tuning, NODES)
    announce(folder, postgres, node="n7", host="10.1.2.3")
    study.check_reach(tuning, NODES)
    (folder / "connection.json").unlink()
    with pytest.raises(StorageError, match="no PostgreSQL runs in"):
        study.check_reach(tuning, NODES)


def test_files_are_for_one_host_or_for_all(tmp_path):
    with pytest.raises(StorageError, match="is SQLite for processes of this host") as error:
        study.check_reach(Tuning(storage_path=tmp_path / "study.db"), NODES)
    assert "tripletkit db up --cluster slurm" in error.value.hint
    study.check_reach(Tuning(storage_path=tmp_path / "study.db"), {"localhost"})
    study.check_reach(Tuning(storage_path=tmp_path / "study.journal"), NODES)


def test_who_waits_gives_up_at_the_deadline_or_when_the_job_is_gone(folder):
    with pytest.raises(StorageError, match="no PostgreSQL runs in"):
        database.wait_until_up(folder, time.monotonic())
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(StorageError, match=f"job local-{process.pid} has ended"):
        database.wait_until_up(folder, time.monotonic() + 60, f"local-{process.pid}")


def test_the_end_of_a_jobs_log_is_shown(folder):
    log = folder.parent / "db_local.err"
    log.write_text("no disk\n")
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(
        StorageError, match=f"and its database is not up; the end of {log}:\nno disk"
    ):
        database.wait_until_up(folder, time.monotonic() + 60, f"local-{process.pid}", log)


def test_down_wins_over_a_signal_whose_stop_is_under_way(folder, start):
    job = start(folder).up().signal(signal.SIGUSR2)
    record = folder / "server.json"
    wait(lambda: lease.read(record).state == "stopping", lambda: str(lease.read(record)), 30)
    database.down(folder)
    assert "stopped by `tripletkit db down`" in job.ends(0)


@pytest.mark.parametrize("stopped_by", [job.BY_SIGNAL, job.BY_DOWN])
def test_only_a_job_that_nobody_took_down_asks_to_run_again(monkeypatch, stopped_by):
    monkeypatch.setattr(database, "serve", lambda *_, **__: stopped_by)
    arguments = (Config(), lambda: True)  # a signal has come, in either case
    if stopped_by == job.BY_DOWN:
        assert stages.serve_database(*arguments, folder="db", max_connections=20) == DONE
        return
    with pytest.raises(Interrupted, match="the database in db was stopped"):
        stages.serve_database(*arguments, folder="db", max_connections=20)


def test_down_says_what_it_found(folder, place, monkeypatch, caplog):
    monkeypatch.setattr(client, "STALE_AFTER", 0.5)
    database.down(folder)
    assert "down already" in caplog.text
    holder(folder, state="up", host="n7")
    database.down(folder)
    assert "on n7 died without a dump" in caplog.text
    os.utime(folder / "server.json", (0, 0))
    assert "not heard of for" in str(database.status(folder))
    with pytest.raises(StorageError, match="there is no database in"):
        database.down(place / "absent")
    assert database.status(place / "absent").state == "down"


# --- as a Slurm job --------------------------------------------------------------------------


def test_a_slurm_job_is_requeued_and_cancelled_without_losing_the_study(folder, slurm):
    script = folder.parent / "job.py"
    script.write_text(JOB)
    log = folder.parent / "log"
    command = f"exec env OMP_NUM_THREADS=1 PYTHONPATH=. {sys.executable} {script} {folder}"
    place = f"--chdir={Path(__file__).parent.parent}", f"--output={log}", "--open-mode=append"
    job = slurm.sbatch(command, "--requeue", *place)
    database.wait_until_up(folder, time.monotonic() + 60, job)
    assert database.status(folder).job == job
    first = lease.read(folder / "server.json")
    add(folder, 2)

    slurm.run("scontrol", "requeue", job)
    wait(lambda: lease.read(folder / "server.json") != first, log.read_text, 30)
    slurm.run("scontrol", "update", f"jobid={job}", "starttime=now")
    database.wait_until_up(folder, time.monotonic() + 180, job)
    assert numbers(folder) == [1, 2]

    (folder / "tripletkit.dump").unlink()
    slurm.run("scancel", job)
    slurm.wait_state(job, {"CANCELLED"})
    assert (folder / "tripletkit.dump").exists(), log.read_text()
    with pytest.raises(StorageError, match=f"job {job} has ended"):
        database.wait_until_up(folder, time.monotonic() + 60, job)

    waiting = slurm.sbatch(command, "--hold", *place)
    with pytest.raises(StorageError, match=f"job {waiting} is PENDING"):
        database.wait_until_up(folder, time.monotonic(), waiting)
    holder(folder, job=waiting)  # as after a requeue
    database.down(folder)
    assert set(slurm.states(waiting).values()) == {"CANCELLED"}
