"""Doctor: every mismatch of study, queue and folders is named, its repair repairs it and no more."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from optuna.trial import TrialState
from typer.testing import CliRunner

from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.cli import diagnosis
from tripletkit.cluster import jobs
from tripletkit.config import Config
from tripletkit.monitor import checks, doctor
from tripletkit.monitor.inventory import Inventory
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.tune import attempts, claims, storage, study
from tripletkit.tune.claims import Worker

pytest_plugins = ["tests.postgres"]

# A worker of the study, as far as others can see: it keeps its record, and lives until told to end.
WORKER = """
import sys
from pathlib import Path
from tripletkit.cluster import jobs
from tripletkit.paths import LogPaths
record = jobs.new_record(jobs.current_job(), "tune", sys.argv[2], "")
with jobs.recorded(LogPaths(Path(sys.argv[1])), record) as ended:
    print(record.job, flush=True)
    sys.stdin.read()
    ended(0, None)
"""
HOLDER = """
import sys
from pathlib import Path
from tripletkit import fsio
with fsio.exclusive_lock(Path(sys.argv[1]), wait=False) as lock:
    assert lock.ours
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    """These tests run on a machine without Slurm; those on a cluster are in test_why.py."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "setpriv").symlink_to(shutil.which("setpriv"))  # starts PostgreSQL
    monkeypatch.setenv("PATH", str(programs))


@pytest.fixture
def config(tmp_path) -> Config:
    return configuration.with_values(
        Config(),
        global_={"log_dir": tmp_path / "logs"},
        paths={"val_parquet_path": tmp_path / "val.parquet"},
        tuning={
            "study_name": "s", "storage_path": tmp_path / "study.db", "n_trials": 3,
            "output_dir": tmp_path / "trials", "sampler": "random",
        },
    )  # fmt: skip


@pytest.fixture
def paths(config) -> StudyPaths:
    return StudyPaths(config.tuning.output_dir / config.tuning.study_name)


@pytest.fixture
def shared(config, paths) -> storage.SharedStudy:
    return study.prepare(config, paths)


@contextlib.contextmanager
def process(code: str, *arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """A python process, and the first line that it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@pytest.fixture
def living(config) -> Iterator[str]:
    """The job of a worker that lives."""
    with process(WORKER, config.global_.log_dir, "tune:s") as (_, job):
        yield job


def worker(job: str) -> Worker:
    return Worker(job=job, restart=0, host=socket.gethostname(), pid=1)


def claim(shared, job: str = "local-999999", total: int = 9) -> claims.Claim:
    """A new trial in work, with a parameter and a report."""
    found = claims.claim(shared, worker(job), total, lambda ids: dict.fromkeys(ids, "running"))
    found.trial.suggest_float("x", 0, 1)
    found.trial.report(0.25, 1)
    return found


def begin(paths: StudyPaths, found: claims.Claim) -> Path:
    """Its folder, as its worker makes it."""
    trial = paths.trial(found.trial.number)
    attempts.begin(trial.attempts, found.owner, from_epoch=0)
    trial.metrics.write_text('{"epoch": 0}\n')
    trial.lock.touch()
    return trial.root


def complete(shared, paths, count: int = 1) -> None:
    for _ in range(count):
        found = claim(shared)
        begin(paths, found)
        shared.study.tell(found.trial, 0.5)
        attempts.end(paths.trial(found.trial.number).attempts, "complete")


def findings(config: Config) -> dict[str, doctor.Finding]:
    """By kind; each at most once in these tests."""
    found = list(doctor.examine(Inventory(config, patience=1)))
    assert len({each.kind for each in found}) == len(found), found
    return {each.kind: each for each in found}


def everything(shared, folder: Path) -> dict:
    """All of the study, and every file that is not the database's own."""
    kept = {"number", "state", "values", "params", "intermediate_values", "user_attrs"}
    trials = shared.study.get_trials()
    files = {
        str(file): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith("study.")
    }
    return {
        "study": shared.study.user_attrs,
        "trials": {t.number: {key: getattr(t, key) for key in kept} for t in trials},
        "files": files,
    }


def run(config: Config, *flags: str):
    """The command; its exit code and what it printed."""
    app = typer.Typer()
    diagnosis.add_to(app)
    file = config.global_.log_dir.parent / "given.toml"
    fsio.write_text(file, configuration.dump(config))
    done = CliRunner().invoke(app, ["doctor", "--config", str(file), *flags])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_a_finished_study_is_healthy(config, paths, shared):
    complete(shared, paths, 3)
    assert findings(config) == {}
    code, printed = run(config)
    assert code == 0
    assert "study s, the queue and the folders fit together" in printed
    assert "cluster" not in printed  # there is none


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgresql"])
def test_a_trial_whose_job_is_gone_is_handed_back(config, paths, tmp_path, kind, request):
    if kind == "journal":
        config = configuration.with_values(
            config, tuning={"storage_path": tmp_path / "study.journal"}
        )
    elif kind == "postgresql":
        url = request.getfixturevalue("database")
        config = configuration.with_values(config, tuning={"storage_url": url})
    shared = study.prepare(config, paths)
    complete(shared, paths, 2)
    found = claim(shared)
    begin(paths, found)
    before = everything(shared, tmp_path)
    assert "no_worker" in findings(config)
    lost = findings(config)["lost"]
    assert lost.what == "trial 2 is RUNNING, but its job local-999999 is gone"
    assert "goes on after epoch 1" in lost.repair
    assert everything(shared, tmp_path) == before

    assert lost.apply()
    before["trials"][2]["state"] = TrialState.WAITING
    assert everything(shared, tmp_path) == before
    assert not lost.apply()
    assert findings(config).keys() == {"no_worker"}


def test_a_trial_that_nobody_signed_is_handed_back(config, shared, tmp_path):
    shared.study.ask()
    assert "nobody signed it" in findings(config)["lost"].what
    code, _ = run(config, "--fix")
    assert code == 1  # there is still no worker
    assert shared.study.get_trials()[0].state == TrialState.WAITING


def test_the_trial_of_a_process_that_lives_is_not_touched(config, paths, shared, living, tmp_path):
    live = claim(shared, living)
    leftover = begin(paths, live) / ".metrics.jsonl.17.tmp"
    leftover.touch()
    os.utime(leftover, (0, 0))
    claim(shared, "local-999999")
    run(config)
    before = everything(shared, tmp_path)
    code, printed = run(config, "--fix")
    assert code == 0
    assert "repaired: trial 1" in printed
    assert "trial 0" not in printed
    assert live.holds()
    before["trials"][1]["state"] = TrialState.WAITING
    assert everything(shared, tmp_path) == before


def test_a_trial_of_a_process_on_another_host_is_left_to_that_host(config, shared, tmp_path):
    found = claim(shared, "local-17")
    logs = LogPaths(config.global_.log_dir)
    record = replace(jobs.new_record("local-17", "tune", "tune:s", ""), host="elsewhere")
    fsio.write_json(logs.record("local-17"), record.__dict__)
    shared.study.set_user_attr(study.TOTAL, 1)
    run(config)
    before = everything(shared, tmp_path)
    assert findings(config)["unseen"].harmless
    assert run(config, "--fix")[0] == 0
    assert everything(shared, tmp_path) == before
    assert found.holds()


def test_a_trial_that_was_taken_meanwhile_is_not_handed_back(config, shared):
    claim(shared)
    lost = findings(config)["lost"]
    taken = claims.claim(shared, worker("2"), 9, lambda ids: dict.fromkeys(ids, "gone"))
    assert not lost.apply()
    assert taken.holds()


def test_a_finished_training_that_was_never_told_is_handed_back(config, paths, shared):
    begin(paths, claim(shared))
    paths.trial(0).final.touch()
    untold = findings(config)["untold"]
    assert "its training is finished" in untold.what
    assert untold.apply()
    assert "(1 only to be told)" in findings(config)["no_worker"].what
    again = claims.claim(shared, worker("2"), 3, lambda ids: {})
    assert again.trial.number == 0


def test_a_process_that_still_trains_is_waited_for(config, paths, shared, tmp_path):
    """Cut off from the scheduler, which says that its job is gone."""
    begin(paths, claim(shared))
    with process(HOLDER, paths.trial(0).lock) as (holder, said):
        assert said == "held"
        before = everything(shared, tmp_path)
        busy = findings(config)["busy"]
        assert busy.apply is None
        assert str(paths.trial(0).lock) in busy.what
        assert run(config, "--fix")[0] == 1
        assert everything(shared, tmp_path)["trials"] == before["trials"]
        holder.kill()
        holder.wait()
    assert "lost" in findings(config)


def test_folders_without_a_trial_are_named_and_kept(config, paths, shared):
    complete(shared, paths, 3)
    foreign = paths.trial(7).root
    foreign.mkdir()
    (foreign / "metrics.jsonl").write_text("theirs")
    found = findings(config)["foreign_folder"]
    assert str(foreign) in found.what
    assert run(config, "--fix")[0] == 1
    assert (foreign / "metrics.jsonl").read_text() == "theirs"


def test_folders_that_are_gone_are_worth_a_note(config, paths, shared):
    complete(shared, paths, 3)
    folder = paths.trial(1).root
    folder.rename(folder.with_name("elsewhere"))
    missing = findings(config)["missing_folder"]
    assert missing.harmless
    assert "trials 1 are gone" in missing.what


def test_work_without_workers_names_the_command_and_starts_nothing(config, paths, shared, tmp_path):
    complete(shared, paths, 1)
    run(config)
    before = everything(shared, tmp_path)
    code, printed = run(config, "--fix")
    assert code == 1
    assert "wrong: 2 of 3 trials are left, and no worker runs or waits" in printed
    assert f"tripletkit tune --config {paths.config}" in printed
    assert everything(shared, tmp_path) == before


def test_workers_that_have_nothing_to_do_are_harmless(config, paths, shared, living):
    assert "no_worker" not in findings(config)
    complete(shared, paths, 3)
    idle = findings(config)["idle"]
    assert idle.harmless
    assert f"tripletkit cancel {living}" in idle.repair
    assert run(config)[0] == 0


def test_records_of_jobs_that_were_killed_get_an_end(config, paths, shared, living):
    logs = LogPaths(config.global_.log_dir)
    complete(shared, paths, 3)
    with process(WORKER, logs.root, "tune:s") as (running, job):
        assert "open_record" not in findings(config)
        running.kill()
        running.wait()
    found = findings(config)["open_record"]
    assert f"job {job} (tune:s) has no end" in found.what
    assert jobs.read(logs.record(job)).ended is None
    alive = logs.record(living).read_bytes()
    assert run(config, "--fix")[0] == 0
    closed = jobs.read(logs.record(job))
    assert closed.ended
    assert "killed" in closed.message
    assert logs.record(living).read_bytes() == alive
    assert not found.apply()
    assert "open_record" not in findings(config)


def test_what_killed_processes_left_behind_is_removed(config, paths, shared):
    complete(shared, paths, 3)
    old, young = (paths.trial(n).root / ".checkpoint_last.pt.17.tmp" for n in (0, 1))
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * doctor.LEFTOVER,) * 2)
    kept = {file for file in paths.root.rglob("*") if file != old}
    assert old.name in findings(config)["leftover"].what
    assert run(config, "--fix")[0] == 0
    assert set(paths.root.rglob("*")) == kept
    assert findings(config) == {}


def test_what_a_lost_trial_left_behind_goes_with_it(config, paths, shared):
    file = begin(paths, claim(shared)) / ".config.toml.17.tmp"
    file.touch()
    os.utime(file, (0, 0))
    assert findings(config).keys() == {"lost", "leftover", "no_worker"}
    run(config, "--fix")
    assert not file.exists()
    assert findings(config).keys() == {"no_worker"}


def test_leftovers_are_kept_if_somebody_took_the_trial_meanwhile(config, paths, shared):
    file = begin(paths, claim(shared)) / ".config.toml.17.tmp"
    file.touch()
    os.utime(file, (0, 0))
    leftover = findings(config)["leftover"]
    claims.claim(shared, worker("2"), 9, lambda ids: dict.fromkeys(ids, "gone"))
    assert not leftover.apply()
    assert file.exists()


def test_many_attempts_are_worth_a_note(config, paths, shared, living):
    found = claim(shared, living)
    for _ in range(doctor.MANY_ATTEMPTS + 1):
        begin(paths, found)
    note = findings(config)["many_attempts"]
    assert note.harmless
    assert "tripletkit why 0" in note.repair


def test_the_folder_of_another_study_is_not_touched(config, paths, shared):
    complete(shared, paths, 3)
    file = paths.trial(0).root / ".config.toml.17.tmp"
    file.touch()
    os.utime(file, (0, 0))
    fsio.write_json(paths.identity, {"id": "theirs", "host": "elsewhere"})
    found = findings(config)
    assert found.keys() == {"foreign_study"}
    assert "theirs" in found["foreign_study"].what
    assert run(config, "--fix")[0] == 1
    assert file.exists()


def test_more_trials_than_the_total_are_worth_a_note(config, paths, shared):
    complete(shared, paths, 3)
    shared.study.set_user_attr(study.TOTAL, 2)
    assert findings(config)["surplus"].harmless


def test_sqlite_of_another_host_is_named(config, shared):
    shared.study.set_user_attr(storage.HOST, "elsewhere")
    found = findings(config)["storage"]
    assert "elsewhere" in found.what
    assert "tripletkit db up" in found.repair


def test_sqlite_on_a_network_file_system_is_named(config, shared, tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 98:0 / {tmp_path} rw - nfs4 server:/home rw\n")
    monkeypatch.setattr(storage, "MOUNTINFO", mounts)
    found = findings(config)["storage"]
    assert "nfs4" in found.what
    assert found.apply is None


def test_a_postgresql_that_does_not_answer_is_named(config, paths, start_postgres):
    server = start_postgres()
    config = configuration.with_values(config, tuning={"storage_url": server.database()})
    study.prepare(config, paths)
    assert findings(config).keys() == {"no_worker"}
    server.stop()
    found = findings(config)
    assert found.keys() == {"storage"}
    assert "has been away" in found["storage"].what


def test_a_study_that_is_not_there_is_named(config):
    found = findings(config)
    assert "there is no study 's'" in found["no_study"].what
    code, printed = run(config)
    assert code == 0, "before the first `tune` nothing is wrong"
    assert "note: there is no study 's'" in printed


@pytest.mark.parametrize("left", ["its folder", "a worker"])
def test_a_study_that_is_gone_is_wrong(config, paths, left):
    with contextlib.ExitStack() as stack:
        if left == "its folder":
            study.prepare(config, paths)
            for file in config.tuning.storage_path.parent.glob("study.db*"):
                file.unlink()
        else:
            stack.enter_context(process(WORKER, config.global_.log_dir, "tune:s"))
        code, printed = run(config)
    assert code == 1
    assert "wrong: there is no study 's'" in printed


def test_a_log_folder_that_cannot_be_written_to_is_named(config, paths, shared, tmp_path):
    complete(shared, paths, 3)
    (tmp_path / "file").touch()
    found = list(checks.full_disk("global.log_dir", tmp_path / "file" / "logs"))
    assert [each.kind for each in found] == ["not_writable"]
    assert "global.log_dir" in found[0].what


def test_a_disk_that_will_be_full_is_named(tmp_path):
    assert list(checks.full_disk("x", tmp_path, room=1, files=1)) == []
    full = list(checks.full_disk("x", tmp_path / "not" / "there", room=2**60, files=2**60))
    assert [each.kind for each in full] == ["disk_full", "no_inodes"]


def test_the_room_that_trials_need_is_estimated_from_those_there_are(config, paths, shared):
    complete(shared, paths, 2)
    (paths.trial(1).root / "checkpoint_best.pt").write_bytes(bytes(10**6))
    room, files = checks.needs(paths, 5000)
    assert room >= 5000 * 10**6
    assert files == 5000 * 4
    assert checks.needs(paths, 0) == (checks.ROOM, checks.FILES)


def test_everything_at_once_is_repaired_once(config, paths, shared, living, tmp_path):
    live = claim(shared, living)
    begin(paths, live)
    begin(paths, claim(shared, "local-999998"))
    shared.study.ask()
    with process(WORKER, config.global_.log_dir, "tune:s") as (running, _):
        running.kill()
    old = paths.trial(1).root / ".config.toml.17.tmp"
    old.touch()
    os.utime(old, (0, 0))
    paths.trial(9).root.mkdir()
    assert run(config, "--fix")[0] == 1  # the folder that belongs to no trial
    after = everything(shared, tmp_path)
    assert [t["state"].name for t in after["trials"].values()] == ["RUNNING", "WAITING", "WAITING"]
    assert live.holds()
    assert not old.exists()
    code, printed = run(config, "--fix", "--json")
    assert code == 1
    report = json.loads(printed)
    assert [each["kind"] for each in report["findings"]] == ["foreign_folder"]
    assert report["healthy"] is False
    assert report["cluster"] == []
    assert everything(shared, tmp_path) == after
