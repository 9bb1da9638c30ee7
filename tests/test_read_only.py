"""A project in a folder that is not ours to write in: what reads works, what writes says what to do."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fleet
from tests.test_doctor import WORKER, process
from tests.test_status import claim as claimed
from tests.test_status import no_slurm, prepare, record, runner, write_config
from tripletkit import cli, fsio, inputs
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.errors import RunError
from tripletkit.paths import LogPaths

__all__ = ["no_slurm"]
NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """Where another user may look, other than below tmp_path."""
    with tempfile.TemporaryDirectory(prefix="shared_") as name:
        Path(name).chmod(0o755)
        yield Path(name)
        for folder in Path(name).rglob("*/"):
            folder.chmod(0o755)


@contextlib.contextmanager
def as_a_reader(place: Path) -> Iterator[None]:
    """Be somebody who may read there and write nothing."""
    everything = [place, *place.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in everything:
            with contextlib.suppress(FileNotFoundError):
                path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def run(monkeypatch, capsys):
    call = runner(monkeypatch, capsys)

    def as_reader(place: Path, config: Config, *arguments: str):
        call(config, "--version")  # writes the file
        call(config, *arguments)  # loads what it needs
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        words = [*arguments, "--config", str(config.global_.log_dir.parent / "given.toml")]
        capsys.readouterr()
        with as_a_reader(place):
            code = cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))
        after = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        assert after == before
        return code, *capsys.readouterr()

    return as_reader


@pytest.mark.parametrize("open_", [True, False])
@pytest.mark.parametrize("command", ["status", "logs", "study", "why", "doctor"])
def test_what_only_reads_works(place, no_slurm, run, command, open_):
    """While a worker has the database open, and when nobody has: then SQLite leaves no files."""
    config = write_config(place)
    shared = prepare(config)
    found = claimed(shared, "local-999999", {1: 0.5})
    shared.study.tell(found.trial, 0.5)
    record(config, "local-999999", "tune:s", exit_code=0)
    logs = LogPaths(config.global_.log_dir)
    logs.err("tune", "local-999999").write_text("done\n")
    logs.lock("local-999999").touch()
    if not open_:
        shared.study._storage.storage.remove_session()
        shared.study._storage.storage._backend.engine.dispose()
    assert config.tuning.storage_path.with_name("study.db-wal").exists() == open_
    words = {"study": ["study", "best"], "why": ["why", "0"]}.get(command, [command])
    code, out, err = run(place, config, *words)
    shown = {"status": "1 complete", "logs": "done", "study": "trial 0", "doctor": "global.log_dir"}
    assert shown.get(command, "trial 0 is complete") in out
    if command == "doctor":
        assert "storage" not in out
    else:
        assert (code, err) == (0, "")


def test_who_works_there_is_seen_by_its_lock(place, no_slurm, run):
    config = write_config(place)
    shared = prepare(config)
    with process(WORKER, config.global_.log_dir, "tune:s") as (_, job):
        claimed(shared, job)
        code, out, _ = run(place, config, "status", "--json")
    (seen,) = json.loads(out)["jobs"]
    assert (code, seen["id"], seen["state"]) == (0, job, "RUNNING")


def call(file: Path, *words: str) -> int:
    arguments = [*words, "-c", str(file)]
    return cli.run(lambda: cli.app(arguments, prog_name="t", standalone_mode=False))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> None:
    """What the commands import, before they are called as somebody who may not read it."""
    place = tmp_path_factory.mktemp("loaded")
    once = {"n_trials": 1, "max_epochs": 1}
    file = fleet.write_config(place, training={"num_epochs": 1}, tuning=once)
    assert call(file, "train", "--set", f"paths.checkpoint_dir={place}/run") == 0
    assert call(file, "tune", "--cluster", "here") == 0


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("global.log_dir", ["train"]),
        ("paths.checkpoint_dir", ["train", "--set", "global.log_dir={mine}"]),
        ("tuning.output_dir", ["tune", "--cluster", "here"]),
        ("--storage-path", ["tune", "--cluster", "here", "--output-dir", "{mine}"]),
    ],
)
def test_what_writes_names_the_folder_and_the_key(place, loaded, capsys, key, words):
    file = fleet.write_config(
        place, paths={"checkpoint_dir": place / "run"}, training={"num_epochs": 1}
    )
    with tempfile.TemporaryDirectory(prefix="mine_") as mine:
        Path(mine).chmod(0o777)
        words = [word.format(mine=mine) for word in words]
        inputs.training_data(configuration.load(file, environ={}))  # its cache is there
        with as_a_reader(place):
            code = call(file, *words)
        said = capsys.readouterr().err
    assert code in (1, 5), said
    assert "Traceback" not in said
    assert str(place) in said
    (hint,) = [line for line in said.splitlines() if line.startswith("hint: ")]
    assert key in hint


def test_a_lock_can_be_seen_held_where_nobody_may_write(place):
    path = place / "lock"
    path.touch()
    with as_a_reader(place):
        with fsio.exclusive_lock(path, wait=False) as first:
            assert first.ours
            with fsio.exclusive_lock(path, wait=False) as second:
                assert not second.ours
        with pytest.raises(PermissionError), fsio.exclusive_lock(place / "none", wait=False):
            pass


def test_a_folder_that_is_to_be_made_is_looked_at_where_it_would_be(place):
    fsio.check_writable(place / "a" / "b", "elsewhere")
    assert list(place.iterdir()) == []
    with as_a_reader(place), pytest.raises(RunError, match="cannot write to") as caught:
        fsio.check_writable(place / "a" / "b", "elsewhere")
    assert (str(place) in caught.value.message, caught.value.hint) == (True, "elsewhere")
