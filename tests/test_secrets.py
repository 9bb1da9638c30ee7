"""The password of the database, the key of W&B and the token of a webhook: nowhere else, ever."""

import base64
import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from tests import fleet
from tests.cluster import ACCOUNT
from tests.test_notify import Hook
from tripletkit import cli
from tripletkit import config as configuration
from tripletkit.errors import ConfigError
from tripletkit.paths import run_paths

pytest_plugins = ["tests.postgres"]

# Each would look different in an address, in a shell, and in what a program packs.
PASSWORD = "Zauberwort+PG 4711/x@y%41"
WRONG = "Falschwort+PG 0815/x@y%41"
KEY = "zauberwandbkey4711" * 3
TOKEN = "zauberhook4711/B00+x%2Fy"


def forms(secret: str) -> set[bytes]:
    """The secret as it is, encoded for an address, and in base64, wherever it begins in there."""
    raw = secret.encode()
    found = {
        raw,
        quote(secret, safe="").encode(),
        quote_plus(secret).encode(),
        quote(secret).encode(),
    }
    found |= {json.dumps(secret)[1:-1].encode(), repr(secret)[1:-1].encode()}
    for shift in range(3):  # whole groups of three bytes: they do not depend on what is around
        whole = raw[shift : shift + (len(raw) - shift) // 3 * 3]
        found |= {base64.b64encode(whole), base64.urlsafe_b64encode(whole)}
    return found


FORMS = {form: each for each in (PASSWORD, WRONG, KEY, TOKEN) for form in forms(each)}
ANY = re.compile(b"|".join(map(re.escape, FORMS)))


def told(what: bytes | str) -> set[str]:
    """The secrets in it, in whatever form."""
    data = what.encode() if isinstance(what, str) else what
    return {FORMS[each] for each in ANY.findall(data)}


@pytest.mark.parametrize("secret", [PASSWORD, KEY, TOKEN])
@pytest.mark.parametrize("before", ["", "a", "ab"])
def test_the_search_finds_what_it_is_for(secret, before):
    for packed in (
        f"{before}{secret}.", quote(before + secret), quote_plus(secret + before),
        base64.b64encode(f"{before}{secret}zz".encode()), json.dumps({"x": before + secret}),
    ):  # fmt: skip
        assert told(packed) == {secret}


class Watch:
    """What every process of this machine shows to others, for as long as the block lasts."""

    def __init__(self) -> None:
        self.lines: set[bytes] = set()
        self.environments: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    self.lines.add((process / "cmdline").read_bytes())
                    about = (process / "environ").read_bytes()
                    if b"SLURM_JOB_ID=" in about:
                        self.environments.add(about)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def say(capsys) -> Callable[..., str]:
    """Runs a command in this process; returns all that it said."""

    def call(*arguments: str | Path, code: int | None = 0) -> str:
        words = list(map(str, arguments))
        capsys.readouterr()
        ended = cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))
        captured = capsys.readouterr()
        assert code is None or ended == code, captured.out + captured.err
        return captured.out + captured.err

    return call


def password_file(path: Path, secret: str) -> str:
    path.touch(0o600)
    escaped = secret.replace("\\", r"\\").replace(":", r"\:")
    path.write_text(f"*:*:*:*:{escaped}\n")
    return str(path)


@pytest.fixture
def site(tmp_path, monkeypatch, start_postgres) -> Iterator[tuple]:
    """A PostgreSQL with a password, and an environment that holds every secret."""
    server = start_postgres(password=PASSWORD)
    monkeypatch.setenv("PGPASSFILE", password_file(tmp_path / "pgpass", PASSWORD))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    with Hook(200) as hook:
        monkeypatch.setenv("TRIPLETKIT_WEBHOOK", f"{hook.url}/{TOKEN}")
        yield server, hook


def config_with_wandb(folder: Path, **changes) -> Path:
    file = fleet.write_config(folder, **changes)
    logging = {"wandb_enabled": True, "wandb_mode": "offline"}
    config = configuration.with_values(configuration.load(file, environ={}), logging=logging)
    file.write_text(configuration.dump(config))
    return file


def slurm_says(slurm) -> Iterator[str]:
    """All that Slurm tells of jobs."""
    yield slurm.run("scontrol", "show", "job", "--details")
    yield slurm.run("sacct", "--allusers", "--duplicates", "--format=ALL", "--parsable2")
    yield slurm.run(
        "squeue", "--states=all", "--Format=Name:200,Comment:200,Command:400,WorkDir:400"
    )
    for job in set(slurm.run("squeue", "--states=all", "--noheader", "--format=%F").split()):
        yield subprocess.run(
            ["scontrol", "write", "batch_script", job, "-"], capture_output=True, text=True,
            env=slurm.environment,
        ).stdout  # fmt: skip


def test_on_a_cluster_no_secret_is_anywhere_but_in_its_file(
    slurm, tmp_path, site, say, monkeypatch
):
    server, hook = site
    config = config_with_wandb(
        tmp_path,
        training={"num_epochs": 1},
        tuning={"storage_url": server.database(), "n_trials": 2, "max_epochs": 1, "workers": 2},
        slurm={"mem": "1000M"},
    )
    at = ("-c", config)
    cluster = (*at, "--cluster", "slurm", "--account", ACCOUNT)
    said = {}

    def keep(*command, code: int | None = 0) -> str:
        said[" ".join(map(str, command))] = text = say(*command, code=code)
        return text

    with Watch() as watch:
        keep("-v", "tune", *cluster, "--dry-run")
        keep("-v", "tune", *cluster)
        address = tmp_path / "trials/small/.webhook"
        assert stat.S_IMODE(address.stat().st_mode) == 0o600
        for command in (("status", "--json"), ("-v", "doctor"), ("logs", "0")):
            keep(*command, *at, code=None)
        keep("wait", *at, "--timeout", "400")
        best = keep("-v", "submit-best", *cluster)
        fleet.wait_for_empty_queue(slurm, tmp_path / "logs", deadline=300)
        run = Path(re.search(r"checkpoints: (.*)", best)[1])
        assert run_paths(run).final.exists()

        # What is made of it, and what goes wrong.
        of_run = (*at, "--set", f"paths.checkpoint_dir={run}")
        keep("logs", "0", *at)
        keep("why", "0", *at)
        keep("report", "small", *at)
        keep("export", tmp_path / "head", *of_run, "--format", "safetensors")
        keep("embed", tmp_path / "val.parquet", tmp_path / "out.parquet", *of_run)
        keep("diff", run, tmp_path / "trials/small/trial_00000")
        keep("diff", run, tmp_path / "trials/small/trial_00000", "--json")
        broken = ("--study-name", "broken", "--set", "training.device=cuda", "--cluster", "here")
        keep("-v", "tune", *at, *broken, "--n-trials", "1", code=None)
        address_with_it = f"postgresql://me:{quote(PASSWORD, safe='')}@127.0.0.1/db"
        keep("status", *at, "--storage-url", address_with_it, code=2)
        monkeypatch.setenv("PGPASSFILE", password_file(tmp_path / "wrong", WRONG))
        keep("-v", "status", *at)  # of the jobs
        keep("-v", "doctor", "--json", *at, code=None)
        monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
        server.stop()
        keep("-v", "tune", *at, "--cluster", "here", code=5)
        keep("-v", "doctor", *at, code=None)

    assert hook.got, "the webhook was told, by a job that has its address from a file"
    assert all(path == f"/hook/{TOKEN}" or path.endswith(TOKEN) for path, _ in hook.got)
    messages = "".join(json.dumps(message) for _, message in hook.got)
    texts = {**said, "messages": messages} | dict(enumerate(slurm_says(slurm)))
    assert {what: told(text) for what, text in texts.items() if told(text)} == {}
    assert [line for line in watch.lines if told(line)] == []
    assert len(watch.environments) > 2
    assert not [each for each in watch.environments if told(each) - {KEY}]
    files = [path for top in (tmp_path, server.folder) for path in top.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert {path.name: told(path.read_bytes()) for path in files if told(path.read_bytes())} == {
        "pgpass": {PASSWORD},
        "wrong": {WRONG},
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_gets_the_command_without_its_secrets(tmp_path):
    """It sends the words of the command to its server; nobody says `--webhook ADDRESS` for that."""
    config = config_with_wandb(tmp_path, training={"num_epochs": 0})
    with Hook(200) as hook:
        url = f"{hook.url}/{TOKEN}"
        subprocess.run(
            [fleet.COMMAND, "train", "-c", config, "--webhook", url], check=True,
            capture_output=True, cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
    (log,) = tmp_path.glob("checkpoints/wandb/offline-run-*/run-*.wandb")
    assert b"--webhook" in log.read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files if told(path.read_bytes())] == []


def test_the_completion_of_a_shell_holds_nothing(tmp_path):
    """It runs in the user's shell, with everything in its environment."""
    environment = {
        **os.environ,
        "WANDB_API_KEY": KEY,
        "TRIPLETKIT_WEBHOOK": f"https://h.example/{TOKEN}",
    }
    for asked in ({"_TRIPLETKIT_COMPLETE": "source_bash"},
                  {"_TRIPLETKIT_COMPLETE": "complete_bash", "COMP_WORDS": "tripletkit tune --w",
                   "COMP_CWORD": "2"}):  # fmt: skip
        done = subprocess.run(
            [Path(sys.executable).with_name("tripletkit")], env=environment | asked, cwd=tmp_path,
            capture_output=True,
        )  # fmt: skip
        assert done.stdout
        assert told(done.stdout + done.stderr) == set()


def test_a_message_of_the_configuration_repeats_no_secret(tmp_path):
    file = tmp_path / "config.toml"
    for key, value in (
        ("storage_url", f"postgresql://me:{quote(PASSWORD)}@h/d"),
        ("storage_url", f"mysql://{TOKEN}@h/d"),
        ("storage_path", f"postgresql://me:{PASSWORD}@h/d"),
    ):
        file.write_text(f"[tuning]\n{key} = {json.dumps(value)}\n")
        with pytest.raises(ConfigError) as caught:
            configuration.load(file, environ={})
        assert told(f"{caught.value!r} {caught.value.message} {caught.value.hint}") == set()
