"""The shared study: many processes, outages, torn files, secrets; on real storages."""

import contextlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing import forkserver
from pathlib import Path

import optuna
import psycopg2
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from tests.postgres import Server
from tripletkit.config import Tuning
from tripletkit.errors import ConfigError, StorageError
from tripletkit.log import logger
from tripletkit.tune import database as tripletkit_database
from tripletkit.tune import journal, retry, storage
from tripletkit.tune.retry import Retry
from tripletkit.tune.storage import TurnLost

pytest_plugins = ["tests.postgres"]

fork = multiprocessing.get_context("forkserver")

# What else a process loads when it opens a study.
LOADED_LATE = [
    "alembic.command", "alembic.config", "alembic.migration", "alembic.script",
    "optuna.storages._rdb.models", "sqlalchemy.dialects.postgresql", "sqlalchemy.dialects.sqlite",
]  # fmt: skip
SUFFIXES = {"sqlite": "study.db", "journal": "study.journal"}


@pytest.fixture(scope="module", autouse=True)
def our_forkserver():
    """One that has Optuna loaded and nothing more, so that processes start in milliseconds."""
    server = forkserver._forkserver
    before = server._preload_modules
    server._stop()
    server.set_forkserver_preload(["tests.test_storage", *LOADED_LATE])
    yield
    server._stop()
    server.set_forkserver_preload(before)


@pytest.fixture(autouse=True)
def less_patience(monkeypatch):
    """So that a test that goes wrong ends."""
    monkeypatch.setattr(retry, "PATIENCE", 60.0)


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def tuning(request, tmp_path) -> Tuning:
    """A place for a study on each kind of storage."""
    if request.param == "postgresql":
        return on(request.getfixturevalue("database"))
    return Tuning(storage_path=tmp_path / SUFFIXES[request.param], sampler="random")


def on(url: str, **options) -> Tuning:
    return Tuning(storage_url=url, **{"sampler": "random", **options})


def open_study(
    tuning: Tuning, *, seed: int = 0, workers: int = 8, **options
) -> storage.SharedStudy:
    return storage.open_study(tuning, seed=seed, workers=workers, **options)


def member(barrier, results, function, index: int, arguments: tuple) -> None:
    said = Said()
    logger.addHandler(said)
    barrier.wait()
    results.put((index, function(index, *arguments), said.warnings))


class Said(logging.Handler):
    """Collects warnings and worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


def together(count: int, function, *arguments, quiet: bool = True) -> list:
    """What `count` processes return that call `function(index, *arguments)` at once.

    Without a warning in their logs, if they are to be `quiet`.
    """
    barrier, results = fork.Barrier(count), fork.SimpleQueue()
    processes = [
        fork.Process(target=member, args=(barrier, results, function, index, arguments))
        for index in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    ended = sorted(results.get() for _ in range(count))
    if quiet:
        assert [warning for *_, warnings in ended for warning in warnings] == []
    return [result for _, result, _ in ended]


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def disconnect(shared: storage.SharedStudy) -> None:
    """Close the idle connections of a study on PostgreSQL."""
    shared.study._storage.storage._backend.engine.dispose()


def records(caplog, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def away_and_back(caplog) -> tuple[int, int]:
    """How often the log says that the storage is away, and that it is back."""
    away = [m for m in records(caplog, logging.WARNING) if "is away" in m]
    back = [m for m in records(caplog, logging.INFO) if "is back" in m]
    return len(away), len(back)


# Many processes


def open_it(index: int, tuning: Tuning) -> str:
    return open_study(tuning, seed=index, workers=16).study.study_name


def test_sixteen_workers_start_at_once(tuning):
    storage.create(tuning)
    assert together(16, open_it, tuning) == ["tripletkit"] * 16


def create_it(index: int, tuning: Tuning) -> int:
    return storage.create(tuning).study._study_id


def test_launchers_at_once_make_one_study(tuning):
    assert len(set(together(4, create_it, tuning))) == 1
    assert len(optuna.get_all_study_names(open_study(tuning).study._storage)) == 1


def make_tables(index: int, tuning: Tuning) -> None:
    patient = Retry("the storage")
    patient(lambda: storage._backend(tuning, patient, workers=1).open(True))


def test_launchers_survive_each_other_where_locks_do_not_hold(database, tmp_path):
    for tuning in (on(database), Tuning(storage_path=tmp_path / "study.db")):
        together(8, make_tables, tuning, quiet=False)
        assert storage.create(tuning).study.get_trials() == []


def pop(index: int, tuning: Tuning, turns: bool) -> list[int]:
    """Takes waiting trials until there are none."""
    shared, taken = open_study(tuning, seed=index), []
    while True:
        with shared.turn() if turns else contextlib.nullcontext():
            if not shared.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
                return taken
            trial = shared.study.ask()
        taken.append(trial.number)
        shared.study.tell(trial, 0.0)


def test_every_waiting_trial_is_taken_once(tuning):
    study = storage.create(tuning).study
    for number in range(64):
        study.enqueue_trial({"x": number})
    taken = together(8, pop, tuning, True)
    assert sorted(number for numbers in taken for number in numbers) == list(range(64))
    assert {t.state for t in study.get_trials()} == {TrialState.COMPLETE}


def test_sqlite_gives_a_waiting_trial_to_one_worker_also_outside_turns(tmp_path):
    tuning = Tuning(storage_path=tmp_path / "study.db", sampler="random")
    study = storage.create(tuning).study
    for number in range(40):
        study.enqueue_trial({"x": number})
    taken = [number for numbers in together(8, pop, tuning, False) for number in numbers]
    assert sorted(set(taken)) == sorted(taken)  # who found none left may have made a new one
    assert set(range(40)) <= set(taken)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_trial_gets_its_parameters_by_the_seed_and_its_number_whoever_asks(tmp_path, sampler):
    """Workers with one seed do not propose the same; one that is started again goes on alike."""

    def proposals(name: str, seed: int, *, starts: bool) -> list[tuple[float, float]]:
        tuning = Tuning(storage_path=tmp_path / f"{name}.journal", sampler=sampler)
        storage.create(tuning)
        study, found = open_study(tuning, seed=seed).study, []
        for number in range(14):  # TPE models what it has seen from the eleventh on
            study = open_study(tuning, seed=seed).study if starts else study
            trial = study.ask()
            x = trial.suggest_float("x", 0, 1)
            if starts and number % 2:  # killed between the two
                study = open_study(tuning, seed=seed).study
                trial = optuna.Trial(study, trial._trial_id)
                assert trial.suggest_float("x", 0, 1) == x
            found.append((x, trial.suggest_float("y", 0, 1)))
            study.tell(trial, x)
        return found

    once = proposals("once", 1, starts=False)
    assert proposals("again", 1, starts=True) == once
    assert len(set(once)) == 14
    assert not set(proposals("other", 2, starts=False)) & set(once)


# Turns


def count_up(index: int, tuning: Tuning, file) -> None:
    shared = open_study(tuning)
    for _ in range(10):
        with shared.turn():
            number = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(number + 1))


def test_one_worker_at_a_time_is_in_its_turn(tuning, tmp_path):
    storage.create(tuning)
    counter = tmp_path / "counter"
    counter.write_text("0")
    together(8, count_up, tuning, counter)
    assert counter.read_text() == "80"


def sit_in_turn(tuning: Tuning, inside) -> None:
    with open_study(tuning, workers=1000).turn():
        inside.set()
        signal.pause()


@contextlib.contextmanager
def turn_taken(tuning: Tuning):
    """Another process is in its turn; killed at the end."""
    inside = fork.Event()
    process = fork.Process(target=sit_in_turn, args=(tuning, inside))
    process.start()
    try:
        assert inside.wait(30)
        yield process
    finally:
        process.kill()
        process.join()


def take_a_turn(shared: storage.SharedStudy) -> None:
    with shared.turn():
        pass


def test_a_killed_worker_loses_its_turn_at_once(tuning):
    shared = storage.create(tuning)
    with ThreadPoolExecutor() as pool, turn_taken(tuning) as holder:
        waiting = pool.submit(take_a_turn, shared)
        assert not wait([waiting], timeout=0.3).done
        os.kill(holder.pid, signal.SIGKILL)
        waiting.result(10)


def test_other_studies_have_their_own_turns(database):
    storage.create(on(database))
    other = storage.create(on(database, study_name="other"))
    with turn_taken(on(database)), other.turn():
        pass


def test_waiting_for_a_turn_holds_no_connection(postgres, database):
    tuning = on(database, study_name="crowd")
    disconnect(storage.create(tuning))
    crowd = [open_study(tuning, workers=1000) for _ in range(6)]

    wait_until(lambda: postgres.clients("tripletkit crowd") == 0)
    with ThreadPoolExecutor() as pool:
        with turn_taken(tuning):
            waiting = [pool.submit(take_a_turn, shared) for shared in crowd]
            counts = []
            for _ in range(100):
                counts.append(postgres.clients("tripletkit crowd"))
                time.sleep(0.01)
        for turn in waiting:
            turn.result(60)
    assert min(counts) == 1  # the one whose turn it is; the others only look in, now and then
    assert sum(counts) / len(counts) < 3


def test_workers_hold_one_connection_each_and_many_workers_none(postgres, database):
    tuning = on(database, study_name="eight")
    name = "tripletkit eight"
    disconnect(storage.create(tuning))
    few = [open_study(tuning, seed=seed, workers=8) for seed in range(8)]
    trials = [shared.study.ask() for shared in few]
    assert postgres.clients(name) == 8
    many = [open_study(tuning, seed=seed, workers=500) for seed in range(8)]
    trials += [shared.study.ask() for shared in many]
    wait_until(lambda: postgres.clients(name) == 8)
    for trial in trials:
        trial.report(0.5, 1)
    wait_until(lambda: postgres.clients(name) == 8)


# Outages


@pytest.fixture(scope="module")
def one_server():
    with Server() as server:
        yield server


@pytest.fixture
def server(one_server):
    """A server that a test may stop."""
    yield one_server
    one_server.restart()


@pytest.fixture
def url(server) -> str:
    """An empty database on it."""
    return server.database()


def test_a_trial_outlasts_a_restart_of_the_server_and_the_log_says_so_once(server, url, caplog):
    shared = storage.create(on(url, pruner="median"))
    trial = shared.study.ask()
    trial.suggest_float("x", 0, 1)
    trial.report(0.1, 1)
    server.stop()

    def go_on() -> None:
        trial.report(0.2, 2)
        trial.should_prune()
        shared.study.tell(trial, 0.3)

    with ThreadPoolExecutor() as pool:
        going_on = pool.submit(go_on)
        wait_until(lambda: away_and_back(caplog) == (1, 0))
        time.sleep(1.5)  # for several tries
        server.start()
        going_on.result(60)
    stored = open_study(on(url)).study.get_trials()[0]
    assert (stored.state, stored.value) == (TrialState.COMPLETE, 0.3)
    assert stored.intermediate_values == {1: 0.1, 2: 0.2}
    assert away_and_back(caplog) == (1, 1)
    assert len(records(caplog, logging.WARNING)) == 1


def test_a_restart_between_two_calls_goes_unnoticed(server, url, caplog):
    shared = storage.create(on(url))
    trial = shared.study.ask()
    server.restart()
    trial.report(0.5, 1)
    shared.study.tell(trial, 0.5)
    assert records(caplog, logging.WARNING) == []


def test_a_worker_waits_for_a_server_that_is_not_up_yet(server, url, caplog):
    storage.create(on(url))
    server.stop()
    with ThreadPoolExecutor() as pool:
        opened = pool.submit(open_study, on(url))
        wait_until(lambda: away_and_back(caplog) == (1, 0))
        server.start()
        assert opened.result(60).study.study_name == "tripletkit"


def test_a_server_that_stays_away_is_given_up_at_last(server, url, monkeypatch):
    shared = storage.create(on(url))
    server.stop(signal.SIGQUIT)
    monkeypatch.setattr(retry, "PATIENCE", 0.5)
    with pytest.raises(StorageError, match="has been away for") as caught:
        shared.study.get_trials()
    assert caught.value.exit_code == 5
    assert f"127.0.0.1:{server.port}" in caught.value.message
    assert "\n" not in caught.value.message


def test_whoever_looks_need_not_wait(server, url):
    storage.create(on(url))
    server.stop()
    began = time.monotonic()
    with pytest.raises(StorageError, match="away"):
        open_study(on(url), patience=0.2)
    assert time.monotonic() - began < 5


def announce(folder: Path, server: Server) -> None:
    """Write down where the server of a folder is, as `tripletkit db up` does."""
    address = tripletkit_database.Connection(
        "127.0.0.1", server.port, "tuner", server.password or "", "postgres"
    )
    (folder / "connection.json").write_text(
        json.dumps({**address._asdict(), "node": socket.gethostname()})
    )


def test_a_server_that_comes_back_elsewhere_is_found(start_postgres, tmp_path, caplog):
    server = start_postgres(password="geheim-4711")
    announce(tmp_path, server)
    tuning = Tuning(storage_path=tmp_path, sampler="random")
    shared = storage.create(tuning)
    assert shared.kind == "postgresql"
    trial = shared.study.ask()
    server.stop()
    (tmp_path / "connection.json").unlink()
    with ThreadPoolExecutor() as pool:
        report = pool.submit(trial.report, 0.5, 1)
        wait_until(lambda: away_and_back(caplog) == (1, 0))
        server.move()
        announce(tmp_path, server)
        report.result(60)
    with shared.turn():
        shared.study.tell(trial, 0.5)
    assert open_study(tuning).study.best_value == 0.5
    assert away_and_back(caplog) == (1, 1)
    assert "geheim-4711" not in caplog.text


def test_a_folder_whose_server_is_down_says_how_to_start_it(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LAUNCH_PATIENCE", 0.1)
    with pytest.raises(StorageError, match="no PostgreSQL runs") as caught:
        storage.create(Tuning(storage_path=tmp_path))
    assert "tripletkit db up" in caught.value.hint


def turn_over_a_restart(shared: storage.SharedStudy, server: Server, then) -> None:
    with shared.turn():
        server.restart()
        then()


def test_a_turn_does_not_outlast_its_server(server, url):
    shared = storage.create(on(url))
    for then in (shared.study.ask, lambda: None):
        with pytest.raises(TurnLost):
            turn_over_a_restart(shared, server, then)
    with shared.turn():
        shared.study.ask()
    assert [t.number for t in shared.study.get_trials()] == [0]  # none outside a turn


def test_what_goes_wrong_inside_a_turn_is_what_is_raised(server, url):
    shared = storage.create(on(url))
    with pytest.raises(ZeroDivisionError):
        turn_over_a_restart(shared, server, lambda: 1 / 0)


class Wire:
    """A line to a server that breaks once: at the last of `statements`, in their order.

    With `answer_lost` the server still gets that statement, and the client no answer; `then` is
    called before the client knows.
    """

    def __init__(self, port: int) -> None:
        self.server = ("127.0.0.1", port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.statements: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def break_at(self, *statements: str, answer_lost: bool, then=lambda: None) -> None:
        self.answer_lost, self.then = answer_lost, then
        self.statements = [statement.encode() for statement in statements]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                ends = (client, socket.create_connection(self.server))
                broken, answered = threading.Event(), threading.Event()
                for way in (self._up, self._down):
                    threading.Thread(
                        target=way, args=(*ends, broken, answered), daemon=True
                    ).start()

    def _up(self, client, server, broken, answered) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if self._breaks(data):
                    broken.set()
                    if self.answer_lost:
                        server.sendall(data)
                        assert answered.wait(30)
                    server.shutdown(socket.SHUT_RDWR)
                    self.then()
                    break
                server.sendall(data)
        hang_up(client, server)

    def _down(self, client, server, broken, answered) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if broken.is_set():
                    answered.set()
                else:
                    client.sendall(data)
        if not broken.is_set():
            hang_up(client, server)

    def _breaks(self, data: bytes) -> bool:
        if not self.statements or self.statements[0] not in data:
            return False
        self.statements.pop(0)
        return not self.statements


def hang_up(*ends) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@pytest.fixture
def wire(postgres):
    wire = Wire(postgres.port)
    yield wire
    wire.listener.close()


def through(wire: Wire, url: str) -> Tuning:
    return on(url.replace(f":{url.rsplit(':', 1)[1].split('/')[0]}/", f":{wire.port}/"))


@pytest.mark.parametrize("end", [{"values": 0.25}, {"state": TrialState.FAIL}])
def test_a_result_whose_answer_was_lost_counts_once(wire, database, caplog, end):
    shared = storage.create(through(wire, database))
    trial = shared.study.ask()
    wire.break_at("UPDATE trials SET state", "COMMIT", answer_lost=True)
    shared.study.tell(trial, **end)
    (stored,) = open_study(on(database)).study.get_trials()
    assert stored.state == end.get("state", TrialState.COMPLETE)
    assert stored.value == end.get("values")
    assert away_and_back(caplog) == (1, 1)


def test_anothers_result_is_not_taken_for_ours(wire, database):
    shared = storage.create(through(wire, database))
    trial = shared.study.ask()

    def another_ends_it() -> None:
        open_study(on(database)).study.tell(trial.number, 0.75)

    wire.break_at("UPDATE trials SET state", answer_lost=False, then=another_ends_it)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        shared.study.tell(trial, 0.25)
    assert open_study(on(database)).study.best_value == 0.75


def test_a_trial_given_back_is_not_taken_from_who_got_it(wire, database):
    shared = storage.create(through(wire, database))
    trial = shared.study.ask()
    wire.break_at(
        "UPDATE trials SET state", "COMMIT", answer_lost=True,
        then=open_study(on(database)).study.ask,
    )  # fmt: skip
    shared.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    (stored,) = shared.study.get_trials()
    assert stored.state == TrialState.RUNNING


def test_giving_back_is_tried_again_when_it_did_not_arrive(wire, database):
    shared = storage.create(through(wire, database))
    trial = shared.study.ask()
    wire.break_at("UPDATE trials SET state", answer_lost=False)
    shared.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    (stored,) = shared.study.get_trials()
    assert stored.state == TrialState.WAITING


def test_a_read_that_breaks_in_the_middle_is_repeated_without_sql_in_the_log(
    wire, database, caplog
):
    shared = storage.create(through(wire, database))
    shared.study.ask()
    wire.break_at("FROM studies", "FROM trials", answer_lost=False)
    assert len(shared.study.get_trials()) == 1
    assert away_and_back(caplog) == (1, 1)
    assert "SELECT" not in caplog.text


def test_every_call_of_a_storage_is_retried():
    public = {name for name in dir(BaseStorage) if not name.startswith("_")}
    ours = retry.RetryingStorage(None, Retry("nowhere"))
    assert all(name in vars(type(ours)) for name in public)


def test_mistakes_are_not_retried(tuning):
    shared = storage.create(tuning)
    trial = shared.study.ask()
    shared.study.tell(trial, 1.0)
    began = time.monotonic()
    with pytest.raises(KeyError):
        shared.study._storage.get_trial(4711)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr("key", "value")
    assert time.monotonic() - began < 5


# The journal


def write_torn(index: int, tuning: Tuning) -> None:
    """A writer whose last record does not get to the disk as a whole."""
    study = open_study(tuning, patience=0.1).study
    room = tuning.storage_path.stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with pytest.raises(StorageError, match="File too large"):
        study.ask()


def test_a_torn_line_is_mended_and_no_trial_is_lost(tmp_path, caplog):
    tuning = Tuning(storage_path=tmp_path / "study.journal", sampler="random")
    early = storage.create(tuning).study
    for value in (1.0, 2.0):
        early.tell(early.ask(), value)
    together(1, write_torn, tuning, quiet=False)
    assert not tuning.storage_path.read_bytes().endswith(b"\n")
    late = open_study(tuning).study  # reading does not mind
    assert [t.value for t in late.get_trials()] == [1.0, 2.0]
    for study, number in ((late, 2), (early, 3)):
        trial = study.ask()
        assert trial.number == number
        study.tell(trial, float(number + 1))
    assert "killed writer" in caplog.text
    for line in tuning.storage_path.read_text().splitlines():
        json.loads(line)
    for study in (early, late, open_study(tuning).study):
        assert [t.value for t in study.get_trials()] == [1.0, 2.0, 3.0, 4.0]


def test_a_writer_waits_for_the_journals_lock(tmp_path):
    tuning = Tuning(storage_path=tmp_path / "study.journal", sampler="random")
    study = storage.create(tuning).study
    other = journal.backend(tuning.storage_path)._lock
    other.acquire()
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(study.ask)
        assert not wait([asking], timeout=0.3).done
        assert open_study(tuning).study.get_trials() == []
        other.release()
        assert asking.result(60).number == 0


@pytest.mark.parametrize("torn", [b"", b"x", b"\0" * 10_000])
@pytest.mark.parametrize("whole", [b"", b"{}\n", b"{}\n" * 5000])
def test_only_what_stands_behind_the_last_newline_is_cut(tmp_path, whole, torn):
    file = tmp_path / "journal"
    file.write_bytes(whole + torn)
    assert journal.cut_torn_line(file) == len(torn)
    assert file.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path):
    tuning = Tuning(storage_path=tmp_path / "study.journal")
    storage.create(tuning)
    tuning.storage_path.write_text("{broken\n" + tuning.storage_path.read_text())
    with pytest.raises(StorageError, match=r"study\.journal cannot be used") as caught:
        open_study(tuning)
    assert "line" in caught.value.hint


# Where SQLite may not be


MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:40 / /home rw,relatime shared:9 - {home} server:/home rw,vers=4.2
31 30 8:2 / /home/local\\040disk rw - xfs /dev/sdb1 rw
32 21 0:41 / /stacked rw - nfs4 server:/old rw
33 21 8:3 / /stacked rw master:1 propagate_from:2 - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc/x.db", "ext4"),
        ("/home/me/study.db", "nfs4"),
        ("/home", "nfs4"),
        ("/homeless/study.db", "ext4"),
        ("/home/local disk/study.db", "xfs"),
        ("/stacked/study.db", "tmpfs"),
    ],
)
def test_the_file_system_of_a_path(tmp_path, path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(home="nfs4"))
    assert storage.filesystem(Path(path), mounts) == kind


def test_this_machine_has_a_list_of_file_systems(tmp_path):
    assert storage.filesystem(tmp_path / "not" / "there") != ""
    assert storage.filesystem(Path("/proc/self")) == "proc"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre", "gpfs", "beegfs", "fuse.sshfs", "cifs"])
def test_sqlite_is_refused_on_a_network_file_system(tmp_path, monkeypatch, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(home=kind).replace("/home ", f"{tmp_path} "))
    monkeypatch.setattr(storage, "MOUNTINFO", mounts)
    for opened in (storage.create, open_study):
        with pytest.raises(StorageError, match=f"network file system .{kind}") as caught:
            opened(Tuning(storage_path=tmp_path / "study.db"))
        assert "tripletkit db up" in caught.value.hint
        assert ".journal" in caught.value.hint
    storage.create(Tuning(storage_path=tmp_path / "study.journal"))


def test_sqlite_is_refused_on_another_host(tmp_path):
    tuning = Tuning(storage_path=tmp_path / "study.db")
    storage.create(tuning).study.set_user_attr("tripletkit:host", "elsewhere")
    for opened in (storage.create, open_study):
        with pytest.raises(StorageError, match="elsewhere") as caught:
            opened(tuning)
        assert "tripletkit db up" in caught.value.hint
        assert ".journal" in caught.value.hint


# What is in the study


def tables(url: str) -> list[tuple]:
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return cursor.fetchall()


def test_a_study_that_is_not_there_is_not_made(tuning):
    with pytest.raises(StorageError) as caught:
        open_study(tuning)
    assert "tripletkit tune" in caught.value.hint
    if tuning.storage_url is None:
        assert list(tuning.storage_path.parent.iterdir()) == []
    else:
        assert tables(tuning.storage_url) == []
    storage.create(tuning)
    other = tuning.model_copy(update={"study_name": "other"})
    with pytest.raises(StorageError, match="no study 'other'") as caught:
        open_study(other)
    assert "tripletkit tune" in caught.value.hint


def test_the_direction_follows_from_the_objective(tmp_path):
    for objective, minimizes in (("val_loss", True), ("recall@10", False), ("map@r", False)):
        tuning = Tuning(storage_path=tmp_path / f"{objective}.db", objective=objective)
        study = storage.create(tuning).study
        for value in (1.0, 2.0):
            study.tell(study.ask(), value)
        assert open_study(tuning).study.best_value == (1.0 if minimizes else 2.0)


def test_a_study_keeps_its_direction(tuning):
    storage.create(tuning)
    turned = tuning.model_copy(update={"objective": "val_loss"})
    for opened in (storage.create, open_study):
        with pytest.raises(ConfigError, match="maximize") as caught:
            opened(turned)
        assert "--study-name" in caught.value.hint


def test_successive_halving_prunes_at_its_rungs_and_median_after_a_warm_up(tmp_path):
    values = {"good": 0.9, "bad": 0.1}
    for pruner, epochs in (("median", 3), ("successive_halving", 1), ("none", None)):
        tuning = Tuning(
            storage_path=tmp_path / f"{pruner}.db", pruner=pruner, max_epochs=15, sampler="random"
        )
        study = storage.create(tuning).study
        for _ in range(5):
            trial = study.ask()
            for epoch in range(1, 16):
                trial.report(values["good"], epoch)
                trial.should_prune()
            study.tell(trial, values["good"])
        trial, pruned_at = study.ask(), None
        for epoch in range(1, 16):
            trial.report(values["bad"], epoch)
            if trial.should_prune():
                pruned_at = epoch
                break
        assert pruned_at == epochs


# Secrets


def test_the_password_is_in_no_message(start_postgres, tmp_path, monkeypatch, caplog):
    password = "geheim-0815"
    server = start_postgres(password=password)
    secrets = tmp_path / "pgpass"
    secrets.touch(mode=0o600)
    monkeypatch.setenv("PGPASSFILE", str(secrets))
    caplog.set_level(logging.DEBUG)
    messages = []

    def fails(tuning: Tuning) -> str:
        with pytest.raises(StorageError) as caught:
            storage.create(tuning)
        messages.extend(traceback.format_exception(caught.value, chain=True))
        messages.append(str(caught.value.hint))
        return f"{caught.value.message} {caught.value.hint}"

    assert "PGPASSFILE" in fails(on(server.url))
    secrets.write_text(f"*:*:*:*:{password}-not")
    assert "0600" in fails(on(server.url))
    secrets.write_text(f"*:*:*:*:{password}")
    assert "database" in fails(on(server.url_of("nowhere")))
    shared = storage.create(on(server.url))
    assert away_and_back(caplog) == (0, 0)  # nobody waited for what waiting does not mend
    server.stop()
    monkeypatch.setattr(storage, "LAUNCH_PATIENCE", 0.2)
    fails(on(server.url))
    fails(on(f"{server.url}?sslmode=nonsense"))
    messages += [repr(shared), repr(vars(shared.study._storage.storage._backend)), caplog.text]
    assert "geheim" not in "".join(messages)
    assert str(server.port) in "".join(messages)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:geheim@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host:5432/db?passfile=x", "postgresql://me@host:5432/db?passfile=x"),
        ("postgresql://:geheim@host:5432/db", "postgresql://:***@host:5432/db"),
        ("dbname=x password=geheim host=y", "dbname=x password=*** host=y"),
        ("password='ge heim' host=y", "password=*** host=y"),
        ("postgresql://h/db?password=geheim&sslmode=x", "postgresql://h/db?password=***&sslmode=x"),
        ("postgresql://me:ge@heim@host/db", "postgresql://me:***@host/db"),
        ("password = geheim host=y", "password=*** host=y"),
        (r"password='ge\'heim x' host=y", "password=*** host=y"),
        ("password=ge'heim host=y", "password=*** host=y"),
        ("password='ge heim", "password=***"),
        ("PGPASSWORD = 'ge heim' host=y", "PGPASSWORD=*** host=y"),
        ("postgresql://a/b:geheim@h/d", "postgresql://a/b:***@h/d"),
    ],
)
def test_passwords_are_taken_out_of_texts(text, shown):
    assert retry.redacted(text) == shown


def test_the_servers_sessions_end_when_their_client_is_frozen(database):
    tuning = on(database)
    server = storage.Server(tuning, Retry("the storage"))
    with contextlib.closing(server._connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        assert cursor.fetchone() == ("10min",)
        cursor.execute("SHOW tcp_keepalives_idle")
        assert cursor.fetchone() == ("30",)
        assert connection.info.dsn_parameters["connect_timeout"] == "10"
    with (
        contextlib.closing(psycopg2.connect(database)) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SHOW tcp_keepalives_idle")
        assert cursor.fetchone() != ("30",)
