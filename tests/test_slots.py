"""Several trials at once in one job: exact totals, whatever happens to one of its processes."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import fleet
from tripletkit import config as configuration
from tripletkit import processes, slots, stages, submission
from tripletkit.cluster import preempt, resources
from tripletkit.config import Config
from tripletkit.errors import DataError, Interrupted, RunError
from tripletkit.paths import TrialPaths
from tripletkit.tune import claims, storage
from tripletkit.tune.worker import Summary


def study_of(config: Path):
    tuning = configuration.load(config, environ={}).tuning
    return storage.open_study(tuning, seed=0, workers=1, patience=0).study


def trial_paths(config: Path, number: int) -> TrialPaths:
    return fleet.study_paths(config).trial(number)


def owner_of(trial) -> dict:
    return trial.user_attrs[claims.OWNER]


@contextmanager
def tuning(config: Path, *flags: str):
    """`tripletkit tune` in this terminal; ended by force if the test goes wrong."""
    with output(config).open("w") as file, subprocess.Popen(
        [fleet.COMMAND, "tune", "-c", config, "--cluster", "here", *flags],
        stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def output(config: Path) -> Path:
    return config.with_suffix(".out")


def until(what, config: Path) -> None:
    fleet.until(what, output(config).read_text, deadline=120)


def end_of(process, config: Path, code: int = 0) -> str:
    """What it said, when it has ended."""
    until(lambda: process.poll() is not None, config)
    said = output(config).read_text()
    assert process.returncode == code, said
    return said


def at_work(config: Path, *, epoch: int) -> dict[int, tuple[int, int]]:
    """Trial and process of each slot that has come to this epoch. Read from files, which is quick."""
    found = {}
    for number in range(3):  # the first ones
        paths = trial_paths(config, number)
        if paths.metrics.exists() and paths.metrics.read_text().count("\n") > epoch:
            last = fleet.attempts(paths)[-1]
            if "outcome" not in last:
                found[last["slot"]] = number, last["pid"]
    return found


def assert_exact(config: Path, total: int, epochs: int) -> list:
    """Each trial of the total is complete, and each of its epochs was trained once."""
    trials = study_of(config).get_trials()
    assert [t.number for t in trials] == list(range(total))
    assert {t.state.name for t in trials} == {"COMPLETE"}
    for trial in trials:
        assert fleet.epochs(trial_paths(config, trial.number)) == list(range(epochs + 1))
    return trials


def test_the_total_is_exact_and_a_slot_that_is_killed_goes_on_with_its_trial(tmp_path):
    config = fleet.write_config(
        tmp_path,
        tuning={"n_trials": 5, "max_epochs": 8},
        training={"checkpoint_every_minutes": 0.001},
    )
    with tuning(config, "--trials-per-gpu", "3") as process:
        until(lambda: 1 in at_work(config, epoch=2), config)
        killed, pid = at_work(config, epoch=2)[1]
        os.kill(pid, signal.SIGKILL)
        said = end_of(process, config)
    assert "process 1 of this job died (SIGKILL): starting it again" in said
    assert "study small; trials of this worker: " in said
    trials = assert_exact(config, total=5, epochs=8)
    assert len({t.params["margin"] for t in trials}) == 5, "no two have proposed the same"
    attempts = {t.number: fleet.attempts(trial_paths(config, t.number)) for t in trials}
    assert {each[-1]["slot"] for each in attempts.values()} == {0, 1, 2}
    assert len({each[-1]["job"] for each in attempts.values()}) == 1

    first, second = attempts.pop(killed)
    assert "outcome" not in first
    assert (first["slot"], second["slot"]) == (1, 1)
    assert first["pid"] == pid != second["pid"]
    assert second["from_epoch"] >= 2
    assert all(len(each) == 1 for each in attempts.values())

    for number, (only,) in attempts.items():
        slots_of_log = set(
            re.findall(r"\[slot (\d)\]", trial_paths(config, number).log.read_text())
        )
        assert slots_of_log == {str(only["slot"])}


def test_a_trial_that_kills_its_slot_again_and_again_fails_and_the_others_go_on(tmp_path):
    config = fleet.write_config(tmp_path, tuning={"n_trials": 3, "max_epochs": 2})
    victim = trial_paths(config, 0)

    def starts() -> int:
        return len(fleet.attempts(victim)) if victim.attempts.exists() else 0

    with tuning(config, "--trials-per-gpu", "2") as process:
        for attempt in range(1, 4):
            until(lambda: starts() == attempt, config)  # noqa: B023
            os.kill(fleet.attempts(victim)[-1]["pid"], signal.SIGKILL)
        end_of(process, config)
    trials = study_of(config).get_trials()
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[0].user_attrs[claims.CAUSE]["kind"] == "killed"


def test_a_request_to_stop_reaches_all_slots_and_the_same_command_goes_on(tmp_path):
    config = fleet.write_config(tmp_path, tuning={"n_trials": 3, "max_epochs": 8})
    with tuning(config, "--trials-per-gpu", "2") as process:
        until(lambda: len(at_work(config, epoch=1)) == 2, config)
        process.send_signal(signal.SIGTERM)
        said = end_of(process, config, Interrupted.exit_code)
    assert "study small has trials left" in said
    assert [t.state.name for t in study_of(config).get_trials()] == ["WAITING", "WAITING"]
    assert all(fleet.attempts(trial_paths(config, n))[-1]["outcome"] == "stopped" for n in (0, 1))
    with tuning(config, "--trials-per-gpu", "2") as process:
        end_of(process, config)
    assert_exact(config, total=3, epochs=8)


# Processes


def work(folder: Path, number: int, _stop) -> int:
    """Number 0 is killed twice, 1 fails, 2 is a success that takes longer."""
    starts = folder / f"starts-{number}"
    with starts.open("a") as file:
        file.write("x")
    if number == 0 and len(starts.read_text()) <= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 1:
        raise DataError("row 7 is bad")
    time.sleep(1)
    (folder / f"done-{number}").touch()
    return number


def test_processes_that_do_not_work_together_go_on_without_each_other(tmp_path, caplog):
    works = [functools.partial(work, tmp_path, number) for number in range(3)]
    ended = processes.run(works, [{}] * 3, should_stop=lambda: False, together=False, restarts=2)
    assert [each.result for each in ended] == [0, None, 2]
    with pytest.raises(DataError, match="row 7 is bad"):
        processes.results(ended)
    assert (tmp_path / "starts-0").read_text() == "xxx"
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-2"]
    assert "process 1 of this job ended: row 7 is bad" in caplog.text
    assert caplog.text.count("process 0 of this job died (SIGKILL): starting it again") == 2


class PickyError(Exception):
    """It cannot be read back from its pickle: that calls it with one argument."""

    def __init__(self, row: int, column: str) -> None:
        super().__init__(f"row {row}, column {column}")


def fail(_stop) -> None:
    raise PickyError(7, "x")


def test_an_error_that_cannot_be_sent_is_told_in_words():
    (ended,) = processes.run([fail], [{}], should_stop=lambda: False, together=False, restarts=3)
    with pytest.raises(RuntimeError, match="PickyError: row 7, column x"):
        processes.results([ended])


def test_a_process_gets_no_signal_before_it_is_ready(tmp_path):
    """Of a parent that has not started any of Python's helpers yet."""
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, signal\n"
        "from tripletkit import processes\n"
        "def blocked(answer):\n"
        "    answer.send(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    for _ in range(2):\n"
        "        here, there = spawn.Pipe()\n"
        "        process = spawn.Process(target=blocked, args=(there,))\n"
        "        with processes._signals_wait():\n"
        "            process.start()\n"
        "        print(here.recv())\n"
        "        process.join()\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(sorted(preempt.WATCHED))] * 2


@pytest.mark.parametrize("stopped", [True, False])
def test_a_job_asked_to_stop_comes_back_although_one_of_its_slots_failed(monkeypatch, stopped):
    ended = [
        processes.Outcome(Summary(ended=["complete"], progress=True, open=True), None),
        processes.Outcome(None, RunError("three in a row")),
    ]
    monkeypatch.setattr(processes, "run", lambda *_, **__: ended)
    config = with_values(training={"device": "cpu"}, tuning={"trials_per_gpu": 2})
    if stopped:
        assert slots.run(config, stages.study_paths(config), lambda: True).open
    else:
        with pytest.raises(RunError, match="three in a row"):
            slots.run(config, stages.study_paths(config), lambda: False)


# What a job is given


def with_values(**sections) -> Config:
    return configuration.with_values(Config(), **sections)


@pytest.mark.parametrize(
    ("gpus", "per_gpu", "expected"), [(0, 1, 1), (1, 1, 1), (0, 3, 3), (1, 4, 4), (4, 2, 8)]
)
def test_slots_are_gpus_times_trials_per_gpu(gpus, per_gpu, expected):
    config = with_values(slurm={"gpus": gpus}, tuning={"trials_per_gpu": per_gpu})
    assert resources.slots(config) == expected


def test_no_more_workers_than_the_trials_keep_busy():
    config = with_values(tuning={"trials_per_gpu": 4, "workers": 3})
    counts = [resources.workers(config, trials) for trials in (1, 4, 5, 8, 9, 100)]
    assert counts == [1, 1, 2, 2, 3, 3]


def test_a_database_gets_room_for_every_slot(tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(
        submission, "_here", lambda _stage, _config, given: asked.append(given["max_connections"])
    )
    config = with_values(tuning={"workers": 200, "trials_per_gpu": 4})
    for workers in (None, 800, 200):
        submission.start_database(config, tmp_path / "db", "here", workers=workers, asked=())
    assert asked[0] == asked[1] > asked[2]


# GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_slots_of_a_gpu_share_one_table(tmp_path):
    config = fleet.write_config(
        tmp_path,
        tuning={"n_trials": 4, "max_epochs": 2},
        training={"device": "cuda"},
        slurm={"gpus": 1},
    )
    with tuning(config, "--trials-per-gpu", "2") as process:
        said = end_of(process, config)
    trials = assert_exact(config, total=4, epochs=2)
    assert {owner_of(t)["slot"] for t in trials} == {0, 1}
    assert "2 trials at once on cuda:0" in said
    assert said.count("placement: device") == 1, "decided once, for all"
