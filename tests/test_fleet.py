"""Workers on a real cluster: exact totals, whatever happens to the workers, nodes and database."""

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import torch

from tests import fleet
from tests.cluster import ACCOUNT
from tripletkit import config as configuration
from tripletkit import inputs
from tripletkit.paths import RunPaths, run_paths
from tripletkit.train import loop
from tripletkit.tune import claims, storage

pytest_plugins = ["tests.postgres"]

WORKERS, EACH = 8, 4
TOTAL = WORKERS * EACH


def open_study(config: Path) -> storage.SharedStudy:
    tuning = configuration.load(config, environ={}).tuning
    return storage.open_study(tuning, seed=0, workers=1)


def trials_of(config: Path) -> list[optuna.trial.FrozenTrial]:
    return open_study(config).study.get_trials()


def assert_exact(config: Path, total: int) -> list[optuna.trial.FrozenTrial]:
    """Every trial of the total finished once, and nothing else is in the study."""
    trials = trials_of(config)
    assert [t.number for t in trials] == list(range(total))
    assert {t.state.name for t in trials} == {"COMPLETE"}
    for trial in trials:
        paths = fleet.study_paths(config).trial(trial.number)
        last = configuration.load(paths.config, environ={}).training.num_epochs
        assert fleet.epochs(paths) == list(range(last + 1))
        assert sorted(trial.intermediate_values) == list(range(last + 1))
        assert not list(paths.root.rglob("*.tmp"))
    return trials


def logs_of(config: Path) -> Path:
    return configuration.load(config, environ={}).global_.log_dir


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_fleet_runs_exactly_the_total(slurm, tmp_path, kind, request):
    tuning = {}
    if kind == "postgresql":
        tuning = {"storage_url": request.getfixturevalue("database")}
    config = fleet.write_config(tmp_path, tuning=tuning)
    fleet.tripletkit(
        "tune", "-c", config, "--cluster", "slurm", "--account", ACCOUNT,
        "--workers", str(WORKERS), "--trials-per-worker", str(EACH), "--max-epochs", "2",
    )  # fmt: skip
    fleet.wait_for_empty_queue(slurm, logs_of(config), deadline=240)
    trials = assert_exact(config, TOTAL)
    assert len({t.user_attrs[claims.OWNER]["job"] for t in trials}) > 1
    assert all(len(fleet.attempts(fleet.study_paths(config).trial(n))) == 1 for n in range(TOTAL))
    for log in logs_of(config).glob("*.err"):
        assert not re.search(r"error|traceback", log.read_text(), re.IGNORECASE), log
    assert len(list(logs_of(config).glob("tune_*_*.out"))) == WORKERS


def test_workers_with_several_trials_at_once_run_exactly_the_total(slurm, tmp_path):
    config = fleet.write_config(tmp_path, tuning={"n_trials": 4, "max_epochs": 8})
    fleet.tripletkit(
        "tune", "-c", config, "--cluster", "slurm", "--account", ACCOUNT,
        "--workers", "3", "--trials-per-gpu", "2",
    )  # fmt: skip
    fleet.wait_for_empty_queue(slurm, logs_of(config), deadline=240)
    trials = trials_of(config)
    assert [(t.number, t.state.name) for t in trials] == [(n, "COMPLETE") for n in range(4)]
    for trial in trials:
        paths = fleet.study_paths(config).trial(trial.number)
        assert fleet.epochs(paths) == list(range(9))
        assert len(fleet.attempts(paths)) == 1
    logs = sorted(logs_of(config).glob("tune_*_*.err"))
    assert len(logs) == 2, "two workers with two trials each are enough"
    owners = [t.user_attrs[claims.OWNER] for t in trials]
    assert {owner["slot"] for owner in owners} == {0, 1}
    for log in logs:
        job = log.stem.removeprefix("tune_")
        said = log.read_text()
        assert not re.search(r"error|traceback", said, re.IGNORECASE), said
        assert all(
            f"[job {job} slot {owner['slot']}] trial " in said
            for owner in owners
            if owner["job"] == job
        )


def running(config: Path, epoch: int) -> dict[str, optuna.trial.FrozenTrial]:
    """Trials in work that have reported this epoch, by job."""
    return {
        t.user_attrs[claims.OWNER]["job"]: t
        for t in trials_of(config)
        if t.state.name == "RUNNING" and max(t.intermediate_values, default=-1) >= epoch
    }


def node_of(slurm, job: str) -> str:
    return slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()


def test_whatever_happens_the_total_is_exact_and_trials_go_on(slurm, tmp_path, start_postgres):
    server = start_postgres(password="correct-horse-battery", max_connections=60)
    passwords = tmp_path / "pgpass"
    passwords.write_text(f"*:*:*:*:{server.password}\n")
    passwords.chmod(0o600)
    url = server.database()
    os.environ["PGPASSFILE"] = str(passwords)
    try:
        _faults(slurm, tmp_path, server, url)
    finally:
        del os.environ["PGPASSFILE"]


def _faults(slurm, tmp_path: Path, server, url: str) -> None:
    # All workers are in their first trial when things begin to happen, and few get a second one.
    total, epochs = WORKERS * 3 // 2, 60
    config = fleet.write_config(
        tmp_path,
        tuning={"storage_url": url, "max_epochs": epochs},
        training={"checkpoint_every_minutes": 0.01},
        slurm={"cpus_per_task": 4},
    )
    flags = ("-c", config, "--cluster", "slurm", "--n-trials", str(total))
    for partition in ("low", "lowgrace"):  # two workers per node
        fleet.tripletkit("tune", *flags, "--workers", str(WORKERS // 2), "--partition", partition)
    fleet.until(
        lambda: len(running(config, 2)) == WORKERS,
        lambda: slurm.run("squeue"),
        deadline=180,
    )
    at_work = running(config, 2)
    nodes = {job: node_of(slurm, job) for job in at_work}
    seen: dict[str, set[str]] = {}
    for job, node in nodes.items():
        seen.setdefault(node, set()).add(job)
    first, second, third, fourth = sorted(seen, key=lambda n: sorted(seen[n]))
    killed, requeued = sorted(seen[first])[:2]
    cancelled = min(seen[third])

    # A worker killed, one requeued by hand, one cancelled.
    os.kill(at_work[killed].user_attrs[claims.OWNER]["pid"], signal.SIGKILL)
    slurm.run("scontrol", "requeue", requeued)
    slurm.run("scancel", cancelled)
    # Everything on the second node preempted at once, on the third within a grace time.
    high = [
        slurm.sbatch("sleep 20", "--partition=high", "--exclusive", f"--nodelist={node}")
        for node in (second, third)
    ]
    # A slurmd killed and started again, under its jobs.
    slurm.stop_slurmd(fourth)
    slurm.start_slurmd(fourth)
    # The database away in the middle.
    server.stop()
    time.sleep(3)
    server.start()
    assert_no_secret(slurm, tmp_path, server.password, [*at_work, *high])

    fleet.wait_for_empty_queue(slurm, logs_of(config), deadline=420)
    trials = assert_exact(config, total)
    hit = {killed, requeued, *seen[second], *seen[third]}
    for job in hit:
        number = at_work[job].number
        tries = fleet.attempts(fleet.study_paths(config).trial(number))
        assert len(tries) >= 2, (job, tries)
        assert tries[1]["from_epoch"] >= max(at_work[job].intermediate_values)
        assert tries[-1]["outcome"] == "complete"
    untouched = at_work[min(seen[fourth])]
    assert len(fleet.attempts(fleet.study_paths(config).trial(untouched.number))) == 1
    assert_no_secret(slurm, tmp_path, server.password, [*at_work, *high])
    # One of them, trained in one go elsewhere, gives the same file.
    number = at_work[killed].number
    trial = fleet.study_paths(config).trial(number)
    whole = in_one_go(trial.config, tmp_path / "whole")
    assert whole.metrics.read_bytes() == trial.metrics.read_bytes()
    assert trials[number].params == at_work[killed].params


def in_one_go(config: Path, folder: Path) -> RunPaths:
    """The same training without an interruption, by as many threads as the jobs have."""
    loaded, paths = configuration.load(config, environ={}), run_paths(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loop.train(loaded, inputs.training_data(loaded), paths)
    finally:
        torch.set_num_threads(threads)
    return paths


def assert_no_secret(slurm, folder: Path, password: str, jobs: list[str]) -> None:
    """The password is in no file, job script, job, process list or accounting record."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "pgpass":
            assert password.encode() not in path.read_bytes(), path
    texts = [
        slurm.run("scontrol", "show", "job", "--details"),
        slurm.run("sacct", "--allusers", "--format=ALL", "--parsable2"),
        subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout,
    ]
    for job in jobs:
        script = subprocess.run(
            ["scontrol", "write", "batch_script", job, "-"], capture_output=True, text=True
        )
        texts.append(script.stdout)
    assert not any(password in text for text in texts)


def test_the_final_training_goes_on_past_its_time_limit(slurm, tmp_path):
    """Two time limits; the end equals a training in one go, byte for byte."""
    config = fleet.write_config(
        tmp_path,
        training={"num_epochs": 300, "checkpoint_every_minutes": 0.05},
        tuning={"objective": "recall@10"},
    )
    fleet.tripletkit(  # flags of the study need not be given again
        "tune", "-c", config, "--cluster", "here", "--n-trials", "1", "--max-epochs", "1",
        "--objective", "map@r",
    )  # fmt: skip
    output = fleet.tripletkit(
        "submit-best", "-c", config, "--cluster", "slurm", "--time", "1",
        "--set", "training.early_stopping_patience=1000",
    )  # fmt: skip
    job = re.search(r"slurm job (\d+)", output)[1]
    folder = Path(re.search(r"checkpoints: (.*)", output)[1])
    (effective,) = (logs_of(config) / "configs").glob("best_*.toml")

    def give_it_time() -> None:
        """Once it met two limits: how long a third start would last depends on the machine."""
        show = ("scontrol", "show", "job", job)
        fleet.until(
            lambda: " Restarts=2 " in slurm.run(*show), lambda: slurm.run(*show), deadline=240
        )
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    with ThreadPoolExecutor() as pool:
        given = pool.submit(give_it_time)
        whole = in_one_go(effective, tmp_path / "whole")
        given.result()
    fleet.wait_for_empty_queue(slurm, logs_of(config), deadline=400)
    runs = slurm.run("sacct", "-X", "--duplicates", "--noheader", f"--jobs={job}", "--format=State")
    assert len(runs.split()) >= 3, runs
    done = run_paths(folder)
    assert done.metrics.read_bytes() == whole.metrics.read_bytes()
    assert_same_tensors(done.final, whole.final)
    told = (logs_of(config) / f"best_training_{job}.out").read_text()
    assert "map@r" in told
    assert (logs_of(config) / f"best_training_{job}.err").exists()


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    from tests.test_resume import flat
    from tripletkit.train import checkpoint

    assert flat(checkpoint.load(ours)) == flat(checkpoint.load(theirs))
