"""Two commands at once on the same thing: safe, or refused with a line that says why.

One of them is held at a known place of its work, in a process of its own, while the other comes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests import fleet, toy
from tripletkit import cli, fsio, inputs
from tripletkit import config as configuration
from tripletkit.data import store
from tripletkit.errors import ConfigError, DataError, RunError
from tripletkit.paths import run_paths
from tripletkit.train import loop
from tripletkit.tune import storage

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.test_concurrency", "torch._dynamo"])


def _work_until(
    place: str, command: Sequence[str], log: Path, pipe: Connection, environ: dict[str, str]
) -> None:
    """A command that waits where a function is called: the first time, or the time behind the #."""
    os.environ.update(environ)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module, _, names = place.partition(":")
    names, _, turn = names.partition("#")
    *owners, name = names.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    real, left = getattr(owner, name), int(turn or 1)

    def held(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            pipe.send("held")
            pipe.recv()
        return real(*arguments, **more)

    setattr(owner, name, held)
    cli.main(command)


class Held:
    """A command in a process of its own, at a place of its work; it goes on when told."""

    def __init__(self, log: Path, place: str, *command: str | Path) -> None:
        self.log = log
        self.pipe, theirs = context.Pipe()
        words = [str(word) for word in command]
        self.process = context.Process(
            target=_work_until, args=(place, words, log, theirs, dict(os.environ))
        )
        self.process.start()
        theirs.close()

    def until_held(self) -> Held:
        try:
            assert self.pipe.poll(300), self.log.read_text()
            self.pipe.recv()
        except EOFError:
            raise AssertionError(self.log.read_text()) from None
        return self

    def go_on(self) -> tuple[int, str]:
        """To its end: the exit code, and what it said."""
        self.let_go()
        return self.end()

    def let_go(self) -> None:
        self.pipe.send("go on")

    def end(self) -> tuple[int, str]:
        self.process.join(300)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode, self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def hold(tmp_path) -> Iterator[Callable[..., Held]]:
    """Starts commands that wait at a place; those still there at the end of the test are killed."""
    started: list[Held] = []

    def start(place: str, *command: str | Path) -> Held:
        started.append(Held(tmp_path / f"held{len(started)}.log", place, *command))
        return started[-1].until_held()

    yield start
    for each in started:
        each.kill()


def call(*command: str | Path) -> int:
    """A command in this process; the exit code."""
    words = [str(word) for word in command]
    return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))


def refused(capsys, *command: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    code = call(*command)
    return code, capsys.readouterr().err


@pytest.fixture
def config(tmp_path) -> Path:
    return fleet.write_config(
        tmp_path,
        paths={
            "difficulty_metadata_path": tmp_path / "bands.parquet",
            "cache_dir": tmp_path / "cache",
            "checkpoint_dir": tmp_path / "run",
        },
        training={"num_epochs": 3},
    )


@pytest.fixture
def plain(tmp_path) -> Path:
    """A configuration without bands."""
    return fleet.write_config(
        tmp_path,
        paths={"cache_dir": tmp_path / "cache", "checkpoint_dir": tmp_path / "run"},
        training={"num_epochs": 3},
    )


def hidden(folder: Path) -> list[str]:
    """What a command should not leave behind."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def trials_of(config: Path) -> list:
    tuning = configuration.load(config, environ={}).tuning
    return storage.open_study(tuning, seed=0, workers=1).study.get_trials()


# --- data ------------------------------------------------------------------------------------


def test_while_bands_are_built_others_do_not_build_them(config, tmp_path, hold, capsys):
    first = hold("tripletkit.data.bands:build_bands", "data", "bands", "-c", config)
    for more in ([], ["--force"]):
        code, said = refused(capsys, "data", "bands", "-c", config, *more)
        assert code == RunError.exit_code
        assert f"another process is building {tmp_path / 'bands.parquet'}" in said
    assert not (tmp_path / "bands.parquet").exists()
    assert first.go_on()[0] == 0
    assert hidden(tmp_path) == []
    assert call("data", "check", "-c", config) == 0
    code, said = refused(capsys, "data", "bands", "-c", config)
    assert code == ConfigError.exit_code
    assert "bands.parquet exists" in said


def test_who_builds_bands_and_is_killed_keeps_nobody_out(config, tmp_path, hold):
    hold("tripletkit.data.bands:_rows_of_metadata", "data", "bands", "-c", config).kill()
    assert any(name.endswith(".tmp") for name in hidden(tmp_path)), "killed while it wrote"
    assert call("data", "bands", "-c", config) == 0
    assert hidden(tmp_path) == []


def buildings(path: Path) -> set[str]:
    return set(pq.read_table(path)["building_id"].to_pylist())


def test_while_data_is_split_others_do_not_split_into_that_folder(tmp_path, hold, capsys):
    toy.write_parquet(tmp_path / "all.parquet", buildings=200)
    out = tmp_path / "out"
    first = hold("tripletkit.data.split:_write", "data", "split", tmp_path / "all.parquet", out)
    code, said = refused(capsys, "data", "split", tmp_path / "all.parquet", out, "--seed", "1")
    assert code == RunError.exit_code
    assert f"another process is splitting into {out}" in said
    assert first.go_on()[0] == 0
    assert {p.name for p in out.iterdir()} == {"train.parquet", "val.parquet", "test.parquet"}
    assert sum(len(pq.read_table(p)) for p in out.iterdir()) == 800


def test_of_several_that_split_at_once_one_does(tmp_path):
    """With different seeds, so that files of two of them would share buildings."""
    toy.write_parquet(tmp_path / "all.parquet", buildings=2000)
    out = tmp_path / "out"
    words = [str(fleet.COMMAND), "data", "split", str(tmp_path / "all.parquet"), str(out), "--seed"]
    several = [
        subprocess.Popen([*words, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    said = [each.communicate(timeout=300)[1] for each in several]
    assert sorted(each.returncode for each in several)[0] == 0
    for each, words in zip(several, said, strict=True):
        if each.returncode:
            assert "another process is splitting" in words or "exists" in words
    assert [each.returncode for each in several].count(0) == 1
    parts = [buildings(out / f"{name}.parquet") for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 2000
    assert hidden(out) == []


def test_what_a_killed_split_left_is_cleared_away(tmp_path, hold):
    toy.write_parquet(tmp_path / "all.parquet", buildings=200)
    words = ("data", "split", tmp_path / "all.parquet", tmp_path / "out")
    hold("tripletkit.fsio:sync_folder", *words).kill()
    assert any(name.endswith(".tmp") for name in hidden(tmp_path / "out"))
    assert call(*words) == 0
    assert hidden(tmp_path / "out") == []


def same_rows_other_vectors(path: Path) -> None:
    toy.write_parquet(path.with_name("new"), buildings=100, images=8, dim=32, noise=1.0, seed=5)
    path.with_name("new").rename(path)


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def fewer_rows(path: Path) -> None:
    toy.write_parquet(path.with_name("new"), buildings=10, images=8, dim=32)
    path.with_name("new").rename(path)


@pytest.mark.parametrize("change", [same_rows_other_vectors, cut_off, fewer_rows, Path.unlink])
def test_a_cache_of_two_files_is_never_kept(plain, tmp_path, hold, change):
    """The ids are read in one pass and the vectors in another: they would be of two files."""
    path = tmp_path / "train.parquet"
    whole = path.read_bytes()
    first = hold("tripletkit.data.embeddings:write_embeddings", "data", "check", "-c", plain)
    change(path)
    code, said = first.go_on()
    assert code == DataError.exit_code, said
    assert f"{path} was changed while it was read" in said
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]

    path.write_bytes(whole)
    found = store.open_store(path, tmp_path / "cache")
    table = pq.read_table(path)
    assert found.ids.to_pylist() == table["streetview_image_id"].to_pylist()
    np.testing.assert_allclose(found.embeddings, toy.vectors_of(table), atol=2e-2)


def test_bands_that_are_replaced_while_they_are_read_are_not_kept(config, tmp_path, hold):
    assert call("data", "bands", "-c", config) == 0
    first = hold("tripletkit.data.bands:_encode", "data", "check", "-c", config)
    assert call("data", "bands", "-c", config, "--neighbors", "5", "--force") == 0
    code, said = first.go_on()
    assert code == DataError.exit_code, said
    assert f"{tmp_path / 'bands.parquet'} was changed while it was read" in said
    assert call("data", "check", "-c", config) == 0


def test_a_file_that_changes_while_it_is_split_gives_no_splits(tmp_path, hold):
    path = tmp_path / "all.parquet"
    toy.write_parquet(path, buildings=200)
    first = hold("tripletkit.data.split:_rows_per_batch", "data", "split", path, tmp_path / "out")
    fewer_rows(path)
    code, said = first.go_on()
    assert code == DataError.exit_code, said
    assert "was changed while it was read" in said
    assert list((tmp_path / "out").iterdir()) == []


# --- trainings -------------------------------------------------------------------------------


def test_a_training_does_not_see_that_its_files_are_replaced(config, tmp_path, hold, capsys):
    assert call("data", "bands", "-c", config) == 0
    assert call("train", "-c", config, "--set", f"paths.checkpoint_dir={tmp_path}/alone") == 0
    first = hold("tripletkit.train.loop:_Run._end_epoch", "train", "-c", config)
    assert call("data", "bands", "-c", config, "--neighbors", "5", "--force") == 0
    same_rows_other_vectors(tmp_path / "train.parquet")
    code, said = first.go_on()
    assert code == 0, said
    alone, other = (run_paths(tmp_path / name) for name in ("alone", "run"))
    assert other.metrics.read_bytes() == alone.metrics.read_bytes()
    # started again, it would be another training
    code, said = refused(capsys, "train", "-c", config, "--set", "training.num_epochs=4")
    assert code == DataError.exit_code
    assert "training embeddings, difficulty bands" in said


def test_in_the_folder_of_a_training_no_other_command_trains(plain, tmp_path, hold, capsys):
    """But all that look at it do their work, and do not change what comes out."""
    assert call("train", "-c", plain, "--set", f"paths.checkpoint_dir={tmp_path}/alone") == 0
    first = hold("tripletkit.train.loop:_Run._end_epoch#2", "train", "-c", plain)
    before = run_paths(tmp_path / "run").metrics.read_bytes()
    code, said = refused(capsys, "train", "-c", plain, "--set", "training.margin=0.1")
    assert code == RunError.exit_code
    assert f"another process is training in {tmp_path / 'run'}" in said
    assert run_paths(tmp_path / "run").metrics.read_bytes() == before
    for command in (
        ("status", "-c", plain),
        ("evaluate", "-c", plain, "--split", "val"),
        ("export", "-c", plain, tmp_path / "head"),
        ("embed", "-c", plain, tmp_path / "val.parquet", tmp_path / "out.parquet"),
    ):
        assert call(*command) == 0, command
    code, said = first.go_on()
    assert code == 0, said
    alone, other = (run_paths(tmp_path / name) for name in ("alone", "run"))
    assert other.metrics.read_bytes() == alone.metrics.read_bytes()


def test_of_two_reruns_of_a_run_one_trains(plain, tmp_path, hold, capsys):
    assert call("train", "-c", plain) == 0
    first = hold("tripletkit.train.loop:_Run.go", "rerun", tmp_path / "run")
    code, said = refused(capsys, "rerun", tmp_path / "run")
    assert code == RunError.exit_code
    assert f"another process is training in {tmp_path / 'run-rerun'}" in said
    code, said = first.go_on()
    assert code == 0, said
    assert "identical" in said


def test_who_only_looks_whether_somebody_trains_keeps_nobody_from_it(plain, tmp_path, monkeypatch):
    """It holds the lock of the folder for a moment."""
    with contextlib.ExitStack() as looking:
        lock = looking.enter_context(fsio.exclusive_lock(run_paths(tmp_path / "run").lock))
        assert lock.ours
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: looking.close())
        monkeypatch.setattr(loop, "time", clock)
        assert call("train", "-c", plain) == 0


# --- studies ---------------------------------------------------------------------------------


def tune(config: Path, *more: str) -> tuple[str | Path, ...]:
    return (
        "tune",
        "-c",
        config,
        "--cluster",
        "here",
        "--n-trials",
        "4",
        "--max-epochs",
        "1",
        *more,
    )


def test_two_that_tune_one_study_share_its_trials(plain, hold):
    first = hold("tripletkit.tune.worker:_Trial.run#2", *tune(plain))
    assert call(*tune(plain)) in (0, 130)  # the last trial is in the hands of the first
    code, said = first.go_on()
    assert code == 0, said
    trials = trials_of(plain)
    assert [(t.number, t.state.name) for t in trials] == [(n, "COMPLETE") for n in range(4)]
    paths = fleet.study_paths(plain)
    assert all(len(fleet.attempts(paths.trial(n))) == 1 for n in range(4))


def test_while_a_trial_is_in_work_the_study_is_not_prepared_otherwise(plain, hold, capsys):
    first = hold("tripletkit.train.loop:_Run.go", *tune(plain))
    before = fleet.study_paths(plain).config.read_bytes()
    code, said = refused(capsys, *tune(plain, "--set", "training.batch_size=32"))
    assert code == ConfigError.exit_code
    assert "has unfinished trials (1)" in said
    assert "training.batch_size was 16, is 32" in said
    assert fleet.study_paths(plain).config.read_bytes() == before
    assert first.go_on()[0] == 0
    assert {t.state.name for t in trials_of(plain)} == {"COMPLETE"}


@pytest.mark.parametrize("done", [0, 1])
def test_a_study_that_is_prepared_otherwise_gets_no_trials_of_before(plain, hold, done):
    """Between two trials, or before the first, nothing is unfinished."""
    other = ("--prepare", "--set", "training.batch_size=32")
    second = hold("tripletkit.tune.storage:_checked", *tune(plain, *other))  # before its turn
    first = hold(f"tripletkit.tune.worker:_prepared_otherwise#{done + 1}", *tune(plain))
    second.let_go()
    fleet.until(
        lambda: "study.db.turn: waiting for it" in second.log.read_text(),
        second.log.read_text,
        deadline=300,
    )
    prepared = configuration.load(fleet.study_paths(plain).config, environ={})
    assert prepared.training.batch_size == 16, "nothing is changed out of turn"
    first.kill()  # in its turn at the study, before it took the trial
    code, said = second.end()
    assert code == 0, said
    assert len(trials_of(plain)) == done
    again = hold("tripletkit.tune.claims:claim", *tune(plain, "--set", "training.batch_size=32"))
    assert call(*tune(plain, "--prepare", "--set", "training.batch_size=64")) == 0
    code, said = again.go_on()
    assert code == 130
    assert "takes no more trials; changed: training.batch_size" in said
    assert len(trials_of(plain)) == done
    assert call("tune", "-c", fleet.study_paths(plain).config, "--cluster", "here") == 0
    sizes = [
        configuration.load(fleet.study_paths(plain).trial(n).config, environ={}).training.batch_size
        for n in range(4)
    ]
    assert sizes == [16] * done + [64] * (4 - done)


def test_ranges_may_change_while_a_worker_works(plain, hold):
    first = hold("tripletkit.train.loop:_Run.go", *tune(plain))
    narrow = ("--set=tuning.space.margin.low=0.2", "--set=tuning.space.margin.high=0.3")
    assert call(*tune(plain, "--prepare", *narrow)) == 0
    assert first.go_on()[0] == 0
    assert len(trials_of(plain)) == 4


def test_submit_best_leaves_a_folder_in_which_somebody_trains_alone(plain, tmp_path, hold, capsys):
    assert call(*tune(plain)) == 0
    best = max(trials_of(plain), key=lambda t: t.value).number
    final = run_paths(tmp_path / "run" / f"best_small_{best:05d}")
    first = hold(
        "tripletkit.train.loop:_Run.go", "train", "-c", plain,
        "--set", f"paths.checkpoint_dir={final.root}",
    )  # fmt: skip
    for cluster in ("here", "local"):
        code, said = refused(capsys, "submit-best", "-c", plain, "--cluster", cluster)
        assert code == RunError.exit_code
        assert f"another process is training in {final.root}" in said
    assert not final.origin.exists()
    assert first.go_on()[0] == 0


def test_the_doctor_and_those_who_look_leave_a_study_at_work_alone(plain, tmp_path):
    fleet.tripletkit(
        "tune", "-c", plain, "--cluster", "local", "--workers", "2", "--n-trials", "6",
        "--max-epochs", "1",
    )  # fmt: skip
    looks = 0
    while {t.state.name for t in trials_of(plain)} != {"COMPLETE"} or len(trials_of(plain)) < 6:
        looks += 1
        call("doctor", "-c", plain, "--fix")
        assert call("status", "-c", plain) == 0
        for trial in trials_of(plain)[:1]:
            call("logs", "-c", plain, str(trial.number))
        assert looks < 1000
    assert call("wait", "-c", plain) == 0
    paths = fleet.study_paths(plain)
    assert all(len(fleet.attempts(paths.trial(n))) == 1 for n in range(6)), "none was handed back"
    assert all(fleet.epochs(paths.trial(n)) == [0, 1] for n in range(6))
    for log in (tmp_path / "logs").glob("tune_*.err"):
        assert "another process is training" not in log.read_text()
        assert "taken over" not in log.read_text()


@pytest.mark.parametrize("config_of_the_second", ["the same", "another"])
def test_two_that_send_one_study_to_a_cluster(slurm, plain, config_of_the_second):
    """And a third that cancels it while the second submits."""
    words = (
        "tune", "-c", plain, "--cluster", "slurm", "--workers", "2", "--n-trials", "4",
        "--max-epochs", "1",
    )  # fmt: skip
    more = [] if config_of_the_second == "the same" else ["--set", "training.batch_size=32"]
    both = [
        subprocess.Popen(
            [fleet.COMMAND, *map(str, words), *each], stderr=subprocess.PIPE, text=True
        )
        for each in ([], more)
    ]
    said = [each.communicate(timeout=300)[1] for each in both]
    codes = [each.returncode for each in both]
    assert 0 in codes, said
    for code, words_of_it in zip(codes, said, strict=True):
        assert code == 0 or "has unfinished trials" in words_of_it
    logs = configuration.load(plain, environ={}).global_.log_dir
    fleet.wait_for_empty_queue(slurm, logs, deadline=240)
    trials = trials_of(plain)
    assert [(t.number, t.state.name) for t in trials] == [(n, "COMPLETE") for n in range(4)]
    sizes = {
        configuration.load(fleet.study_paths(plain).trial(n).config, environ={}).training.batch_size
        for n in range(4)
    }
    assert len(sizes) == 1, "the trials of one study compare"


def test_cancelled_while_it_is_submitted_a_study_rests(slurm, plain, hold):
    """The workers are in the queue, the small job behind them is not yet."""
    words = ("--cluster", "slurm", "--workers", "2", "--n-trials", "2", "--max-epochs", "1")
    first = hold("tripletkit.submission:_submit#2", "tune", "-c", plain, *words)
    assert call("cancel", "-c", plain, "small") == 0
    code, said = first.go_on()
    assert code == 0, said
    logs = configuration.load(plain, environ={}).global_.log_dir
    fleet.wait_for_empty_queue(slurm, logs, deadline=240)
    assert "RUNNING" not in {t.state.name for t in trials_of(plain)}
    assert call(*tune(plain)) == 0
    assert [t.state.name for t in trials_of(plain)] == ["COMPLETE"] * 4


# --- locks -----------------------------------------------------------------------------------


def test_a_lock_that_passes_is_held_by_one_and_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    with fsio.passing_lock(path) as mine:
        assert mine == fsio.Lock(ours=True, sure=True)
        with fsio.passing_lock(path) as theirs:
            assert not theirs.ours
        assert path.exists(), "who did not get it leaves it alone"
    assert not path.exists()


COUNTS = """
import sys, time
from pathlib import Path
from tripletkit import fsio
lock, counter = map(Path, sys.argv[1:])
got = 0
while got < 200:
    with fsio.passing_lock(lock) as held:
        if held.ours:
            now = int(counter.read_text() or 0)
            counter.write_text(str(now + 1))
            got += 1
"""


def test_a_lock_whose_file_goes_is_still_held_by_one_at_a_time(tmp_path):
    """Who opened the file just before it was removed would hold a lock that nobody else sees."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    several = [
        subprocess.Popen([sys.executable, "-c", COUNTS, tmp_path / "lock", counter])
        for _ in range(3)
    ]
    assert [each.wait(300) for each in several] == [0, 0, 0]
    assert counter.read_text() == "600"
    assert json.loads(counter.read_text()) == 3 * 200


def test_of_one_process_two_may_open_the_same_data(plain):
    loaded = configuration.load(plain, environ={})
    first, second = (inputs.training_data(loaded) for _ in range(2))
    assert first.train.fingerprint == second.train.fingerprint
