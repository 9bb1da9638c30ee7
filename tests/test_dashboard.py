"""`tripletkit study dashboard`: real servers on every storage, asked over HTTP and by a browser."""

import http.client
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from tests import fleet
from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.config import Config
from tripletkit.errors import StorageError
from tripletkit.monitor import dashboard
from tripletkit.tune import storage

pytest_plugins = ["tests.postgres"]

PASSWORD = "sesame-and-poppy"
NAME = "facades"
SECONDS = 60  # for what takes a moment on a quiet machine


class Studio:
    """A configuration in a folder, and the study that it names."""

    def __init__(self, folder: Path, **tuning) -> None:
        self.folder = folder
        self.file = folder / "config.toml"
        values = {"study_name": NAME, "storage_path": folder / "study.db", **tuning}
        self.config = configuration.with_values(
            Config(), global_={"scratch_dir": folder}, tuning={"objective": "map@r", **values}
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
    """The command in a process of its own, from when it says that it is there."""

    def __init__(self, studio: Studio, *options: str, script: str = "", **popen) -> None:
        code = f"{script}\nfrom tripletkit import cli\ncli.main(__import__('sys').argv[1:])"
        words = ["study", "dashboard", "--config", studio.file, *options]
        self.complaints = studio.folder / "stderr"
        with self.complaints.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *words] if script else [fleet.COMMAND, *words],
                stdout=subprocess.PIPE, stderr=err, text=True, cwd=studio.folder, **popen,
            )  # fmt: skip
        self.said = ""
        while not self.said.endswith("Ctrl-C ends it\n"):
            line = self.process.stdout.readline()
            assert line, self.said + self.complaints.read_text()
            self.said += line
        self.url = next(line for line in self.said.splitlines() if line.startswith("http"))
        self.port = int(self.url.split("/")[2].rpartition(":")[2])

    def ask(self, path: str, method: str = "GET", body: str | None = None) -> tuple[int, str]:
        """Status and text of an answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, SECONDS)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def trials(self) -> list[dict]:
        status, text = self.ask(f"/api/studies/{self.study_id}")
        assert status == 200, text
        return json.loads(text)["trials"]

    @property
    def study_id(self) -> str:
        return self.url.rpartition("/")[2]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=SECONDS)
        self.said += rest
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Dashboard]]:
    """Starts dashboards on any free port, which end with the test."""
    with ExitStack() as stack:
        yield lambda studio, *options, **how: stack.enter_context(
            closing(Dashboard(studio, *(options or ("--port", "0")), **how))
        )


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory) -> Studio:
    """A study for those who only look."""
    studio = Studio(tmp_path_factory.mktemp("sqlite"))
    studio.study()
    return studio


@pytest.fixture(scope="module")
def shown(sqlite) -> Iterator[Dashboard]:
    """A dashboard for those who only look."""
    with closing(Dashboard(sqlite, "--port", "0")) as started:
        yield started


@pytest.fixture(params=["sqlite", "journal", "url", "folder"])
def studio(request, tmp_path, monkeypatch) -> Iterator[Studio]:
    """A study on each storage; PostgreSQL wants a password."""
    if request.param == "sqlite":
        yield Studio(tmp_path)
    elif request.param == "journal":
        yield Studio(tmp_path, storage_path=tmp_path / "study.journal")
    elif request.param == "url":
        server = request.getfixturevalue("start_postgres")(password=PASSWORD)
        secrets = tmp_path / "pgpass"
        secrets.touch(0o600)
        secrets.write_text(f"127.0.0.1:{server.port}:*:*:{PASSWORD}\n")
        monkeypatch.setenv("PGPASSFILE", str(secrets))
        yield Studio(tmp_path, storage_url=server.url)
    else:  # where the user that the server runs as may go
        with tempfile.TemporaryDirectory(prefix="db_") as name:
            Path(name).chmod(0o755)
            folder, studio = Path(name, "db"), Studio(tmp_path, storage_path=Path(name, "db"))
            fleet.tripletkit("db", "up", folder, "--config", studio.file)
            try:
                yield studio
            finally:
                fleet.tripletkit("db", "down", folder)


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


# What ends it, shared out over the storages.
ENDS = {"sqlite": signal.SIGINT, "journal": signal.SIGTERM, "postgresql": signal.SIGHUP}


def test_shows_the_study_on_every_storage_and_changes_nothing(studio, start):
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
    fleet.until(lambda: len(shown.trials()) == 4, shown.complaints.read_text, deadline=SECONDS)

    before = [(t.number, t.state, t.user_attrs) for t in study.get_trials()]
    for method, path, body in WRITES:
        status, text = shown.ask(path.format(study=shown.study_id), method, json.dumps(body))
        assert (status, json.loads(text)) == (403, {"reason": "this dashboard is read only"})
    assert optuna.get_all_study_names(study._storage) == [NAME]
    assert [(t.number, t.state, t.user_attrs) for t in study.get_trials()] == before

    lines = command_lines()
    # One request is half said, and must not hold up the end.
    with socket.create_connection(("127.0.0.1", shown.port)) as slow:
        slow.sendall(b"GET /dashboard HTTP/1.1\r\n")
        assert shown.end(ENDS[storage.kind_of(studio.config.tuning)]) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", shown.port)) != 0
    for secret in secrets_of(studio):
        assert secret not in shown.said + shown.complaints.read_text() + lines
    assert shown.complaints.read_text() == ""


def test_under_nohup_it_outlives_the_terminal(sqlite, start):
    shown = start(sqlite, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    status = Path(f"/proc/{shown.process.pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert ignored & 1 << (signal.SIGHUP - 1)
    assert shown.end() == 0


def test_a_browser_shows_the_study(shown, tmp_path):
    page = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom", shown.url],
        capture_output=True, text=True, timeout=2 * SECONDS,
    ).stdout  # fmt: skip
    assert NAME in page
    assert "Best Trial (number=2)" in page
    assert shown.complaints.read_text() == ""


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


def test_workers_write_while_many_look(tmp_path, start):
    studio = Studio(tmp_path)
    study, reports = studio.study(0), 60
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

    lookers = [threading.Thread(target=look) for _ in range(4)]
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
    assert shown.complaints.read_text() == ""


def test_a_slow_answer_holds_up_no_other(shown):
    with socket.create_connection(("127.0.0.1", shown.port)) as slow:
        slow.sendall(b"GET /api/studies HTTP/1.1\r\n")  # and nothing more
        assert shown.ask("/api/studies")[0] == 200
        slow.sendall(b"\r\n")
        assert slow.recv(15).startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_database_itself_refuses_what_would_change_it(tmp_path, request, kind):
    url = {"storage_url": request.getfixturevalue("database")} if kind == "postgresql" else {}
    studio = Studio(tmp_path, **url)
    study = studio.study(1)
    reader = studio.reader()
    assert [t.value for t in reader.get_trials()] == [0.0]
    for write in (
        lambda: reader.set_user_attr("x", 1),
        reader.ask,
        lambda: reader._storage.delete_study(reader._study_id),
    ):
        with pytest.raises(StorageError, match=r"read-?only"):
            write()
    assert study.user_attrs.keys() <= {storage.HOST}
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE]


def test_a_storage_that_goes_away_and_comes_back(tmp_path, start_postgres, start):
    server = start_postgres()
    studio = Studio(tmp_path, storage_url=server.url)
    studio.study()
    impatient = "from tripletkit.monitor import dashboard as d; d.PATIENCE = 0.5"
    shown = start(studio, "--port", "0", script=impatient)
    assert len(shown.trials()) == 3
    server.stop()
    fleet.until(
        lambda: shown.ask("/api/studies")[0] == 500, lambda: "still there", deadline=SECONDS
    )
    server.start()
    fleet.until(lambda: shown.ask("/api/studies")[0] == 200, lambda: "still away", deadline=SECONDS)
    assert shown.end() == 0
    complaints = shown.complaints.read_text()
    assert "is away" in complaints
    assert "Traceback" not in complaints
    assert 'File "' not in complaints


# Addresses


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def refused(studio: Studio, *options: str, script: str = "") -> tuple[int, str]:
    """Exit code and stderr of a dashboard that does not start."""
    code = f"{script}\nfrom tripletkit import cli\ncli.main(__import__('sys').argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "study", "dashboard", "--config", studio.file, *options],
        capture_output=True, text=True, cwd=studio.folder, timeout=SECONDS,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_the_next_port_is_taken_if_the_usual_one_is(sqlite, start, taken):
    script = f"from tripletkit.monitor import dashboard as d; d.PORT = {taken}"
    shown = start(sqlite, "--host", "127.0.0.1", script=script)
    assert taken < shown.port < taken + dashboard.TRIES
    assert f"port {taken} is taken: {shown.port} instead" in shown.complaints.read_text()
    assert f"-L {shown.port}:127.0.0.1:{shown.port} " in shown.said
    assert len(shown.trials()) == 3


def test_a_port_that_was_asked_for_is_not_exchanged(sqlite, taken):
    code, said = refused(sqlite, "--port", str(taken))
    assert code == 2
    assert f"port {taken} of 127.0.0.1 cannot be had" in said
    assert "--port 0" in said


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_must_be_ours(sqlite, host):
    code, said = refused(sqlite, "--host", host, "--port", "0")
    assert code == 2
    assert f" of {host} cannot be had" in said
    assert "127.0.0.1" in said


def test_without_the_study_or_the_extra(sqlite):
    code, said = refused(sqlite, "--study-name", "nobodys")
    assert code == 5
    assert "there is no study 'nobodys'" in said
    code, said = refused(sqlite, script="import sys; sys.modules['optuna_dashboard'] = None")
    assert code == 2
    assert "pip install 'tripletkit[dashboard]'" in said


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
