"""Chaos in short, and what it has found, each as a small test."""

import contextlib
import errno
import itertools
import os
import subprocess
import sys

import pytest

from tests import fleet
from tests.chaos import draw
from tests.chaos.__main__ import run
from tests.chaos.world import CLOCK
from tests.test_tune_worker import (  # noqa: F401 - fixtures
    config,
    files,
    fork,
    me,
    metrics_of,
    one_thread,
    prepare,
    stop_after,
    trials_of,
    uninterrupted,
    work,
)
from tripletkit import config as configuration
from tripletkit import fsio, stages
from tripletkit.config import Tuning, with_values
from tripletkit.errors import RunError
from tripletkit.tune import claims, storage
from tripletkit.tune.claims import Worker

SEED = 5

pytest_plugins = ["tests.small_disk"]


def test_a_seed_draws_the_same_faults_and_each_kind_in_every_round():
    rounds = 3 * len(draw.KINDS)

    def drawn(seed: int) -> list[draw.Fault]:
        return list(itertools.islice(draw.faults(seed), rounds))

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    for start in range(0, rounds, len(draw.KINDS)):
        kinds = [fault.kind for fault in drawn(7)[start : start + len(draw.KINDS)]]
        assert sorted(kinds) == sorted(draw.KINDS)


def test_whatever_happens_to_a_study_in_a_minute(slurm, tmp_path):
    """One of each cheap kind. `make chaos` is the long one, with all kinds."""
    order = itertools.islice(draw.faults(SEED, draw.CHEAP), len(draw.CHEAP))
    again = f'make chaos CHAOS="--seed {SEED} --rounds 1 --only {" ".join(draw.CHEAP)}"'
    assert (
        run(tmp_path / "world", slurm, SEED, order, seconds=float("inf"), again=again, short=True)
        == 0
    )


def test_a_full_disk_hands_the_trial_back_and_with_room_it_goes_on(config, disk, tmp_path, caplog):  # noqa: F811
    config = with_values(config, tuning={"output_dir": disk.folder / "trials"})
    shared = prepare(config)
    steps = stop_after(30)

    def fill_when_under_way() -> bool:
        if steps() and not disk.filler.exists():
            disk.fill()
        return False

    with pytest.raises(RunError) as raised:
        work(config, should_stop=fill_when_under_way)
    assert str(stages.study_paths(config).trial(0).last) in raised.value.message
    assert "No space left on device" in raised.value.message
    assert trials_of(shared)[0].state.name == "WAITING"  # though its folder cannot be written to
    assert "cannot note that the attempt ended" in caplog.text
    disk.make_room()
    assert work(config, me("2")).ended == ["complete", "complete"]
    whole = uninterrupted(config, 0, trials_of(shared)[0].params, tmp_path / "whole")
    assert stages.study_paths(config).trial(0).metrics.read_bytes() == whole
    assert not list(disk.folder.rglob("*.tmp"))


def test_a_log_on_a_full_disk_says_so_once_elsewhere_and_goes_on_when_there_is_room(disk):
    """In a process of its own: what logging itself prints goes to its stderr."""
    script = """
import sys
from pathlib import Path
from tests.small_disk import Disk
from tripletkit import log
log.setup(plain=True)
disk = Disk(Path(sys.argv[1]))
with log.also_to(disk.folder / "train.log"):
    log.logger.info("before")
    disk.fill()
    for number in range(600):
        log.logger.info("lost %d %s", number, "x" * 99)
    disk.make_room()
    log.logger.info("after")
    disk.fill()
    log.logger.info("at the end")
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, disk.folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == "done\n"
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stderr
    assert done.stderr.count("train.log loses lines: No space left on device") == 1
    assert done.stderr.count("lost ") == 600
    kept = (disk.folder / "train.log").read_text()
    assert "before\n" in kept
    assert "after\n" in kept


def test_a_full_disk_is_named_by_the_file_that_did_not_fit(disk):
    kept = disk.folder / "kept.json"
    kept.write_text("old")
    disk.fill()
    with pytest.raises(OSError, match="No space left on device") as raised:
        fsio.write_json(kept, ["x" * 9999])
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(kept)
    assert kept.read_text() == "old"
    assert not list(disk.folder.glob(".*"))


@pytest.mark.parametrize("torn", ["half", "zeros", "empty"])
def test_a_trial_whose_checkpoints_are_all_torn_starts_over_to_the_same_bytes(
    config, tmp_path, caplog, torn  # noqa: F811
):  # fmt: skip
    """Else every worker of the fleet would take it, and die of it."""
    shared = prepare(config)
    work(config, me("1"), should_stop=stop_after(30))
    paths = stages.study_paths(config).trial(0)
    assert paths.saved()
    for path in paths.saved():
        size = path.stat().st_size
        whole = path.read_bytes()
        path.write_bytes({"half": whole[: size // 2], "zeros": bytes(size), "empty": b""}[torn])
    assert work(config, me("2")).ended == ["complete", "complete"]
    assert "no checkpoint is whole: starting it over" in caplog.text
    trial = trials_of(shared)[0]
    assert sorted(trial.intermediate_values) == [r["epoch"] for r in metrics_of(config, 0)]
    assert paths.metrics.read_bytes() == uninterrupted(config, 0, trial.params, tmp_path / "whole")


def test_a_checkpoint_of_zeros_is_passed_over_like_any_torn_one(config, tmp_path):  # noqa: F811
    """A file whose length reached the disk before a power cut, and its content did not."""
    shared = prepare(config)
    work(config, me("1"), should_stop=stop_after(30))
    paths = stages.study_paths(config).trial(0)
    assert len(paths.saved()) > 1
    paths.last.write_bytes(bytes(paths.last.stat().st_size))
    assert work(config, me("2")).ended == ["complete", "complete"]
    params = trials_of(shared)[0].params
    assert paths.metrics.read_bytes() == uninterrupted(config, 0, params, tmp_path / "whole")


def write_much(job: str, tuning: Tuning) -> None:
    """A worker without training: claims, reports and results, one after the other."""
    shared = storage.open_study(tuning, seed=int(job), workers=16)
    who = Worker(job=job, restart=0, host="n1", pid=0)
    while found := claims.claim(shared, who, 32, lambda jobs: dict.fromkeys(jobs, "running")):
        for epoch in range(3):
            found.trial.report(float(job), epoch)
        shared.study.tell(found.trial, float(job))


def test_sixteen_writers_of_one_sqlite_file_lose_nothing(tmp_path):
    tuning = Tuning(storage_path=tmp_path / "study.db", sampler="random")
    shared = storage.create(tuning)
    writers = [fork.Process(target=write_much, args=(str(job), tuning)) for job in range(16)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    trials = trials_of(shared)
    assert [(t.number, t.state.name) for t in trials] == [(n, "COMPLETE") for n in range(32)]
    for trial in trials:  # by one worker each, from its first word to its last
        job = float(trial.user_attrs[claims.OWNER]["job"])
        assert trial.value == job
        assert trial.intermediate_values == dict.fromkeys(range(3), job)


# A worker that stays in the first epoch of its trial for as long as a file is there.
HELD = """
import sys, time
from pathlib import Path
from tripletkit import worker
from tripletkit.train import loop

hold, train = Path(sys.argv[1]), loop.train


def held(*arguments, report, **more):
    def report_and_wait(epoch, metrics):
        report(epoch, metrics)
        while epoch == 1 and hold.exists():
            time.sleep(0.1)

    return train(*arguments, report=report_and_wait, **more)


loop.train = held
worker.main(sys.argv[2:])
"""


def test_clocks_that_are_hours_apart_take_no_trial_from_a_living_worker(tmp_path):
    """The clock of the first worker is an hour fast, that of the second an hour slow."""
    path = fleet.write_config(
        tmp_path,
        tuning={"n_trials": 2, "max_epochs": 4},
        training={"checkpoint_every_minutes": 0.01},
    )
    prepared = fleet.tripletkit("tune", "-c", path, "--cluster", "local", "--prepare").split()[-1]
    clock = tmp_path / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(CLOCK)
    hold = tmp_path / "hold"
    hold.touch()

    def start(node: str) -> subprocess.Popen:
        told = {"PYTHONPATH": str(clock), "SLURMD_NODENAME": node, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", HELD, hold, "tune", "--config", prepared],
            env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    tuning = configuration.load(path, environ={}).tuning

    def at_work(number: int) -> bool:
        trials = trials_of(storage.open_study(tuning, seed=0, workers=1))
        return len(trials) > number and 1 in trials[number].intermediate_values

    with contextlib.ExitStack() as stack:
        fast = start("n2")
        stack.callback(fast.kill)
        fleet.until(lambda: at_work(0), lambda: "no trial", deadline=240)
        slow = start("n3")
        stack.callback(slow.kill)
        fleet.until(lambda: at_work(1), lambda: "no second trial", deadline=240)
        fast.kill()
        fast.communicate()
        hold.unlink()
        output = slow.communicate()[0]
    assert slow.returncode == 0, output
    trials = trials_of(storage.open_study(tuning, seed=0, workers=1))
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE"]
    killed, second = (fleet.attempts(fleet.study_paths(path).trial(n)) for n in (0, 1))
    assert [each["pid"] for each in killed] == [fast.pid, slow.pid]
    assert [each["pid"] for each in second] == [slow.pid]
    assert killed[0]["started"] > killed[1]["started"], "the later attempt has the earlier date"
    assert fleet.epochs(fleet.study_paths(path).trial(0)) == list(range(5))
