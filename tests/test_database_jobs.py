"""`tripletkit db` on a real cluster: what its job asks for, how it ends, and that it stays down."""

import contextlib
import os
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests import fleet
from tests.cluster import wait
from tripletkit import config as configuration
from tripletkit import stages, submission
from tripletkit.cluster import queue
from tripletkit.config import Slurm, Tuning
from tripletkit.errors import ConfigError, RunError, StorageError
from tripletkit.tune import database, study
from tripletkit.tune.database import client, lease


@pytest.fixture
def place():
    """Where the user that the server runs as may go, other than below tmp_path."""
    with tempfile.TemporaryDirectory(prefix="db_") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Look more often."""
    for name in ("LOOK_AT_SLURM", "LOOK_AT_LEAVING", "POLL"):
        monkeypatch.setattr(client, name, 0.2)


@contextlib.contextmanager
def starting(folder: Path, config: Path, *flags: str):
    """`tripletkit db up`, as it runs; yields it and the id of the job."""
    command = [fleet.COMMAND, "db", "up", folder, "-c", config, "--cluster", "slurm", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        found = re.search(r"slurm job (\d+)", process.stdout.readline())
        assert found, process.communicate()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def up(folder: Path, config: Path, *flags: str) -> str:
    """Start a database; the id of its job."""
    with starting(folder, config, *flags) as (process, job):
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert f"use it with --storage-path {folder}" in said
    return job


def state(folder: Path) -> str:
    return lease.read(folder / "server.json").state


def wait_for(folder: Path, wanted: str) -> None:
    wait(lambda: state(folder) == wanted, lambda: f"the server is {state(folder)}", 60)


def assert_gone(slurm, job: str) -> None:
    """It is over, and still is when Slurm might have run it again (cred_expire of the cluster)."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert set(slurm.states(job).values()) <= {"COMPLETED", "CANCELLED"}
        time.sleep(1)


# --- the job ---------------------------------------------------------------------------------


def test_its_job_is_small_and_long_and_the_user_may_say_otherwise(slurm, place, tmp_path):
    workers = {"time": "00:30:00", "mem": "15000M", "cpus_per_task": 8, "gpus": 1}
    config = fleet.write_config(tmp_path, slurm=workers, tuning={"storage_path": place / "db"})
    for flags, limit, resources in (
        ((), "1-00:00:00", "cpu=2,mem=4G,node=1"),  # the time is that of the partition
        (("--time", "20", "--cpus-per-task", "1"), "00:20:00", "cpu=1,mem=4G,node=1"),
    ):
        job = up(place / "db", config, *flags)
        facts = queue.job_facts(job)
        assert facts["TimeLimit"] == limit
        assert facts["TRES"].startswith(resources)
        assert "gpu" not in facts["TRES"]
        assert database.status(place / "db").max_connections == 300
        database.down(place / "db")
        assert set(slurm.states(job).values()) == {"COMPLETED"}


@pytest.mark.parametrize(
    ("limits", "workers", "expected"),
    [
        ({"main": "7-00:00:00"}, "03:00:00", 24 * 60),
        ({"main": "UNLIMITED"}, "03:00:00", 24 * 60),
        ({"main": "12:00:00"}, "03:00:00", 12 * 60),
        ({"main": "7-00:00:00"}, "2-00:00:00", 48 * 60),
        ({"main": "7-00:00:00", "short": "01:00:00"}, "00:30:00", 24 * 60),
    ],
)
def test_its_time_is_a_day_or_what_the_partition_allows(monkeypatch, limits, workers, expected):
    rows = [
        {"PartitionName": name, "MaxTime": limit, "Default": "YES" if name == "main" else "NO"}
        for name, limit in limits.items()
    ]
    monkeypatch.setattr(queue, "partitions", lambda: rows)
    assert submission._database_time(Slurm(time=workers)) == str(expected)
    named = Slurm(time=workers, partition=list(limits)[-1])
    assert submission._database_time(named) == str(expected if len(limits) == 1 else 60)


def test_a_time_limit_that_is_none_names_its_key(slurm, place, tmp_path):
    config = configuration.load(fleet.write_config(tmp_path, slurm={"time": "soon"}), environ={})
    with pytest.raises(ConfigError, match=r"slurm\.time = 'soon'"):
        submission.start_database(config, place / "db", "slurm", workers=1, asked=())


def test_folders_that_cannot_be_written_to_are_named_before_anything_is_queued(slurm, tmp_path):
    journal = Path("/proc/nowhere/study.journal")
    loaded = configuration.load(
        fleet.write_config(tmp_path, tuning={"storage_path": journal}), environ={}
    )
    with pytest.raises(RunError, match="/proc/nowhere: cannot write to /proc"):
        submission.tune(loaded, "slurm", prepare=False, dry_run=True)
    with pytest.raises(RunError, match="/proc/db: cannot write to /proc"):
        submission.start_database(loaded, Path("/proc/db"), "slurm", workers=1, asked=())
    assert not slurm.run("squeue", "-h")


def test_a_job_that_is_cancelled_while_it_waits_is_noticed(slurm, place, tmp_path):
    slurm.sbatch("sleep 600", "--nodes=4", "--exclusive")
    config = fleet.write_config(tmp_path)
    with starting(place / "db", config) as (process, job):
        slurm.wait_state(job, {"PENDING"})
        slurm.run("scancel", job)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == StorageError.exit_code
    assert f"job {job} has ended (CANCELLED), and its database is not up" in errors


def test_the_end_of_the_log_of_a_job_that_dies_is_shown(slurm, place, tmp_path):
    config = fleet.write_config(
        tmp_path, slurm={"setup": ["echo 'no module postgresql' >&2", "exit 3"]}
    )
    with starting(place / "db", config) as (process, job):
        _, errors = process.communicate(timeout=60)
    assert process.returncode == StorageError.exit_code
    assert f"job {job} has ended (FAILED), and its database is not up" in errors
    assert f"db_{job}.err:\nno module postgresql" in errors


def test_a_scheduler_that_is_silent_for_a_while_is_no_reason_to_give_up(place, monkeypatch):
    def silent(_ids):
        raise queue.ClusterError("squeue: timed out")

    monkeypatch.setattr(queue, "queued", silent)
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot ask Slurm about job 7: squeue: timed out"):
        database.wait_until_up(place / "db", time.monotonic() + 1, "7")
    assert time.monotonic() - began > 1


# --- it stays down ---------------------------------------------------------------------------


def test_down_wins_over_a_stop_that_is_under_way(slurm, place, tmp_path):
    folder = place / "db"
    job = up(folder, fleet.write_config(tmp_path))
    slurm.run("scancel", "--signal=USR2", job)  # as before the time limit
    wait_for(folder, "stopping")
    database.down(folder)
    assert state(folder) == "stopped"
    assert set(slurm.states(job).values()) == {"COMPLETED"}
    assert_gone(slurm, job)


def test_without_down_the_same_job_runs_again(slurm, place, tmp_path):
    folder = place / "db"
    job = up(folder, fleet.write_config(tmp_path))
    slurm.sbatch("sleep 600", "--nodes=4", "--exclusive", "--partition=high")  # is next
    slurm.run("scancel", "--signal=USR2", job)
    slurm.wait_state(job, {"PENDING"})
    assert state(folder) == "stopped"
    # And is cancelled as long as it waits.
    database.down(folder)
    assert set(slurm.states(job).values()) == {"CANCELLED"}


def test_down_finds_a_job_that_is_about_to_wait_for_its_next_start(slurm, place, tmp_path, caplog):
    folder = place / "db"
    job = up(folder, fleet.write_config(tmp_path))
    slurm.run("scancel", "--signal=USR2", job)
    wait_for(folder, "stopped")  # and asks for another start now
    database.down(folder)
    assert "down already" in caplog.text
    assert_gone(slurm, job)


def test_down_ends_a_start_that_comes_meanwhile(place, monkeypatch):
    """The job runs, its former server is over, and the next one takes the folder now."""
    folder = place / "db"
    folder.mkdir()
    record, old, new = folder / "server.json", lease.new_holder("7"), lease.new_holder("7")
    lease.Lease(record, old).note("stopped")
    looks = []

    def queued(ids):
        looks.append(ids)
        if len(looks) == 3:
            threading.Thread(target=serve).start()
        return [] if state(folder) == "stopped" and len(looks) > 3 else [running]

    def serve():
        ours = lease.Lease(record, new)
        wait(lambda: (folder / "stop").read_text() == new.token, lambda: "nobody asks", 30)
        ours.note("stopped")

    running = queue.QueuedJob("7", "RUNNING", *[""] * 6)
    (folder / "stop").touch()
    monkeypatch.setattr(queue, "queued", queued)
    database.down(folder)
    assert (folder / "stop").read_text() == new.token


def test_a_job_that_stays_for_something_else_is_left_alone(place, monkeypatch, caplog):
    """Such as an allocation, in which somebody ran `db up --cluster here`."""
    (place / "db").mkdir()
    lease.Lease(place / "db/server.json", lease.new_holder("7")).note("stopped")
    running = queue.QueuedJob("7", "RUNNING", *[""] * 6)
    monkeypatch.setattr(queue, "queued", lambda _ids: [running])
    monkeypatch.setattr(queue, "cancel", lambda ids: pytest.fail(f"cancelled {ids}"))
    monkeypatch.setattr(client, "LEAVE_SECONDS", 0.5)
    database.down(place / "db")
    assert "job 7 is still RUNNING" in caplog.text
    caplog.clear()
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # our own: no use to wait for its end
    database.down(place / "db")
    assert "RUNNING" not in caplog.text


# --- the workers -----------------------------------------------------------------------------


def test_workers_of_the_cluster_use_a_database_of_the_cluster(slurm, place, tmp_path):
    """The commands as in the manual; the nodes of the test cluster are this host under other names."""
    folder = place / "db"
    # Whole nodes: sinfo of Slurm 22.05 takes minutes to see that nodes are idle which jobs shared.
    config = fleet.write_config(
        tmp_path, tuning={"storage_path": folder}, slurm={"cpus_per_task": 8, "mem": "8000M"}
    )
    up(folder, config, "--cpus-per-task", "8")
    loaded = configuration.load(config, environ={})
    study.check_reach(Tuning(storage_path=folder), {"n1", "n2"})
    fleet.tripletkit(
        "tune", "-c", config, "--cluster", "slurm", "--workers", "2", "--n-trials", "2",
        "--max-epochs", "1",
    )  # fmt: skip
    names = ("tune", "tidy")
    fleet.until(
        lambda: not [row for row in queue.queued() if row.name.startswith(names)],
        lambda: slurm.run("squeue"),
        deadline=180,
    )
    trials = stages.study_paths(loaded).root.glob("trial_*")
    assert len(list(trials)) == 2
    database.down(folder)
