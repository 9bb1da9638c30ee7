"""`tripletkit study dashboard`: real servers on every storage, asked over HTTP and by a browser.

Most of them are in this process, which saves starting one; what a process has of its own, its signals
and its end, has tests with one.
"""

import http.client
import json
import os
import queue
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from tests import fleet, postgres
from tests.browser import browser  # noqa: F401 - fixture
from tripletkit import cli, fsio
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.errors import StorageError
from tripletkit.monitor import dashboard
from tripletkit.tune import storage

PASSWORD = "sesame-and-poppy"
NAME = "facades"
SECONDS = 120  # for what takes a moment on a quiet machine


class Studio:
    """A configuration in a folder, and the study that it names."""

    def __init__(self, folder: Path, **tuning) -> None:
        self.folder = folder
        self.file = folder / "config.toml"
        values = {"study_name": NAME, "storage_path": folder / "study.db", **tuning}
        self.config = configuration.with_values(
            Config(),
            global_={"scratch_dir": folder, "log_dir": folder / "logs"},
            tuning={"objective": "map@r", **values},
        )
        fsio.write_text(self.file, configuration.dump(self.config))

    def study(self, trials: int = 3) -> optuna.Study:
        """Create it, with so many trials."""
        made = storage.create(self.config.tuning).study
        for number in range(trials):
            add(made, number / 8)
        return made

    def reader(self) -> optuna.Study:
        """The study as the dashboard opens it."""
        return storage.open_study(
            self.config.tuning, seed=0, workers=1, patience=0, read_only=True
        ).study


def add(study: optuna.Study, value: float) -> None:
    ranges = {"margin": FloatDistribution(0, 1)}
    params = {"margin": value}
    study.add_trial(create_trial(value=value, params=params, distributions=ranges))


class Dashboard:
    """What a server says of itself, and what it answers."""

    def __init__(self, said: str) -> None:
        self.said = said
        self.url = next(line for line in said.splitlines() if line.startswith("http"))
        self.port = int(self.url.split("/")[2].rpartition(":")[2])
        self.study_id = self.url.rpartition("/")[2]

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of an answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, SECONDS)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def trials(self) -> list[dict]:
        status, text = self.ask(f"/api/studies/{self.study_id}")
        assert status == 200, text
        return json.loads(text)["trials"]


@contextmanager
def serving(studio: Studio, port: int | None = 0) -> Iterator[Dashboard]:
    """A server in this process, on any free port."""
    with dashboard.opened(studio.config, "127.0.0.1", port) as (server, lines):
        loop = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        loop.start()
        try:
            yield Dashboard("\n".join(lines))
        finally:
            server.shutdown()
            loop.join()


@pytest.fixture
def start() -> Iterator[Callable[..., Dashboard]]:
    """Starts servers, which end with the test."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(serving(*arguments))


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory) -> Studio:
    """A study for those who only look."""
    studio = Studio(tmp_path_factory.mktemp("sqlite"))
    studio.study()
    return studio


@pytest.fixture(scope="module")
def shown(sqlite) -> Iterator[Dashboard]:
    """A dashboard for those who only look."""
    with serving(sqlite) as started:
        yield started


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    """A PostgreSQL that wants a password."""
    with postgres.Server(password=PASSWORD) as started:
        yield started


@pytest.fixture
def on_server(server, tmp_path, monkeypatch) -> Studio:
    """A study in a new database of it."""
    secrets = tmp_path / "pgpass"
    secrets.touch(0o600)
    secrets.write_text(f"127.0.0.1:{server.port}:*:*:{PASSWORD}\n")
    monkeypatch.setenv("PGPASSFILE", str(secrets))
    return Studio(tmp_path, storage_url=server.database())


@pytest.fixture(params=["sqlite", "journal", "url", "folder"])
def studio(request, tmp_path) -> Iterator[Studio]:
    """A study on each storage; PostgreSQL wants a password."""
    if request.param == "sqlite":
        yield Studio(tmp_path)
    elif request.param == "journal":
        yield Studio(tmp_path, storage_path=tmp_path / "study.journal")
    elif request.param == "url":
        yield request.getfixturevalue("on_server")
    else:  # where the user that the server runs as may go
        with tempfile.TemporaryDirectory(prefix="db_") as name:
            Path(name).chmod(0o755)
            folder, studio = Path(name, "db"), Studio(tmp_path, storage_path=Path(name, "db"))
            assert call("db", "up", folder, "--config", studio.file) == 0
            try:
                yield studio
            finally:
                assert call("db", "down", folder) == 0


def call(*words: object) -> int:
    """A command, in this process; its exit code."""
    named = list(map(str, words))
    return cli.run(lambda: cli.app(named, prog_name="tripletkit", standalone_mode=False))


def command_lines() -> str:
    """Of every process of this machine."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(each.read_text(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


def secrets_of(studio: Studio) -> list[str]:
    folder = studio.config.tuning.storage_path
    files = [p for p in folder.glob("*") if p.is_file()] if folder.is_dir() else []
    told = [json.loads(p.read_text()) for p in files if p.suffix == ".json"]
    return [PASSWORD, *(each["password"] for each in told if "password" in each)]


WRITES = [
    ("DELETE", "/api/studies/{study}", None),
    ("POST", "/api/studies", {"study_name": "mine", "directions": ["maximize"]}),
    ("POST", "/api/studies/{study}/rename", {"study_name": "mine"}),
    ("PUT", "/api/studies/{study}/note", {"version": 1, "body": "nice"}),
    ("POST", "/api/trials/1/tell", {"state": "Fail"}),
    ("POST", "/api/trials/1/user-attrs", {"user_attrs": {"tripletkit:owner": None}}),
]


def test_shows_the_study_on_every_storage_and_changes_nothing(studio, start, caplog):
    study = studio.study()
    shown = start(studio)
    assert f"study {NAME}" in shown.said
    assert shown.ask("/")[0] == 302
    assert "<title>" in shown.ask(f"/dashboard/studies/{shown.study_id}")[1]
    studies = json.loads(shown.ask("/api/studies")[1])["study_summaries"]
    assert [(each["study_name"], str(each["study_id"])) for each in studies] == [
        (NAME, shown.study_id)
    ]
    assert [trial["values"] for trial in shown.trials()] == [[0.0], [0.125], [0.25]]

    add(study, 0.75)  # what happens meanwhile is seen
    fleet.until(lambda: len(shown.trials()) == 4, lambda: caplog.text, deadline=SECONDS)

    before = [(t.number, t.state, t.user_attrs) for t in study.get_trials()]
    for method, path, body in WRITES:
        status, text = shown.ask(path.format(study=shown.study_id), method, json.dumps(body))
        assert (status, json.loads(text)) == (403, {"reason": "this dashboard is read only"})
    assert optuna.get_all_study_names(study._storage) == [NAME]
    assert [(t.number, t.state, t.user_attrs) for t in study.get_trials()] == before

    lines = command_lines()
    for secret in secrets_of(studio):
        assert secret not in shown.said + caplog.text + lines
    assert "dashboard:" not in caplog.text


def test_the_command_ends_with_ctrl_c_whatever_is_half_said(sqlite):
    command = [fleet.COMMAND, "study", "dashboard", "--config", sqlite.file, "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = ""
        while not said.endswith("Ctrl-C ends it\n"):
            line = process.stdout.readline()
            assert line, said + process.stderr.read()
            said += line
        shown = Dashboard(said)
        assert len(shown.trials()) == 3
        with socket.create_connection(("127.0.0.1", shown.port)) as slow:
            slow.sendall(b"GET /dashboard HTTP/1.1\r\n")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=SECONDS) == ("", "")
        assert process.returncode == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", shown.port)) != 0


@pytest.fixture
def under_nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def serve_and_send(studio: Studio, monkeypatch, *numbers: int) -> list[int]:
    """Serve, and send signals to this process, each once an answer came; the answers."""
    said, ports, answers = dashboard._addresses, queue.Queue(), []

    def addresses(host: str, port: int, *more) -> list[str]:
        ports.put(port)
        return said(host, port, *more)

    def send() -> None:
        port = ports.get(timeout=SECONDS)
        for number in numbers:
            with closing(http.client.HTTPConnection("127.0.0.1", port, SECONDS)) as connection:
                connection.request("GET", "/")
                answers.append(connection.getresponse().status)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(dashboard, "_addresses", addresses)
    sender = threading.Thread(target=send)
    sender.start()
    before = [signal.getsignal(each) for each in dashboard.ENDS]
    dashboard.serve(studio.config, "127.0.0.1", 0)
    sender.join()
    assert [signal.getsignal(each) for each in dashboard.ENDS] == before
    return answers


@pytest.mark.parametrize("number", dashboard.ENDS)
def test_a_signal_ends_it(sqlite, monkeypatch, number):
    assert serve_and_send(sqlite, monkeypatch, number) == [302]


def test_under_nohup_it_outlives_the_terminal(sqlite, monkeypatch, under_nohup):
    numbers = (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)
    assert serve_and_send(sqlite, monkeypatch, *numbers) == [302, 302, 302]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:9000", 200), ("[::1]:8080", 200), ("LOCALHOST", 200),
        ("evil.example", 403), ("evil.example:8080", 403), ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403), ("", 403), ("127.0.0.1,evil.example", 403),
    ],
)  # fmt: skip
def test_a_page_of_somebody_else_whose_name_leads_here_reads_nothing(shown, host, status):
    answered, text = shown.ask("/api/studies", Host=host)
    assert answered == status
    assert (NAME in text) == (status == 200)


def test_on_the_network_it_goes_by_any_name():
    def page(request, start):
        start("200 OK", [])
        return [b"page"]

    def ask(host: str, asked: str) -> bytes:
        request = {"REQUEST_METHOD": "GET", "HTTP_HOST": asked}
        return b"".join(dashboard._guarded(page, host)(request, lambda *_: None))

    assert ask("0.0.0.0", "node17.example") == b"page"
    assert ask("127.0.0.2", "127.0.0.2:8080") == b"page"
    assert ask("127.0.0.2", "node17.example") != b"page"


def test_who_takes_no_packed_answer_gets_one_too(shown, caplog, capsys):
    page = shown.ask("/dashboard")[1]
    script = next(part for part in page.split('"') if part.startswith("/static/"))
    with socket.create_connection(("127.0.0.1", shown.port)) as plain:
        plain.sendall(f"GET {script} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        assert plain.recv(15).startswith(b"HTTP/1.0 200")
    assert capsys.readouterr().err == ""
    assert "dashboard:" not in caplog.text


def test_an_error_inside_is_a_line_in_the_log(start, sqlite, monkeypatch, caplog, capsys):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("postgresql://ada:sesame@db")

    shown = start(sqlite)
    monkeypatch.setattr("optuna_dashboard._app.static_file", broken)
    for _ in range(2):
        assert shown.ask("/static/bundle.js")[0] == 500
    (line,) = caplog.messages
    assert line.startswith("dashboard: KeyError")
    assert "sesame" not in line
    assert capsys.readouterr().err == ""


def test_a_browser_shows_the_study_and_asks_nobody_else(tmp_path, start, browser, caplog):  # noqa: F811
    """Not even for the picture in a note, which anybody may have written who has the study."""
    studio = Studio(tmp_path)
    study = studio.study()
    picture, said = "http://elsewhere.example/seen.png", []
    for key, value in {"note_ver": 1, "note_str:0": f"![seen]({picture})"}.items():
        study._storage.set_study_system_attr(study._study_id, f"dashboard:{key}", value)
    shown = start(studio)
    browser.requested()
    browser.logs()
    browser.driver.get(shown.url)
    page = browser.driver.find_element("css selector", "body")
    browser.until(lambda: NAME in page.text and "Best Trial (number=2)" in page.text)
    browser.until(lambda: browser.js("return document.querySelectorAll('.main-svg').length"))
    browser.driver.get(f"{shown.url}/note")
    browser.until(lambda: browser.js("return document.querySelector('img[alt=seen]')"))
    asked = [url for url in browser.requested() if url != picture]
    assert asked
    assert all(url.startswith(f"http://127.0.0.1:{shown.port}/") for url in asked)
    browser.until(lambda: (said.extend(browser.logs()), said)[1])
    assert all(picture in line and "Content Security Policy" in line for line in said)
    assert "dashboard:" not in caplog.text


# Beside workers


def test_a_reader_of_sqlite_keeps_nobody_from_writing(tmp_path):
    studio = Studio(tmp_path)
    study = studio.study(1)
    engine = studio.reader()._storage.storage._backend.engine
    with engine.connect() as reading:
        assert reading.exec_driver_sql("SELECT count(*) FROM trials").scalar() == 1
        # It is in the middle of a transaction, and a writer that does not wait gets through.
        with closing(sqlite3.connect(tmp_path / "study.db", timeout=0)) as writer, writer:
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("UPDATE trial_values SET value = 7")
    assert study.get_trials()[0].value == 7


def test_reading_leaves_the_file_as_it_is(tmp_path):
    """Its journal mode is the business of those who write: changing that is a write."""
    made = Studio(tmp_path)
    made.study(1)
    other = tmp_path / "elsewhere.db"
    with closing(sqlite3.connect(made.config.tuning.storage_path)) as connection:
        connection.execute("VACUUM INTO ?", [str(other)])
    before = other.read_bytes()
    assert len(Studio(tmp_path, storage_path=other).reader().get_trials()) == 1
    assert other.read_bytes() == before


def test_workers_write_while_many_look(tmp_path, start, caplog):
    studio = Studio(tmp_path)
    study, reports = studio.study(0), 30
    shown, seen, over = start(studio), [], threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(shown.ask(f"/api/studies/{shown.study_id}")[0])

    def work() -> None:
        mine = storage.open_study(studio.config.tuning, seed=1, workers=2).study
        trial = mine.ask()
        for epoch in range(reports):
            trial.report(epoch, epoch)
        mine.tell(trial, 1.0)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    workers = [threading.Thread(target=work) for _ in range(2)]
    for thread in (*lookers, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    over.set()
    for thread in lookers:
        thread.join()
    assert set(seen) == {200}
    assert [len(t.intermediate_values) for t in study.get_trials()] == [reports] * 2
    assert "dashboard:" not in caplog.text


def test_a_slow_answer_holds_up_no_other(shown):
    with socket.create_connection(("127.0.0.1", shown.port)) as slow:
        slow.sendall(b"GET /api/studies HTTP/1.1\r\nHost: localhost\r\n")  # and nothing more
        assert shown.ask("/api/studies")[0] == 200
        slow.sendall(b"\r\n")
        assert slow.recv(15).startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_database_itself_refuses_what_would_change_it(tmp_path, request, kind):
    studio = Studio(tmp_path) if kind == "sqlite" else request.getfixturevalue("on_server")
    study = studio.study(1)
    reader = studio.reader()
    assert [t.value for t in reader.get_trials()] == [0.0]
    for write in (
        lambda: reader.set_user_attr("x", 1),
        lambda: reader._storage.delete_study(reader._study_id),
    ):
        with pytest.raises(StorageError, match=r"read-?only"):
            write()
    assert study.user_attrs.keys() <= {storage.HOST}
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE]


def test_a_storage_that_goes_away_and_comes_back(on_server, server, start, monkeypatch, caplog):
    on_server.study()
    monkeypatch.setattr(dashboard, "PATIENCE", 0.5)
    shown = start(on_server)
    assert len(shown.trials()) == 3
    server.stop()
    try:
        assert shown.ask("/api/studies")[0] == 500
    finally:
        server.start()
    fleet.until(lambda: shown.ask("/api/studies")[0] == 200, lambda: "still away", deadline=SECONDS)
    assert "is away" in caplog.text
    assert "Traceback" not in caplog.text
    assert 'File "' not in caplog.text


# Addresses


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_the_next_port_is_taken_if_the_usual_one_is(sqlite, start, taken, monkeypatch, caplog):
    monkeypatch.setattr(dashboard, "PORT", taken)
    caplog.set_level("INFO")
    shown = start(sqlite, None)
    assert taken < shown.port < taken + dashboard.TRIES
    assert f"port {taken} is taken: {shown.port} instead" in caplog.text
    assert f"-L {shown.port}:127.0.0.1:{shown.port} " in shown.said
    assert len(shown.trials()) == 3


@pytest.fixture
def refused(sqlite, capsys) -> Callable[..., str]:
    """Calls the command, which does not start; its complaint."""

    def refuse(*options: str, code: int) -> str:
        assert call("study", "dashboard", "--config", sqlite.file, *options) == code
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    return refuse


def test_a_port_that_was_asked_for_is_not_exchanged(refused, taken):
    said = refused("--port", str(taken), code=2)
    assert f"port {taken} of 127.0.0.1 cannot be had" in said
    assert "--port 0" in said


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_must_be_ours(refused, host):
    said = refused("--host", host, "--port", "0", code=2)
    assert f" of {host} cannot be had" in said
    assert "127.0.0.1" in said


def test_without_the_study_or_the_extra(refused, monkeypatch):
    assert "there is no study 'nobodys'" in refused("--study-name", "nobodys", code=5)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert "pip install 'tripletkit[dashboard]'" in refused(code=2)


HERE, LOGIN = "here.example.org", "login1.example.org"


@pytest.fixture
def names(monkeypatch):
    """What the name service of a cluster would say; the one of this machine knows no domain."""
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    full = {"here": HERE, "login1": LOGIN}
    monkeypatch.setattr(socket, "getfqdn", lambda host: full.get(host, host))
    monkeypatch.setenv("LOGNAME", "ada")


@pytest.mark.parametrize(
    ("host", "environment", "lines"),
    [
        (
            "127.0.0.1",
            {},
            ["http://127.0.0.1:8081/p", f"ssh -N -L 8081:127.0.0.1:8081 ada@{HERE}"],
        ),
        ("::1", {}, ["http://[::1]:8081/p", f"ssh -N -L 8081:[::1]:8081 ada@{HERE}"]),
        (  # on a compute node, which is reached through the login node
            "127.0.0.1",
            {"SLURM_SUBMIT_HOST": "login1"},
            [
                "http://127.0.0.1:8081/p",
                f"ssh -N -L 8081:127.0.0.1:8081 -J ada@{LOGIN} ada@{HERE}",
            ],
        ),
        (  # in a shell of salloc, on the login node itself
            "127.0.0.1",
            {"SLURM_SUBMIT_HOST": "here"},
            ["http://127.0.0.1:8081/p", f"ssh -N -L 8081:127.0.0.1:8081 ada@{HERE}"],
        ),
    ],
)
def test_the_tunnel_from_elsewhere(names, host, environment, lines):
    page, tunnel, who = dashboard._addresses(host, 8081, "p", environment)
    assert [page, tunnel.partition("through: ")[2]] == lines
    assert who == f"whoever is logged in on {HERE} can read it: there is no password"


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", HERE), ("::", HERE), ("10.1.2.3", "10.1.2.3")]
)
def test_on_the_network_there_is_no_tunnel_but_a_warning(names, host, shown):
    page, who = dashboard._addresses(host, 8081, "p", {})
    assert page == f"http://{shown}:8081/p"
    assert who == f"whoever reaches {shown} over the network can read it: there is no password"
