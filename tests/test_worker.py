"""The job harness: records, exit codes, signals, and when a job asks to be run again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from tests import fleet
from tests.cluster import ACCOUNT
from tripletkit import config as configuration
from tripletkit import worker
from tripletkit.cluster import jobs, preempt, queue
from tripletkit.errors import REQUEUE, ClusterError, Interrupted, RunError
from tripletkit.paths import LogPaths, run_paths
from tripletkit.tune import storage

pytest_plugins = ["tests.postgres"]

MODULE = [sys.executable, "-m", "tripletkit.worker"]


@pytest.fixture
def config(tmp_path) -> Path:
    return fleet.write_config(tmp_path)


def logs_of(config: Path) -> LogPaths:
    return LogPaths(configuration.load(config, environ={}).global_.log_dir)


def record_of(config: Path, job: str) -> jobs.Record:
    found = jobs.read(logs_of(config).record(job))
    assert found is not None
    return found


def states(config: Path) -> list[str]:
    tuning = configuration.load(config, environ={}).tuning
    shared = storage.open_study(tuning, seed=0, workers=1)
    return [t.state.name for t in shared.study.get_trials()]


def long_training(tmp_path: Path) -> Path:
    return fleet.write_config(tmp_path, training={"num_epochs": 100_000})


def test_a_job_ends_with_zero_and_keeps_its_record(config):
    done = subprocess.Popen(
        [*MODULE, "train", "--config", config, "--options", "{}"],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TRIPLET_TRAINING_NUM_EPOCHS": "0"},  # the file is the whole truth
    )  # fmt: skip
    with done:
        output = done.stdout.read()
    assert done.returncode == 0
    assert "map@r" in output
    record = record_of(config, f"local-{done.pid}")
    assert (record.stage, record.exit_code, record.message) == ("train", 0, None)
    assert record.ended is not None


def test_a_job_that_fails_says_so_in_its_record(config):
    text = config.read_text().replace("train.parquet", "none.parquet")
    config.write_text(text)
    done = subprocess.Popen(
        [*MODULE, "train", "--config", config], stderr=subprocess.PIPE, text=True
    )
    with done:
        errors = done.stderr.read()
    assert done.returncode == 3
    assert "Traceback" not in errors
    record = record_of(config, f"local-{done.pid}")
    assert record.exit_code == 3
    assert "none.parquet" in record.message


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["train", "--config", "none.toml"]])
def test_wrong_usage_of_the_entry_point_is_exit_code_two(arguments, tmp_path):
    done = subprocess.run([*MODULE, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_outside_of_slurm_a_stopped_job_ends_with_130_and_its_state_saved(tmp_path, number):
    config = long_training(tmp_path)
    paths = run_paths(tmp_path / "checkpoints")
    process = subprocess.Popen([*MODULE, "train", "--config", config])
    fleet.until(paths.best.exists, lambda: "no checkpoint", deadline=60)
    process.send_signal(number)
    process.send_signal(number)  # wrappers forward what Slurm sends anyway
    assert process.wait(60) == 130
    assert paths.last.exists()
    assert record_of(config, f"local-{process.pid}").exit_code == 130


def test_who_lives_is_known_from_locks_even_after_a_kill(tmp_path):
    config = long_training(tmp_path)
    process = subprocess.Popen([*MODULE, "train", "--config", config])
    job, logs = f"local-{process.pid}", logs_of(config)
    fleet.until(logs.record(job).exists, lambda: "no record", deadline=60)
    assert jobs.states(logs, [job]) == {job: "running"}
    process.kill()
    process.wait()
    assert jobs.states(logs, [job]) == {job: "gone"}
    assert record_of(config, job).ended is None


def test_a_process_of_another_host_may_live(tmp_path):
    logs = LogPaths(tmp_path)
    record = jobs.new_record("local-1", "tune", "tune:x", "c.toml")
    other = json.dumps({**vars(record), "host": "elsewhere"})
    logs.record("local-1").parent.mkdir(parents=True)
    logs.record("local-1").write_text(other)
    assert jobs.states(logs, ["local-1", "local-2"]) == {"local-1": "unknown", "local-2": "gone"}


def test_one_job_runs_one_process(tmp_path):
    logs, record = LogPaths(tmp_path), jobs.new_record("7", "tune", "tune:x", "c.toml")
    with (
        jobs.recorded(logs, record),
        pytest.raises(RunError, match="job 7 already runs"),
        jobs.recorded(logs, record),
    ):
        pass


def test_a_worker_with_another_log_folder_may_live(tmp_path):
    config = long_training(tmp_path)
    process = subprocess.Popen([*MODULE, "train", "--config", config])
    elsewhere, job = LogPaths(tmp_path / "elsewhere"), f"local-{process.pid}"
    fleet.until(logs_of(config).record(job).exists, lambda: "no record", deadline=60)
    assert jobs.states(elsewhere, [job]) == {job: "unknown"}
    process.kill()
    process.wait()
    assert jobs.states(elsewhere, [job]) == {job: "gone"}


def test_starts_without_progress_are_counted_until_one_gets_somewhere(tmp_path, monkeypatch):
    logs, counts = LogPaths(tmp_path), []
    for restart, progress in enumerate([True, False, None, False, True, False]):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        before = jobs.read(logs.record("7"))
        record = jobs.new_record("7", "tune", "tune:x", "c.toml", before=before)
        with jobs.recorded(logs, record) as ended:
            if progress is not None:  # else it was killed
                ended(REQUEUE, "stopped", progress=progress)
        counts.append(jobs.read(logs.record("7")).fruitless)
    assert counts == [0, 1, 1, 2, 0, 1]


@pytest.fixture
def orphan(tmp_path):
    """A process of the former start of job 7, which its node's failure cut off from Slurm."""
    code = (
        "import sys; from pathlib import Path; from tripletkit import fsio\n"
        "with fsio.exclusive_lock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, LogPaths(tmp_path).lock("7")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_job_waits_for_the_end_of_its_former_start(tmp_path, monkeypatch, orphan, caplog):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record = jobs.new_record("7", "tune", "tune:x", "c.toml")
    Timer(3, orphan.kill).start()
    with jobs.recorded(LogPaths(tmp_path), record):
        assert orphan.wait(0) is not None
    assert "cut off from Slurm" in caplog.text


def test_asked_to_stop_it_leaves_without_having_got_anywhere(tmp_path, monkeypatch, orphan):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record = jobs.new_record("7", "tune", "tune:x", "c.toml")
    with (
        pytest.raises(Interrupted, match="former start") as caught,
        jobs.recorded(LogPaths(tmp_path), record, lambda: True),
    ):
        pass
    assert not caught.value.progress


def stop_after(*numbers: int) -> preempt.Stop:
    stop = preempt.Stop()
    stop.signals.extend(numbers)
    return stop


def test_of_jobs_that_slurm_ends_those_at_their_time_limit_run_again(slurm):
    """Told of their limit first, and then ended; both take their time to save their state."""
    stubborn = "trap '' TERM; for i in $(seq 300); do sleep 0.5; done"
    limited = slurm.sbatch(stubborn, "--time=1", "--mem=100")
    cancelled = slurm.sbatch(stubborn, "--time=5", "--mem=100")
    slurm.wait_state(cancelled, {"RUNNING"})
    slurm.run("scancel", cancelled)
    slurm.wait_state(cancelled, {"COMPLETING", "CANCELLED"})
    ended = stop_after(signal.SIGUSR2, signal.SIGTERM)
    assert not worker._runs_again(cancelled, ended)
    slurm.wait_state(limited, {"COMPLETING", "TIMEOUT"}, deadline=120)
    assert worker._runs_again(limited, ended)


def test_a_requeue_outlasts_a_controller_that_does_not_answer(monkeypatch):
    answers = iter([ClusterError("no answer", hint=queue.SILENCE)] * 2 + [True])
    asked = []

    def requeue(job: str) -> bool:
        asked.append(job)
        if isinstance(answer := next(answers), ClusterError):
            raise answer
        return answer

    monkeypatch.setattr(queue, "requeue", requeue)
    monkeypatch.setattr(worker, "KILL_SECONDS", 1.0)
    worker._requeue("7")
    assert asked == ["7"] * 3


def test_away_storage_is_no_end_of_a_job(slurm, tmp_path, start_postgres):
    """Told to make room while the database is away, its trial goes on when both are back."""
    server = start_postgres()
    config = fleet.write_config(
        tmp_path,
        tuning={"storage_url": server.database(), "max_epochs": 60, "n_trials": 1},
        training={"checkpoint_every_minutes": 0.01},
    )
    output = fleet.tripletkit("tune", "-c", config, "--cluster", "slurm")
    job = output.split("slurm job ")[1].split()[0]
    trial = fleet.study_paths(config).trial(0)
    fleet.until(
        lambda: trial.metrics.exists() and len(fleet.epochs(trial)) > 3,
        lambda: slurm.run("squeue"), deadline=90,
    )  # fmt: skip
    server.stop()
    slurm.run("scancel", "--signal=USR2", job)
    fleet.until(lambda: record_of(config, job).ended, lambda: "it goes on", deadline=60)
    assert record_of(config, job).exit_code == REQUEUE
    server.start()
    fleet.wait_for_empty_queue(slurm, logs_of(config).root, deadline=120)
    assert states(config) == ["COMPLETE"]
    assert fleet.epochs(trial) == list(range(61))
    first, second = fleet.attempts(trial)
    assert (first["outcome"], second["outcome"]) == ("stopped", "complete")
    assert (first["job"], second["job"]) == (job, job)


def test_the_states_of_slurm_jobs(slurm, tmp_path):
    slurm.sbatch("sleep 60", "--time=5")
    running = slurm.sbatch("sleep 60", "--time=5", "--array=0-1")
    held = slurm.sbatch("sleep 60", "--hold")
    gone = slurm.sbatch("true")
    slurm.wait_state(running, {"RUNNING"})
    slurm.wait_state(gone, {"COMPLETED"})
    ids = [f"{running}_0", f"{running}_1", held, gone, "99999"]
    fleet.until(
        lambda: (
            jobs.states(LogPaths(tmp_path), ids)
            == dict(zip(ids, ["running", "running", "pending", "gone", "gone"], strict=True))
        ),
        lambda: str(jobs.states(LogPaths(tmp_path), ids)),
        deadline=20,
    )


def test_without_an_answer_from_slurm_nobody_is_declared_gone(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "TIMEOUT", 1)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    assert jobs.states(LogPaths(tmp_path), ["1"]) == {"1": "unknown"}


def test_preempted_a_training_goes_on_where_it_was(slurm, tmp_path):
    """With a grace time the job asks for its requeue itself, without one Slurm has done so."""
    started = {}
    for partition in ("low", "lowgrace"):
        config = fleet.write_config(
            tmp_path / partition, training={"num_epochs": 120, "checkpoint_every_minutes": 1000}
        )
        output = fleet.tripletkit(
            "train", "-c", config, "--cluster", "slurm", "--partition", partition,
            "--set", "slurm.cpus_per_task=8",
        )  # fmt: skip
        started[output.split("slurm job ")[1].split()[0]] = config
    for job, config in started.items():
        paths = run_paths(config.parent / "checkpoints")
        fleet.until(
            lambda paths=paths: paths.metrics.exists() and len(fleet.epochs(paths)) > 10,
            lambda: slurm.run("squeue"),
            deadline=90,
        )
        node = slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
        slurm.sbatch("true", "--partition=high", "--exclusive", f"--nodelist={node}")
    for job, config in started.items():
        fleet.wait_for_empty_queue(slurm, logs_of(config).root, deadline=180)
        paths = run_paths(config.parent / "checkpoints")
        assert fleet.epochs(paths) == list(range(121))
        log = logs_of(config).err("train", job).read_text()
        assert log.count("train:checkpoints") == 2  # two starts
        assert "asked to stop: saved" in log
        assert record_of(config, job).exit_code == 0
        assert [run.state for run in queue.past([job])][-1] == "COMPLETED"
        assert len(queue.past([job])) == 2


def test_a_cancelled_job_does_not_come_back(slurm, tmp_path):
    config = long_training(tmp_path)
    output = fleet.tripletkit("train", "-c", config, "--cluster", "slurm")
    job = output.split("slurm job ")[1].split()[0]
    paths = run_paths(tmp_path / "checkpoints")
    fleet.until(paths.best.exists, lambda: slurm.run("squeue"), deadline=60)
    slurm.run("scancel", job)
    fleet.wait_for_empty_queue(slurm, logs_of(config).root, deadline=60)
    assert paths.last.exists()
    assert record_of(config, job).exit_code == 130
    (run,) = queue.past([job])
    assert run.state == "CANCELLED"


def test_from_the_shell_a_job_asks_its_script_for_another_start(slurm, tmp_path):
    config = long_training(tmp_path)
    job = slurm.sbatch(
        f"{' '.join(MODULE)} train --config {config} & pid=$!; "
        'trap "kill -USR1 $pid" USR1; '
        "while :; do wait $pid; rc=$?; kill -0 $pid 2>/dev/null || break; done; exit $rc",
        "--time=10", f"--output={tmp_path}/out", f"--error={tmp_path}/err",
    )  # fmt: skip
    paths = run_paths(tmp_path / "checkpoints")
    fleet.until(paths.best.exists, lambda: slurm.run("squeue"), deadline=60)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_state(job, {"FAILED"}, deadline=60)
    (run,) = queue.past([job])
    assert run.exit_code == f"{REQUEUE}:0"
    assert record_of(config, job).exit_code == REQUEUE


def test_bands_and_evaluation_run_as_jobs(slurm, tmp_path):
    config = fleet.write_config(
        tmp_path, paths={"difficulty_metadata_path": tmp_path / "bands.parquet"}
    )
    small = ["--neighbors", "10", "--k0", "5"]
    fleet.tripletkit("data", "bands", "-c", config, *small, "--cluster", "slurm")
    fleet.wait_for_empty_queue(slurm, logs_of(config).root, deadline=60)
    assert (tmp_path / "bands.parquet").exists()
    fleet.tripletkit("train", "-c", config, "--set", "training.num_epochs=1")
    output = fleet.tripletkit(
        "evaluate", "-c", config, "--split", "val", "--json", "--cluster", "slurm",
        "--account", ACCOUNT,
    )  # fmt: skip
    fleet.wait_for_empty_queue(slurm, logs_of(config).root, deadline=60)
    job = output.split("slurm job ")[1].split()[0]
    text = logs_of(config).out("evaluate", job).read_text()
    assert json.loads(text[text.index("{") : text.rindex("}") + 1])["split"] == "val"


def test_in_the_background_workers_share_the_study_and_end(tmp_path):
    config = fleet.write_config(tmp_path, tuning={"max_epochs": 2})
    output = fleet.tripletkit(
        "tune", "-c", config, "--cluster", "local", "--workers", "2", "--trials-per-worker", "3"
    )
    assert "local job" in output
    fleet.until(
        lambda: states(config) == ["COMPLETE"] * 6,
        lambda: str(states(config)) + "".join(p.read_text() for p in tmp_path.rglob("*.err")),
        deadline=90,
    )
    assert len(list(logs_of(config).root.glob("tune_local-*.out"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_foreground_the_trial_waits_for_the_next_command(tmp_path, number):
    config = fleet.write_config(tmp_path, tuning={"max_epochs": 100_000})
    command = [fleet.COMMAND, "tune", "-c", config, "--cluster", "here", "--n-trials", "1"]
    process = subprocess.Popen(command)
    trial = fleet.study_paths(config).trial(0)
    fleet.until(trial.best.exists, lambda: "no checkpoint", deadline=60)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert states(config) == ["WAITING"]
