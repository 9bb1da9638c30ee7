"""Messages to a webhook: one per ending, never the job's problem, and the address stays a secret."""

import http.server
import json
import multiprocessing
import signal
import socket
import stat
import threading
from dataclasses import asdict, replace

import pytest

from tests import toy
from tripletkit import config as configuration
from tripletkit import endings, fsio, notify, stages, submission, worker
from tripletkit.cluster import jobs, launch, preempt
from tripletkit.config import Config
from tripletkit.errors import REQUEUE, ConfigError, Interrupted
from tripletkit.paths import LogPaths, run_paths

TOKEN = "T0/B1/correct-horse"


class Hook:
    """A webhook: answers with these (status, headers) in turn, the last one for ever."""

    def __init__(self, *answers: int | tuple[int, dict]) -> None:
        self.got: list[tuple[str, dict]] = []
        self.left = [each if isinstance(each, tuple) else (each, {}) for each in answers]
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"].startswith("application/json")
                hook.got.append((self.path, json.loads(body)))
                status, headers = hook.left[0]
                hook.left = hook.left[1:] or hook.left
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - a redirect that is followed comes as this

            def log_message(self, *_args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{TOKEN}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Hook":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the address is kept; tries follow each other at once."""
    monkeypatch.setattr(notify, "PAUSE", 0.0)
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    return tmp_path / "study" / ".webhook"


def send(file, url: str) -> bool:
    notify.keep(file, url)
    return notify.send(file, "study fonts: done", {"event": "study", "best_value": 0.5})


def test_a_message_has_text_and_facts_and_its_file_is_gone(file, caplog):
    with Hook(200) as hook:
        assert send(file, hook.url)
    facts = {"event": "study", "best_value": 0.5}
    assert hook.got == [(f"/services/{TOKEN}", {"text": "study fonts: done", "tripletkit": facts})]
    assert list(file.parent.iterdir()) == []
    assert TOKEN not in caplog.text
    assert not notify.send(file, "again", {}), "there is one message per ending"
    assert len(hook.got) == 1


def test_the_file_is_for_its_user_alone(file):
    file.parent.mkdir()
    file.write_text("http://127.0.0.1/old")
    file.chmod(0o644)
    notify.keep(file, "https://example.org/new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "https://example.org/new\n"
    assert list(file.parent.iterdir()) == [file]


def _send(file, start, sent) -> None:
    start.wait()
    if notify.send(file, "done", {}):
        sent.put(1)


def test_of_several_processes_one_sends(file):
    """Workers that end at once, and the job behind them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_notify"])
    start, sent = context.Barrier(6), context.Queue()
    with Hook(200) as hook:
        notify.keep(file, hook.url)
        family = [context.Process(target=_send, args=(file, start, sent)) for _ in range(6)]
        for each in family:
            each.start()
        for each in family:
            each.join()
            assert each.exitcode == 0
    assert len(hook.got) == 1
    assert sent.get(timeout=60) == 1
    assert sent.empty()


@pytest.mark.parametrize(
    ("answers", "arrives", "tries"),
    [
        ([500, 200], True, 2),
        ([503, 429, 200], True, 3),
        ([500], False, 3),
        ([404], False, 1),
        ([204], True, 1),
    ],
)
def test_what_may_pass_is_tried_three_times(file, caplog, answers, arrives, tries):
    with Hook(*answers) as hook:
        assert send(file, hook.url) is arrives
    assert len(hook.got) == tries
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    expected = f"the webhook at 127.0.0.1 did not get the message: HTTP {answers[-1]}"
    assert warnings == ([] if arrives else [expected])
    assert not file.exists()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_it_follows_no_redirect(file, caplog, status):
    """The token is for one host, and a POST would become a GET without the message."""
    with Hook(200) as other:
        there = other.url.replace("127.0.0.1", "localhost") + "?secret"
        with Hook((status, {"Location": there})) as hook:
            assert not send(file, hook.url)
    assert len(hook.got) == 1
    assert other.got == []
    assert f"HTTP {status}: it redirects to localhost" in caplog.text
    assert "secret" not in caplog.text
    assert TOKEN not in caplog.text


def test_one_that_does_not_answer_is_given_up(file, caplog, monkeypatch):
    monkeypatch.setattr(notify, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert not send(file, f"http://127.0.0.1:{port}/{TOKEN}")
    assert "the webhook at 127.0.0.1 did not get the message: no answer within 0.2 s" in caplog.text
    assert TOKEN not in caplog.text


def test_whatever_hangs_the_job_goes_on(file, caplog, monkeypatch):
    """Not every part of a connection has a time limit of its own; looking up a name has none."""
    over = threading.Event()
    monkeypatch.setattr(notify, "_post", lambda *_: (False, over.wait() and ""))
    monkeypatch.setattr(notify, "PATIENCE", 0.2)
    try:
        assert not send(file, f"https://nowhere.invalid/{TOKEN}")
    finally:
        over.set()
    assert "the webhook at nowhere.invalid did not get the message: no answer" in caplog.text


def test_nobody_there(file, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert not send(file, f"http://127.0.0.1:{port}/{TOKEN}")
    assert "did not get the message: Connection refused" in caplog.text


def test_what_a_connection_raises_is_a_warning_that_does_not_repeat_it(file, caplog, monkeypatch):
    def fails(*_args, **_more):
        raise ValueError(f"what is {TOKEN}?")

    monkeypatch.setattr(notify.urllib.request.OpenerDirector, "open", fails)
    assert not send(file, f"https://example.org/{TOKEN}")
    assert "the webhook at example.org did not get the message: it cannot be reached" in caplog.text
    assert TOKEN not in caplog.text


def test_a_file_that_cannot_be_read_is_a_warning(file, caplog):
    file.mkdir(parents=True)
    assert not notify.send(file, "done", {})
    assert "did not get the message" in caplog.text


# --- the address -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.slack.com/services/T0/B1/x",
        "https://chat.example.org:8443/hooks/x?y=z",
        "http://127.0.0.1:8065/hooks/x",
        "http://[::1]:8065/hooks/x",
        "http://localhost/x",
        "http://10.1.2.3/x",
    ],
)
def test_addresses(url, monkeypatch, tmp_path):
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    assert notify.address(url) == url
    monkeypatch.setenv(notify.VARIABLE, url)
    assert notify.address(None) == url
    assert notify.address("https://other.example.org/") == "https://other.example.org/"
    (tmp_path / "hook").write_text(url + "\n")
    assert notify.address(str(tmp_path / "hook")) == url


@pytest.mark.parametrize("how", ["option", "file", "variable"])
def test_an_address_on_the_command_line_can_be_read_by_others(how, tmp_path, monkeypatch, caplog):
    url = f"https://example.org/{TOKEN}"
    (tmp_path / "hook").write_text(url)
    monkeypatch.setenv(notify.VARIABLE, url if how == "variable" else "")
    given = {"option": url, "file": str(tmp_path / "hook"), "variable": None}[how]
    assert notify.address(given) == url
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert ["--webhook FILE" in text for text in warnings] == [True] * (how == "option")
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("file", ["/dev/zero", "/dev/full"])
def test_a_file_without_an_end_is_no_address(file):
    with pytest.raises(ConfigError, match="is no address"):
        notify.address(file)


def test_without_one_there_is_none(monkeypatch):
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    assert notify.address(None) is None
    monkeypatch.setenv(notify.VARIABLE, "")
    assert notify.address(None) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://hooks.slack.com/correct-horse", "must begin with https://"),
        ("http://8.8.8.8/correct-horse", "must begin with https://"),
        ("ftp://localhost/correct-horse", "must begin with https://"),
        ("file:///etc/correct-horse", "is no address"),
        ("https:///correct-horse", "is no address"),
        ("https://[correct-horse/", "is no address"),
        ("https://example.org:correct-horse/", "is no address"),
        ("https://example.org/correct-horse a", "is no address"),
        ("https://example.org/correct-horse\tb", "is no address"),
        ("https://example.org/\xe9correct-horse", "is no address"),
        ("https://exa..mple.com/correct-horse", "is no address"),
        (f"https://{64 * 'a'}.com/correct-horse", "is no address"),
        ("https://user:correct-horse@example.org/", "has a user or a password"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_not_repeated(url, words):
    with pytest.raises(ConfigError, match=words) as caught:
        notify.address(url)
    assert "correct-horse" not in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match="nor a file: No such file") as caught:
        notify.address("hooks.slack.com/correct-horse")  # maybe only the beginning is missing
    assert "correct-horse" not in caught.value.message


def test_jobs_do_not_see_the_variable(monkeypatch):
    """Some sites keep the environment of jobs in their accounting."""
    monkeypatch.setenv(notify.VARIABLE, "https://example.org/x")
    assert notify.VARIABLE not in launch.environment()


# --- trainings -------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(notify, "PAUSE", 0.0)
    toy.write_parquet(tmp_path / "train.parquet", buildings=20)
    toy.write_parquet(tmp_path / "val.parquet", buildings=10, first=100)
    return configuration.with_values(
        Config(),
        global_={"scratch_dir": tmp_path, "log_dir": tmp_path / "logs"},
        paths={
            "train_parquet_path": tmp_path / "train.parquet",
            "val_parquet_path": tmp_path / "val.parquet",
            "checkpoint_dir": tmp_path / "run",
        },
        training={"batch_size": 16, "num_epochs": 2, "device": "cpu", "monitor": "map@r"},
        training_model={"hidden_dim": 8, "output_dim": 4},
        slurm={"gpus": 0},
    )


def train(config: Config, url: str | None) -> int:
    return submission.start("train", config, {}, "here", dry_run=False, webhook=url)


def test_a_training_tells_how_it_ended(config):
    with Hook(200) as hook:
        assert train(config, hook.url) == 0
    ((_, message),) = hook.got
    facts = message["tripletkit"]
    assert facts["event"] == "training"
    assert facts["status"] == "done"
    records = [
        json.loads(line)
        for line in run_paths(config.checkpoint_dir).metrics.read_text().splitlines()
    ]
    assert facts["value"] == max(record["map@r"] for record in records)
    assert records[[r["epoch"] for r in records].index(facts["epoch"])]["map@r"] == facts["value"]
    assert message["text"] == f"training run: done, map@r {facts['value']:.4g}"
    assert not run_paths(config.checkpoint_dir).webhook.exists()
    for path in config.checkpoint_dir.parent.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_training_tells_that_it_failed(config):
    toy.write_parquet(config.paths.val_parquet_path, buildings=10, first=100, dim=5)
    with Hook(200) as hook:
        assert train(config, hook.url) != 0
    ((_, message),) = hook.got
    assert message["tripletkit"]["status"] == "failed"
    assert "val.parquet" in message["tripletkit"]["message"]
    assert message["text"].startswith("training run: failed, ")


def test_a_webhook_that_is_away_does_not_change_how_a_training_ends(config, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert train(config, f"http://127.0.0.1:{port}/{TOKEN}") == 0


def test_one_that_is_interrupted_has_not_ended(config, monkeypatch):
    paths = run_paths(config.checkpoint_dir)

    def interrupted(*_args):
        raise Interrupted("stopped")

    monkeypatch.setitem(stages.JOBS, "train", interrupted)
    with Hook(200) as hook:
        notify.keep(paths.webhook, hook.url)
        assert worker.attend("train", config, {}, lambda: True) not in (0, REQUEUE)
    assert hook.got == []
    assert paths.webhook.exists(), "whoever goes on tells the end"


@pytest.mark.parametrize(
    ("fruitless", "cancelled", "status"), [(1, False, None), (2, False, "failed"), (2, True, None)]
)
def test_a_job_that_is_not_started_again_has_ended(
    config, tmp_path, monkeypatch, fruitless, cancelled, status
):
    """After three starts without progress; unless a person stopped it."""
    paths, logs = run_paths(config.checkpoint_dir), LogPaths(config.global_.log_dir)
    monkeypatch.setenv("PATH", str(tmp_path))  # Slurm does not say that it was preempted
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restart in (2, 3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        if restart == 2:
            before = jobs.new_record("7", "train", "train:run", "c.toml")
            fsio.write_json(logs.record("7"), asdict(replace(before, fruitless=fruitless)))

    def interrupted(*_args):
        raise Interrupted("stopped in epoch 1", progress=False)

    monkeypatch.setitem(stages.JOBS, "train", interrupted)
    stop = preempt.Stop()
    stop.signals += [signal.SIGTERM] * cancelled
    with Hook(200) as hook:
        notify.keep(paths.webhook, hook.url)
        code = worker.attend("train", config, {}, stop, "c.toml")
    assert code == (REQUEUE if fruitless == 1 else Interrupted.exit_code)
    told = [message["tripletkit"] for _, message in hook.got]
    assert [facts["status"] for facts in told] == [status] * bool(status)
    assert paths.webhook.exists() == (not told)
    for facts in told:
        assert facts["message"] == "3 starts without progress: stopped in epoch 1"


@pytest.mark.parametrize("url", ["https://example.org/second", None])
@pytest.mark.parametrize("broken", [False, True])
def test_a_second_training_in_the_folder_leaves_the_first_its_webhook(config, url, broken, caplog):
    """Whatever makes it fail, it is not the end of the one that trains there."""
    paths = run_paths(config.checkpoint_dir)
    if broken:
        toy.write_parquet(config.paths.val_parquet_path, buildings=10, first=100, dim=5)
    with Hook(200) as hook, fsio.exclusive_lock(paths.lock):  # by the first one
        notify.keep(paths.webhook, hook.url)
        assert train(config, url) != 0
    assert hook.got == []
    assert paths.webhook.read_text() == hook.url + "\n"
    assert ("no webhook for this one" in caplog.text) == (url is not None)


def test_loss_is_best_when_it_is_small(config, tmp_path):
    paths = run_paths(tmp_path / "run")
    paths.root.mkdir()
    lines = [{"epoch": 0, "raw": {}}, {"epoch": 1, "val_loss": 0.5}, {"epoch": 2, "val_loss": 0.25}]
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert endings._result("val_loss", paths) == {"metric": "val_loss", "value": 0.25, "epoch": 2}
    assert endings._result("map@r", paths)["value"] is None
