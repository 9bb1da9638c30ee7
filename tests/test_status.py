"""Status and targets: every trial beside its job, as far as study, queue and accounting answer."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from optuna.trial import TrialState, create_trial

from tests import fleet
from tests.cluster import Cluster, wait
from tests.test_doctor import WORKER, process
from tripletkit import cli, fsio
from tripletkit import config as configuration
from tripletkit.cluster import jobs, queue
from tripletkit.config import Config
from tripletkit.monitor import status, tables
from tripletkit.monitor.inventory import spans
from tripletkit.monitor.targets import resolve
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.tune import budget, claims, storage, study
from tripletkit.tune.claims import Worker

HOST = socket.gethostname().partition(".")[0]
HOUR = 3600.0
LONG = "exec sleep 600"


class Ran(NamedTuple):
    """A command in this process: its exit code, what it printed and what it complained about."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=pytest.fail)  # no NaN, no Infinity

    @property
    def trials(self) -> dict[int, list[str]]:
        """The words of each line of the table of trials, without the number, by it."""
        return {int(first): rest for first, *rest in self._table("trial")}

    @property
    def jobs(self) -> dict[str, list[str]]:
        """The words of each line of the table of jobs, without the job, by it."""
        return {first: rest for first, *rest in self._table("job")}

    def _table(self, heading: str) -> list[list[str]]:
        lines = [line.split() for line in self.out.splitlines()]
        begin = next((i for i, words in enumerate(lines) if words[:1] == [heading]), len(lines))
        return list(itertools.takewhile(bool, lines[begin + 2 :]))


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ran]:
    """Runs a command as its user does, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in [name for name in os.environ if name.startswith(configuration.ENV_PREFIX)]:
        monkeypatch.delenv(name)

    def call(config: Config, *arguments: str) -> Ran:
        file = config.global_.log_dir.parent / "given.toml"
        fsio.write_text(file, configuration.dump(config))
        words = [*arguments, "--config", str(file)]
        capsys.readouterr()
        code = cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Ran]:
    return runner(monkeypatch, capsys)


@pytest.fixture
def no_slurm(monkeypatch, tmp_path) -> None:
    """A machine without Slurm."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def write_config(folder: Path, **tuning) -> Config:
    return configuration.with_values(
        Config(),
        global_={"log_dir": folder / "logs", "scratch_dir": folder},
        paths={"val_parquet_path": folder / "none.parquet"},
        tuning={
            "study_name": "s", "storage_path": folder / "study.db", "n_trials": 9, "max_epochs": 4,
            "output_dir": folder / "trials", "objective": "map@r", "sampler": "random", **tuning,
        },
    )  # fmt: skip


@pytest.fixture
def config(tmp_path, no_slurm) -> Config:
    return write_config(tmp_path)


def prepare(config: Config) -> storage.SharedStudy:
    return study.prepare(config, StudyPaths(config.tuning.output_dir / config.tuning.study_name))


@pytest.fixture
def shared(config) -> storage.SharedStudy:
    return prepare(config)


@pytest.fixture
def living(config) -> Iterator[str]:
    """The job of a worker that lives."""
    with process(WORKER, config.global_.log_dir, "tune:s") as (_, job):
        yield job


def claim(
    shared: storage.SharedStudy,
    job: str,
    reports: dict[int, float] | None = None,
    gone: Collection[str] = (),
) -> claims.Claim:
    """A new trial, or that of a job that is gone, in work at this job; with what it reports."""
    found = claims.claim(
        shared,
        Worker(job, 0, HOST, 1),
        99,
        lambda ids: {each: "gone" if each in gone else "running" for each in ids},
    )
    for epoch, value in (reports or {}).items():
        found.trial.report(value, epoch)
    return found


def finished(shared, seconds: float = 60, **facts) -> None:
    """Put a trial into the study that took so long."""
    end = datetime.now()  # noqa: DTZ005 - as Optuna writes it
    trial = create_trial(**{"state": TrialState.COMPLETE, "value": 0.5, **facts})
    trial.datetime_start, trial.datetime_complete = end - timedelta(seconds=seconds), end
    shared.study.add_trial(trial)


def record(
    where: Config, job: str, name: str, hours: float | None = 1.0, **facts: object
) -> jobs.Record:
    """The record of a job that ended so many hours ago; None if it never said so."""
    then = datetime.now(UTC) - timedelta(hours=hours or 0)
    ended = {} if hours is None else {"ended": then.isoformat(), "exit_code": 0}
    started = (then - timedelta(hours=1)).isoformat()
    written = replace(
        jobs.new_record(job, name.partition(":")[0], name, ""),
        **{"started": started, **ended, **facts},
    )
    fsio.write_json(LogPaths(where.global_.log_dir).record(job), asdict(written))
    return written


# Trials


def test_a_trial_stands_beside_its_job(config, shared, living, run):
    claim(shared, living, {1: 0.5, 2: 0.25})
    seen = run(config, "status")
    assert seen.code == 0
    assert seen.err == ""
    headings = seen.out.splitlines()[0].split("  ")
    assert [word.strip() for word in headings if word] == [
        "trial", "state", "job", "job state", "node", "epoch", "best", "last", "elapsed/limit",
    ]  # fmt: skip
    *cells, elapsed = seen.trials[0]
    assert cells == ["RUNNING", living, "RUNNING", HOST, "2/4", "0.5000", "0.2500"]
    assert re.fullmatch(r"0:\d\d", elapsed)
    assert "study s, 9 trials: 1 running, 8 to come" in seen.out
    assert seen.jobs == {}, "its job needs no line of its own"


def test_a_trial_of_each_state(config, shared, living, run):
    complete = claim(shared, living, {1: 0.5, 2: 0.75, 3: 0.25})
    shared.study.tell(complete.trial, 0.75)
    pruned = claim(shared, living, {1: 0.1})
    shared.study.tell(pruned.trial, state=TrialState.PRUNED)
    claim(shared, living).fail("nan", "the loss became nan")
    handed_back = claim(shared, "local-999999", {1: 0.2})
    lives = claim(shared, living)
    handed_back.release()
    shared.study.enqueue_trial({"training.margin": 0.5})

    seen = run(config, "status")
    assert seen.trials[0][:5] == ["COMPLETE", living, HOST, "3/4", "0.7500"]
    assert seen.trials[1][:5] == ["PRUNED", living, HOST, "1/4", "0.1000"]
    assert seen.trials[2][:4] == ["FAIL", "nan", living, "RUNNING"]
    assert seen.trials[3] == ["WAITING", "local-999999", "KILLED", HOST, "1/4", "0.2000", "0.2000",
    ]  # fmt: skip
    assert seen.trials[4][:4] == ["RUNNING", living, "RUNNING", HOST]
    assert seen.trials[5] == ["WAITING"]
    assert (
        "study s, 9 trials: 1 running, 2 waiting, 1 complete, 1 pruned, 1 failed, 3 to come; "
        "best: trial 0, map@r 0.7500 in epoch 2"
    ) in seen.out
    assert lives.holds()

    trials = run(config, "status", "--json").json["trials"]
    wanted = ("number", "state", "cause", "job", "attempt", "epoch", "best", "last")
    assert [tuple(trial[key] for key in wanted) for trial in trials] == [
        (0, "COMPLETE", None, living, 1, 3, 0.75, 0.25),
        (1, "PRUNED", None, living, 1, 1, 0.1, 0.1),
        (2, "FAIL", {"kind": "nan", "message": "the loss became nan"}, living, 1, None, None, None),
        (3, "WAITING", None, "local-999999", 1, 1, 0.2, 0.2),
        (4, "RUNNING", None, living, 1, None, None, None),
        (5, "WAITING", None, None, None, None, None, None),
    ]
    assert [trial["seconds"] is None for trial in trials] == [False] * 3 + [True, False, True]


def test_the_best_of_a_loss_is_the_smallest(tmp_path, no_slurm, run):
    config = write_config(tmp_path, objective="val_loss")
    shared = prepare(config)
    for worst in (0.9, 0.3, 0.6):
        found = claim(shared, "local-1", {1: worst, 2: worst - 0.1, 3: worst})
        shared.study.tell(found.trial, worst - 0.1)
    seen = run(config, "status", "--json").json
    assert seen["study"]["direction"] == "minimize"
    assert seen["study"]["best"] == {"number": 1, "value": pytest.approx(0.2), "epoch": 2}
    assert [trial["best"] for trial in seen["trials"]] == pytest.approx([0.8, 0.2, 0.5])
    assert [trial["last"] for trial in seen["trials"]] == [0.9, 0.3, 0.6]


def test_a_narrow_terminal_leaves_out_the_last_value(config, shared, living, run, monkeypatch):
    claim(shared, living, {1: 0.5, 2: 0.25})
    monkeypatch.setenv("COLUMNS", str(tables.NARROW - 1))
    seen = run(config, "status")
    assert seen.trials[0][5] == "0.5000"
    assert "0.2500" not in seen.out
    assert "last" not in seen.out
    assert all(len(line) < tables.NARROW for line in seen.out.splitlines())


def test_trials_in_work_and_the_newest_are_shown_and_all_shows_all(config, shared, living, run):
    claim(shared, living)
    for _ in range(40):
        finished(shared)
    seen = run(config, "status")
    assert list(seen.trials) == [0, *range(12, 41)]
    assert "... and 11 older trials: --all shows them" in seen.out
    seen = run(config, "status", "--all")
    assert list(seen.trials) == list(range(41))
    assert "older" not in seen.out
    assert len(run(config, "status", "--json").json["trials"]) == 41


def test_the_time_that_is_left_is_that_of_the_finished_trials(config, shared, living, run):
    def left() -> float | None:
        return run(config, "status", "--json").json["study"]["seconds_left"]

    finished(shared, 500)
    finished(shared, 700)
    finished(shared, state=TrialState.FAIL, value=None, seconds=9)
    assert left() is None, "two say nothing about the next"
    finished(shared, 600, state=TrialState.PRUNED, value=None, intermediate_values={1: 0.5})
    claim(shared, living)
    # Of 9 trials, 4 are done, one has just begun and 4 are to come: 600 s each, one at a time.
    assert left() == pytest.approx(3000, abs=30)
    assert "about 50 min left at this pace of 1 worker" in run(config, "status").out
    with process(WORKER, config.global_.log_dir, "tune:s"):
        assert left() == pytest.approx(1500, abs=30)
    with process(WORKER, config.global_.log_dir, "tune:other"):
        assert left() == pytest.approx(3000, abs=30), "another study's worker does not help"


def test_a_worker_may_work_on_several_trials(config, shared, living, run):
    for _ in range(3):
        finished(shared, 600)
    for slot in range(3):
        me = Worker(living, 0, HOST, 1, slot)
        claims.claim(shared, me, 99, lambda ids: dict.fromkeys(ids, "running"))
    seen = run(config, "status", "--json").json
    (job,) = seen["jobs"]
    assert (job["id"], job["trials"]) == (living, [3, 4, 5])
    assert seen["study"]["workers"] == 1
    # 3 have just begun and 3 are to come: 600 s each, three at a time.
    assert seen["study"]["seconds_left"] == pytest.approx(1200, abs=30)
    rows = run(config, "status").trials
    assert [rows[number][:3] for number in (3, 4, 5)] == [["RUNNING", living, "RUNNING"]] * 3


def test_nobody_knows_what_is_left_without_workers_or_after_the_end(config, shared, run):
    for _ in range(8):
        finished(shared)
    assert run(config, "status", "--json").json["study"]["seconds_left"] is None
    finished(shared)
    with process(WORKER, config.global_.log_dir, "tune:s"):
        assert run(config, "status", "--json").json["study"]["seconds_left"] is None


def test_the_study_of_the_workers_counts_and_not_the_file(config, shared, run):
    """Flags of `tune` need not be given again."""
    given = configuration.with_values(config, tuning={"n_trials": 5, "max_epochs": 99})
    seen = run(given, "status", "--json").json["study"]
    assert (seen["total"], seen["max_epochs"]) == (9, 4)


def test_a_database_that_was_moved_is_found_where_the_command_line_says(config, shared, run):
    finished(shared)
    shared.study._storage.remove_session()
    moved = config.tuning.storage_path.with_name("moved")
    moved.mkdir()
    for file in config.tuning.storage_path.parent.glob("study.db*"):
        file.rename(moved / file.name)
    seen = run(config, "status", "--json", "--set", f"tuning.storage_path={moved}/study.db").json
    assert seen["warnings"] == []
    assert seen["study"]["states"]["COMPLETE"] == 1


@pytest.mark.parametrize(
    "command", [["status"], ["wait"], ["logs", "trial:0"], ["study", "show"], ["study", "best"]]
)
def test_commands_find_the_study_where_tune_was_told_to_put_it(tmp_path, no_slurm, run, command):
    config = write_config(tmp_path)
    there = tmp_path / "elsewhere.db"
    shared = prepare(
        configuration.with_values(config, tuning={"storage_path": there, "n_trials": 1})
    )
    finished(shared)
    StudyPaths(config.output_dir / "s").config.unlink()  # else that would say it
    log = StudyPaths(config.output_dir / "s").trial(0).log
    log.parent.mkdir()
    log.write_text("done\n")
    assert not config.tuning.storage_path.exists()
    seen = run(config, *command, "--storage-path", str(there), "--set", "tuning.n_trials=1")
    assert (seen.code, seen.err) == (0, "")


# Lost trials


def test_a_trial_whose_job_is_gone_is_pointed_at(config, shared, living, run):
    claim(shared, living)
    claim(shared, "local-999999")
    claim(shared, "local-999998")
    seen = run(config, "status")
    assert "no job works on trial 1, 2 any more: `tripletkit doctor --fix`" in seen.out
    assert seen.trials[1][:3] == ["RUNNING", "local-999999", "KILLED"]


def test_a_trial_whose_job_cannot_be_seen_is_not_lost(config, shared, run):
    """It is a process of another host, or Slurm's, of which this host has none."""
    claim(shared, "local-17")
    record(config, "local-17", "tune:s", None, host="elsewhere.lan")
    claim(shared, "1234_5")
    seen = run(config, "status")
    assert seen.trials[0][:4] == ["RUNNING", "local-17", "UNKNOWN", "elsewhere"]
    assert seen.trials[1][:3] == ["RUNNING", "1234_5", "UNKNOWN"]
    assert "doctor" not in seen.out


# Jobs


def test_jobs_without_a_trial_have_lines_of_their_own(config, shared, living, run):
    with process(WORKER, config.global_.log_dir, "train:run-1") as (_, train):
        seen = run(config, "status")
    assert seen.jobs[living][:3] == ["tune:s", "RUNNING", HOST]
    assert seen.jobs[train][:3] == ["train:run-1", "RUNNING", HOST]


@pytest.mark.parametrize(
    ("name", "facts", "shown"),
    [
        ("tune:s", {}, None),  # that a worker is done is no news
        ("tidy:s", {}, None),
        ("best:s", {}, "COMPLETED"),
        ("train:run-1", {}, "COMPLETED"),
        ("tune:s", {"exit_code": 1, "message": "no room"}, "FAILED"),
        ("train:run-1", {"exit_code": 3, "message": "no room"}, "FAILED"),
        ("tune:s", {"exit_code": 130, "message": "no room"}, "STOPPED"),
        ("tune:s", {"exit_code": 85}, "STOPPED"),
        ("tune:other", {"exit_code": 1}, None),
        ("best:other", {}, None),
    ],
)
def test_a_job_that_ended_is_news_for_a_day(config, run, name, facts, shown):
    record(config, "local-1", name, 23, **facts)
    seen = run(config, "status")
    if shown is None:
        assert seen.jobs == {}
    else:
        line = seen.jobs["local-1"]
        assert line[:3] == [name, shown, HOST]
        assert line[4:] == facts.get("message", "").split()
    record(config, "local-1", name, 25, **facts)
    assert run(config, "status").jobs == {}


def test_a_process_that_died_without_a_word_is_news_as_long_as_its_log_is_fresh(
    config, shared, run
):
    written = record(config, "local-999999", "tune:s", None)
    log = LogPaths(config.global_.log_dir).err("tune", written.job)
    log.touch()
    assert run(config, "status").jobs == {"local-999999": ["tune:s", "KILLED", HOST]}
    os.utime(log, (time.time() - 25 * HOUR,) * 2)
    assert run(config, "status").jobs == {}


def test_a_job_of_long_ago_is_no_news_when_its_log_is_gone(config, shared, run):
    """Only a trial of the study still knows its name."""
    found = claim(shared, "local-999999", {1: 0.5})
    shared.study.tell(found.trial, 0.5)
    seen = run(config, "status")
    assert seen.trials[0][1] == "local-999999"
    assert seen.jobs == {}


def test_a_process_that_has_just_been_started_waits_for_python(config, shared, run):
    """Until it can write its record, its command line tells that it is ours."""
    logs = LogPaths(config.global_.log_dir)
    logs.root.mkdir()
    command = ["/bin/sh", "-c", "echo $$; read line", str(logs.submitit)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        job = f"local-{started.stdout.readline().strip()}"
        logs.err("tune", job).touch()
        assert run(config, "status").jobs == {job: ["tune:", "PENDING", "starting"]}
        started.communicate("\n")
    assert run(config, "status").jobs == {job: ["tune:", "KILLED"]}


def test_more_jobs_than_there_is_room_for(config, shared, living, run):
    for number in range(20):
        record(config, f"local-{number}", "tune:s", 20 - number, exit_code=1)
    seen = run(config, "status")
    assert len(seen.jobs) == status.Room().jobs
    assert living in seen.jobs, "what runs is worth more than what failed"
    assert "... and 9 older lines of jobs: --all shows them" in seen.out
    assert len(run(config, "status", "--all").jobs) == 21


def test_of_jobs_that_are_done_the_newest_are_named_and_the_others_counted(config, run):
    """What runs, waits or failed is not to be looked for among them."""
    for number in range(9):
        record(config, f"local-{number}", f"train:run-{number}", 20 - number)
    record(config, "local-50", "train:broken", 19.5, exit_code=1, message="no room")
    seen = run(config, "status")
    assert list(seen.jobs) == ["local-50", "local-6", "local-7", "local-8"]
    assert "... and 6 older lines of jobs that are done: --all shows them" in seen.out
    assert len(run(config, "status", "--all").jobs) == 10


def test_two_jobs_that_are_done_are_both_named(config, run):
    record(config, "local-1", "train:a", 2)
    record(config, "local-2", "train:b", 1)
    assert list(run(config, "status").jobs) == ["local-1", "local-2"]


def test_json_has_all_jobs_that_are_done(config, run):
    for number in range(10):
        record(config, f"local-{number}", f"train:run-{number}", 20 - number)
    assert len(run(config, "status", "--json").json["jobs"]) == 10


def test_jobs_that_are_done_give_way_to_those_that_are_not(config, run):
    for number in range(14):
        record(config, f"local-{number}", f"train:run-{number}", 20, exit_code=1)
        record(config, f"local-{100 + number}", f"train:run-{number}", 1)
    seen = run(config, "status")
    assert list(seen.jobs) == [f"local-{number}" for number in range(2, 14)]
    assert "... and 2 older lines of jobs: --all shows them" in seen.out
    assert "... and 14 older lines of jobs that are done: --all shows them" in seen.out


@pytest.mark.parametrize("width", [80, 100, 160])
def test_names_do_not_wrap(config, run, monkeypatch, width):
    name = "train:checkpoints-of-a-long-name-lr0.003-margin0.2"
    said = "what went wrong, " * 20
    record(config, "local-1", name, exit_code=1, message=said, host="a-host-of-a-long-name")
    record(config, "local-2", name)
    run(config, "status")
    monkeypatch.setenv("COLUMNS", str(width))
    seen = run(config, "status")
    lines = [line.rstrip() for line in seen.out.splitlines()]
    assert all(len(line) <= width for line in lines)
    assert seen.jobs["local-2"][0] == tables.middle(name, width // 4)
    assert seen.jobs["local-2"][0].startswith("train:che")
    assert seen.jobs["local-2"][0].endswith("gin0.2")
    if width < tables.NARROW:  # what it says has a line of its own
        assert [line[:25] for line in lines if "wrong" in line] == ["local-1: what went wrong,"]
        assert len(seen.jobs) == 2


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [("abcdef", 6, "abcdef"), ("abcdefg", 6, "abc…fg"), ("abcdefg", 5, "ab…fg"), ("", 3, "")],
)
def test_a_long_name_loses_its_middle(text, most, shown):
    assert tables.middle(text, most) == shown


def test_a_budget_that_is_used_up_leaves_nothing_to_come(config, shared, living, run):
    found = claim(shared, living, {1: 0.5})
    shared.study.tell(found.trial, 0.5)
    assert "8 to come" in run(config, "status").out
    budget.note(shared, budget.Reached(1, "worker-hours", 1, 1, 9))
    said = run(config, "status").out
    assert "budget of 1 worker-hours reached (1 spent): 1 of 9 trials done" in said
    assert "to come" not in said


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (["12_0", "12_1", "12_2", "12_3", "12_7"], ["12_[0-3,7]"]),
        (["12_3", "12_1", "12_10", "12_2"], ["12_[1-3,10]"]),
        (["12_4"], ["12_4"]),
        (["11", "12_0", "local-7", "12_2"], ["11", "12_[0,2]", "local-7"]),
        ([], []),
    ],
)
def test_elements_of_an_array_are_written_as_slurm_does(ids, text):
    assert spans(ids) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (183600, "2-03:00:00")],
)
def test_times_are_written_as_slurm_does(seconds, text):
    assert tables.clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.0, "0.0000"), (0.25, "0.2500"), (-2.0, "-2.0000"), (1e-5, "1.00e-05")]
)  # fmt: skip
def test_small_values_keep_their_digits(value, text):
    assert tables.shown_value(value) == text


# JSON


STUDY = {
    "name", "storage", "objective", "direction", "total", "max_epochs", "states", "best", "workers",
    "seconds_left", "budget",
}  # fmt: skip
TRIAL = {
    "number", "state", "cause", "job", "host", "attempt", "epoch", "best", "last", "seconds",
}  # fmt: skip
JOB = {
    "id", "name", "state", "reason", "node", "elapsed", "limit", "exit_code", "message", "trials",
}  # fmt: skip


def test_json_has_the_documented_keys(config, shared, living, run):
    found = claim(shared, living, {1: 0.5})
    shared.study.tell(found.trial, 0.5)
    claim(shared, living)
    record(config, "local-1", "tune:s", exit_code=1, message="no room")
    seen = run(config, "status", "--json").json
    assert seen.keys() == {"study", "trials", "jobs", "warnings"}
    assert seen["study"].keys() == STUDY
    assert seen["study"]["states"] == {
        "RUNNING": 1, "WAITING": 0, "COMPLETE": 1, "PRUNED": 0, "FAIL": 0,
    }  # fmt: skip
    assert seen["study"]["best"] == {"number": 0, "value": 0.5, "epoch": 1}
    assert seen["study"]["storage"] == str(config.tuning.storage_path)
    assert seen["study"]["workers"] == 1
    assert all(trial.keys() == TRIAL for trial in seen["trials"])
    assert all(job.keys() == JOB for job in seen["jobs"])
    by_id = {job["id"]: job for job in seen["jobs"]}
    assert by_id.keys() == {living, "local-1"}
    assert by_id[living]["trials"] == [1]
    assert (by_id["local-1"]["exit_code"], by_id["local-1"]["message"]) == (1, "no room")
    assert seen["warnings"] == []
    documented = status.as_json.__doc__
    assert all(re.search(rf"\b{key}\b", documented) for key in STUDY | TRIAL | JOB)


def test_values_that_are_no_numbers_are_null_in_json(tmp_path, no_slurm, run):
    config = write_config(tmp_path, objective="val_loss")
    shared = prepare(config)
    claim(shared, "local-1", {1: math.nan})
    claim(shared, "local-2", {1: 0.5, 2: math.inf})
    infinite = claim(shared, "local-3", {1: math.inf})
    shared.study.tell(infinite.trial, math.inf)
    seen = run(config, "status", "--json").json
    assert [(t["epoch"], t["best"], t["last"]) for t in seen["trials"]] == [
        (1, None, None), (2, 0.5, None), (1, None, None),
    ]  # fmt: skip
    assert seen["study"]["best"] is None
    assert run(config, "status").code == 0


def test_json_once_or_a_table_again_and_again(config, run):
    refused = run(config, "status", "--json", "--watch")
    assert refused.code == 2
    assert "exclude each other" in refused.err


# What cannot be asked is less to show, and no error


def test_without_a_study_there_is_a_word_about_it(config, living, run):
    seen = run(config, "status")
    assert seen.code == 0
    assert f"WARNING there is no study 's' in {config.tuning.storage_path}" in seen.err
    assert seen.jobs[living][:2] == ["tune:s", "RUNNING"]
    seen = run(config, "status", "--json").json
    assert (seen["study"], seen["trials"]) == (None, [])
    assert [job["id"] for job in seen["jobs"]] == [living]
    assert len(seen["warnings"]) == 1


def test_nothing_at_all(config, run):
    seen = run(config, "status")
    assert (seen.code, seen.out.strip()) == (0, "no jobs")
    assert run(config, "status", "--json").json["jobs"] == []


@pytest.mark.parametrize("away", ["server", "file"])
def test_a_storage_that_does_not_answer_is_a_warning(tmp_path, no_slurm, run, away):
    config = write_config(tmp_path)
    if away == "server":  # nobody listens at this port
        url = "postgresql://tuner@127.0.0.1:9/s"
        config = configuration.with_values(config, tuning={"storage_url": url})
    else:
        config.tuning.storage_path.write_text("not a database, since the disk was full" * 99)
    with process(WORKER, config.global_.log_dir, "tune:s") as (_, job):
        began = time.monotonic()
        seen = run(config, "status")
        assert time.monotonic() - began < 5, "a look does not wait for the storage"
    assert seen.code == 0
    assert len(re.findall("WARNING", seen.err)) == 1
    assert "127.0.0.1:9" in seen.err or "study.db" in seen.err
    assert seen.jobs[job][:2] == ["tune:s", "RUNNING"]


# Again and again


# The command, which asks Slurm more often than it does elsewhere whether the jobs are over.
COMMAND = (
    "from tripletkit.monitor import logs\nlogs.ASK = (0.5, 1.0)\n"
    "from tripletkit.cli import main\nmain()"
)


class Screen:
    """What a process has printed so far, on a terminal or into a pipe."""

    def __init__(self, *arguments: object, terminal: bool) -> None:
        self._read = b""
        self._end, theirs = os.openpty() if terminal else os.pipe()
        if terminal:
            termios.tcsetwinsize(theirs, (40, 120))
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(self._end, False)

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        _ = self.text
        os.close(self._end)
        self._end = -1

    @property
    def text(self) -> str:
        """All of it; also afterwards."""
        with contextlib.suppress(OSError):  # nothing there now, or the terminal is closed
            while data := os.read(self._end, 65536):
                self._read += data
        return self._read.decode(errors="ignore")

    def until(self, pattern: str, deadline: float = 30) -> None:
        fleet.until(
            lambda: re.search(pattern, self.text, re.DOTALL), lambda: self.text, deadline=deadline
        )

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


def test_watch_shows_what_has_changed_until_it_is_interrupted(config, shared, run):
    run(config, "status")  # writes the file
    file = config.global_.scratch_dir / "given.toml"
    arguments = ["status", "--watch", "--interval", "0.5", "-c", file]
    finished(shared)
    with Screen(*arguments, terminal=False) as plain, Screen(*arguments, terminal=True) as screen:
        for each in (plain, screen):
            each.until("1 complete")
        finished(shared)
        for each in (plain, screen):
            each.until("1 complete.*2 complete.*2 complete")
            assert each.interrupt() == 0, each.text
            assert "Traceback" not in each.text
        stamps = re.findall(
            r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d$", plain.text, re.MULTILINE
        )
        assert len(stamps) >= 3
        assert "\x1b" not in plain.text
        assert "Ctrl-C ends it" in screen.text
        assert "\x1b[1A" in screen.text, "in place"


# On a cluster


class Site(NamedTuple):
    """A study of which real jobs run, wait and fail, and these jobs by what becomes of them."""

    config: Config
    jobs: dict[str, str]


@pytest.fixture(scope="module")
def there(cluster: Cluster, tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    config = write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - cluster.environment.keys():
            patch.delenv(name)
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        yield Site(config, happen(cluster, config, folder))
        cluster.reset()


def happen(cluster: Cluster, config: Config, folder: Path) -> dict[str, str]:
    logs = LogPaths(config.global_.log_dir)
    logs.root.mkdir()
    (folder / "worker.py").write_text(
        WORKER.replace("sys.stdin.read()", "__import__('time').sleep(600)")
    )

    def sbatch(command: str, *options: str, name: str = "tune:s") -> str:
        stage = name.partition(":")[0]
        id_ = "%A_%a" if any("--array" in option for option in options) else "%j"
        files = (f"--output={logs.out(stage, id_)}", f"--error={logs.err(stage, id_)}")
        return cluster.sbatch(command, *files, f"--job-name={name}", "--time=30", *options)

    worker = f"exec {sys.executable} {folder}/worker.py {logs.root} tune:s"
    there = {
        "array": sbatch(worker, "--array=0-2"),
        "lost": sbatch(LONG),
        "failed": sbatch(f"until [ -e {folder}/fail ]; do sleep 0.1; done; exit 3"),
        "waiting": sbatch(worker, "--array=0-3", "--hold"),
        "train": sbatch(LONG, name="train:run-1"),
        "elsewhere": sbatch(LONG, "--output=/dev/null", "--error=/dev/null", name="train:run-2"),
        "other": sbatch(LONG, name="tune:other"),
        "foreign": sbatch(LONG, name="s"),
    }
    there["after"] = sbatch("true", f"--dependency=afterany:{there['array']}", name="tidy:s")
    for name in there.keys() - {"waiting", "after"}:
        cluster.wait_state(there[name], {"RUNNING"})
    array = there["array"]
    shared = prepare(config)
    claim(shared, f"{array}_0", {1: 0.5, 2: 0.25})
    claim(shared, f"{array}_1")
    claim(shared, there["lost"])
    done = claim(shared, f"{array}_2", {4: 0.75})
    shared.study.tell(done.trial, 0.75)

    ended = {there["lost"], there["failed"]}

    def known(field: str) -> set[str]:
        return {
            run.id for run in queue.past(ended) if getattr(run, field) not in ("", "allocation")
        }

    wait(lambda: known("name") == ended, lambda: "the accounting has not heard of them", 60)
    (folder / "fail").touch()
    cluster.run("scancel", there["lost"])
    wait(lambda: known("end") == ended, lambda: "the accounting knows no end", 60)
    cluster.wait_state(there["lost"], {"CANCELLED"})
    records = [logs.record(f"{array}_{element}") for element in range(3)]
    wait(lambda: all(map(jobs.read, records)), lambda: "no records", 60)
    return there


def test_trials_beside_their_slurm_jobs(there, run):
    seen = run(there.config, "status")
    assert (seen.code, seen.err) == (0, "")
    array = there.jobs["array"]
    node = {row.id: row.node for row in queue.queued([array])}
    *cells, times = seen.trials[0]
    assert cells == [
        "RUNNING", f"{array}_0", "RUNNING", node[f"{array}_0"], "2/4", "0.5000", "0.2500",
    ]  # fmt: skip
    assert re.fullmatch(r"\d:\d\d/30:00", times)
    *cells, times = seen.trials[1]
    assert cells == ["RUNNING", f"{array}_1", "RUNNING", node[f"{array}_1"]]
    assert re.fullmatch(r"\d:\d\d/30:00", times)
    assert "study s, 9 trials: 3 running, 1 complete, 5 to come" in seen.out
    assert "best: trial 3, map@r 0.7500 in epoch 4" in seen.out


def test_a_lost_trial_shows_how_its_job_ended(there, run):
    seen = run(there.config, "status")
    assert seen.trials[2][:3] == ["RUNNING", there.jobs["lost"], "CANCELLED"]
    assert "no job works on trial 2 any more: `tripletkit doctor --fix`" in seen.out


def test_slurm_jobs_without_a_trial(there, run):
    seen = run(there.config, "status")
    ids = there.jobs
    assert seen.jobs[f"{ids['array']}_2"][:2] == ["tune:s", "RUNNING"]
    held = ["tune:s", "PENDING", "JobHeldUser"]
    assert seen.jobs[f"{ids['waiting']}_[0-3]"] == [*held, "4", "jobs"]
    assert seen.jobs[ids["after"]][:3] == ["tidy:s", "PENDING", "Dependency"]
    assert seen.jobs[ids["failed"]][:2] == ["tune:s", "FAILED"]
    assert seen.jobs[ids["train"]][:2] == ["train:run-1", "RUNNING"]
    assert len(seen.jobs) == 5, "others are not ours, or stand beside a trial"


def test_slurm_jobs_as_json(there, run):
    seen = run(there.config, "status", "--json").json
    by_id = {job["id"]: job for job in seen["jobs"]}
    array = there.jobs["array"]
    working = by_id[f"{array}_0"]
    assert (working["state"], working["limit"], working["trials"]) == ("RUNNING", 1800, [0])
    assert 0 <= working["elapsed"] < 600
    assert by_id[f"{there.jobs['waiting']}_3"]["reason"] == "JobHeldUser"
    assert by_id[there.jobs["lost"]]["state"] == "CANCELLED"
    assert seen["study"]["workers"] == 3
    assert all(job.keys() == JOB for job in seen["jobs"])


def test_a_slurm_job_that_failed_drops_out_after_a_day(there, run):
    logs = LogPaths(there.config.global_.log_dir).of_job(there.jobs["failed"])
    assert len(logs) == 2
    for log in logs:
        os.utime(log, (time.time() - 25 * HOUR,) * 2)
    assert there.jobs["failed"] not in run(there.config, "status").jobs
    for log in logs:
        os.utime(log)
    assert there.jobs["failed"] in run(there.config, "status").jobs


def wrapped_slurm(folder: Path, *names: str) -> Path:
    """Slurm's programs of these names, and a file in which each writes that it was called."""
    calls = folder / "calls"
    calls.touch()
    for name in names:
        program = folder / name
        program.write_text(f'#!/bin/sh\necho {name} >>{calls}\nexec {shutil.which(name)} "$@"\n')
        program.chmod(0o755)
    return calls


def test_one_look_asks_the_queue_and_the_accounting_once(there, run, tmp_path, monkeypatch):
    calls = wrapped_slurm(tmp_path, "sbatch", "srun", "squeue", "sacct", "scontrol", "sinfo")
    monkeypatch.setenv("PATH", str(tmp_path))
    run(there.config, "status")
    assert sorted(calls.read_text().split()) == ["sacct", "squeue"]


@pytest.mark.parametrize("away", ["no squeue", "no answer"])
def test_a_slurm_that_does_not_answer_is_a_warning(there, run, tmp_path, monkeypatch, away):
    if away == "no squeue":
        wrapped_slurm(tmp_path, "sbatch", "srun")
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        (tmp_path / "slurm.conf").touch()
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    seen = run(there.config, "status")
    assert seen.code == 0
    assert seen.err.count("WARNING") == 1
    assert "cannot ask Slurm: squeue" in seen.err
    for trial, job in ((0, f"{there.jobs['array']}_0"), (2, there.jobs["lost"])):
        assert seen.trials[trial][:3] == ["RUNNING", job, "UNKNOWN"]
    assert "doctor" not in seen.out, "what cannot be seen is not lost"
    seen = run(there.config, "status", "--json").json
    assert len(seen["warnings"]) == 1
    assert len(seen["trials"]) == 4


def test_a_job_that_the_accounting_has_no_name_for_keeps_its_own(there, run, tmp_path, monkeypatch):
    """Slurm says "allocation" when it heard of the end before it heard of the start."""
    wrapped_slurm(tmp_path, "sbatch", "srun", "squeue")
    sacct = f'{shutil.which("sacct")} "$@" | {shutil.which("sed")} s/tune:s/allocation/'
    (tmp_path / "sacct").write_text(f"#!/bin/sh\n{sacct}\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = run(there.config, "status")
    assert seen.jobs[there.jobs["failed"]][:2] == ["tune:", "FAILED"]


def test_where_the_accounting_is_off_a_job_that_left_is_gone(there, run, tmp_path, monkeypatch):
    lines = Path(os.environ["SLURM_CONF"]).read_text().splitlines()
    kept = [line for line in lines if not line.startswith("AccountingStorage")]
    off = tmp_path / "slurm.conf"
    off.write_text("\n".join([*kept, "AccountingStorageType=accounting_storage/none", ""]))
    monkeypatch.setenv("SLURM_CONF", str(off))
    seen = run(there.config, "status")
    assert (seen.code, seen.err) == (0, "")
    assert seen.trials[2][:3] == ["RUNNING", there.jobs["lost"], "GONE"]
    assert "no job works on trial 2 any more" in seen.out
    assert seen.jobs[there.jobs["failed"]] == ["tune:", "GONE"]
    assert seen.trials[0][2] == "RUNNING"


def test_an_accounting_that_does_not_answer_is_a_warning(there, run, tmp_path, monkeypatch):
    wrapped_slurm(tmp_path, "sbatch", "srun", "squeue")
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = run(there.config, "status")
    assert seen.code == 0
    assert "WARNING cannot ask the accounting: sacct: command not found" in seen.err
    assert seen.trials[2][2] == "GONE"


# What users may name


def named(text: str | None, config: Config) -> tuple[str, list[str]]:
    """What a text names, and the jobs of that."""
    target = resolve(text, config)
    return str(target), list(target.jobs())


def test_jobs_and_trials_of_a_cluster_by_name(there):
    ids, config = there.jobs, there.config
    array, waiting = ids["array"], ids["waiting"]
    elements = [f"{array}_{element}" for element in range(3)]
    assert named(f"job:{array}", config) == (f"job {array}", elements)
    assert named(f"{array}_1", config) == (f"job {array}_1", [f"{array}_1"])
    assert named(f"job:{waiting}_2", config) == (f"job {waiting}_2", [f"{waiting}_2"])
    assert named(f"job:{ids['lost']}", config) == (f"job {ids['lost']}", [ids["lost"]])
    assert named("trial:2", config) == ("trial 2", [ids["lost"]])
    assert named("run-1", config) == ("run run-1", [ids["train"]])
    assert named("other", config) == ("study other", [ids["other"]])
    # That the accounting knows "failed" to be of the study is not asked for here.
    kind, found = named(None, config)
    assert kind == "study s"
    assert set(found) == {
        *elements, *(f"{waiting}_{element}" for element in range(4)),
        ids["lost"], ids["after"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Config:
    """A study with trials 0 to 2, another one, and records of jobs of both and of runs."""
    config = write_config(tmp_path_factory.mktemp("several"))
    shared = prepare(config)
    for job in ("12_0", "12_1", "local-77"):
        claim(shared, job)
    for job in ("1", "12_0", "12_1", "local-77"):
        record(config, job, "tune:s")
    record(config, "7", "train:run-1")
    record(config, "8", "evaluate:run-1")
    record(config, "13", "tune:gone")
    report = config.global_.log_dir / "report.toml"
    report.write_text('[paths]\ncheckpoint_dir = "run-1"\n')
    record(config, "14", "report:s", config=str(report))
    record(config, "15", "report:run-1", config=str(report))
    folder = config.global_.log_dir
    (folder / "best.toml").write_text(f'[paths]\ncheckpoint_dir = "{folder}/final"\n')
    record(config, "9", "best:s", config=str(folder / "best.toml"))
    prepare(configuration.with_values(config, tuning={"study_name": "prepared"}))
    return config


@pytest.fixture
def many(several, no_slurm) -> Config:
    return several


@pytest.mark.parametrize(
    ("text", "target", "ids"),
    [
        (None, "study s", ["1", "9", "12_0", "12_1", "14", "local-77"]),
        ("s", "study s", ["1", "9", "12_0", "12_1", "14", "local-77"]),
        ("gone", "study gone", ["13"]),  # known by a job of its
        ("prepared", "study prepared", []),  # known by its folder
        ("2", "trial 2", ["local-77"]),
        ("1", "trial 1", ["12_1"]),  # the study has this trial, whatever jobs there are
        ("job:1", "job 1", ["1"]),
        ("trial:1", "trial 1", ["12_1"]),
        ("trial_00001", "trial 1", ["12_1"]),  # as its folder is called
        ("7", "job 7", ["7"]),  # there is no trial 7
        ("12", "job 12", ["12_0", "12_1"]),
        ("12_1", "job 12_1", ["12_1"]),
        ("local-77", "job local-77", ["local-77"]),
        ("job:local-77", "job local-77", ["local-77"]),
        ("run-1", "run run-1", ["7", "8", "15"]),
        ("final", "run final", ["9"]),  # the folder of a final training
    ],
)
def test_what_a_name_means(many, text, target, ids):
    assert named(text, many) == (target, ids)


def test_a_job_that_never_started_is_known_by_what_submitit_left(config):
    submitit = LogPaths(config.global_.log_dir).submitit
    submitit.mkdir(parents=True)
    (submitit / "55_submission.sh").touch()
    (job,) = resolve("55", config).jobs().values()
    assert (job.id, job.state, job.over) == ("55", "GONE", True)


def test_a_trial_is_known_by_its_folder_while_the_storage_is_away(config):
    StudyPaths(config.output_dir / "s").trial(3).root.mkdir(parents=True)
    config.tuning.storage_path.write_text("not a database" * 99)
    assert named("3", config) == ("trial 3", [])


@pytest.mark.parametrize("text", ["trial:7", "job:2", "job:12_7", "99", "run-2", "../s", "", "S"])
def test_what_a_name_does_not_mean_is_said_with_what_there_is(many, run, text):
    seen = run(many, "logs", text)
    assert seen.code == 2
    said = seen.err.splitlines()
    assert said[:-1] == [
        f"error: nothing here is called {text!r}",
        "hint: study s, trials 0 to 2",
        "studies: gone, prepared",
        "runs: final, run-1",
        "jobs: 1, 7, 8, 9, 12_[0-1], 13, 14, 15, local-77",
    ]
    for folder in (many.output_dir / "s", many.global_.log_dir):
        assert str(folder) in said[-1]


def test_an_unknown_name_says_what_could_not_be_asked(config, run):
    seen = run(config, "logs", "7")
    assert seen.code == 2
    assert f"there is no study 's' in {config.tuning.storage_path}" in seen.err


def test_another_study_has_its_own_storage(config, tmp_path, run):
    """What its workers know counts, not the file that is about the first study."""
    elsewhere = {"study_name": "b", "storage_path": tmp_path / "b.db", "n_trials": 5}
    other = configuration.with_values(config, tuning=elsewhere)
    claim(prepare(other), "local-5")
    target = resolve("b", config)
    assert target.inventory.total() == 5
    assert [trial.number for trial in target.trials()] == [0]
    assert list(target.jobs()) == ["local-5"]
    seen = run(config, "status", "--study-name", "b", "--json").json
    assert (seen["study"]["name"], seen["study"]["total"]) == ("b", 5)


# From the submission to the end


def test_a_search_on_the_cluster_is_seen_from_its_start_to_its_end(slurm, tmp_path, run):
    file = fleet.write_config(tmp_path)
    config = configuration.load(file, environ={})
    fleet.tripletkit(
        "tune", "-c", file, "--cluster", "slurm", "--workers", "2", "--trials-per-worker", "2",
        "--max-epochs", "12",
    )  # fmt: skip
    with Screen("logs", "--follow", "-c", file, terminal=False) as follower:
        looks: list[dict] = []

        def both_train() -> bool:
            looks.append(run(config, "status", "--json").json)
            return [t["state"] for t in looks[-1]["trials"] if t["epoch"]] == ["RUNNING"] * 2

        fleet.until(both_train, lambda: f"{looks[-1]}\n{follower.text}", deadline=120)
        look = looks[-1]
        by_id = {job["id"]: job for job in look["jobs"]}
        array = look["trials"][0]["job"].partition("_")[0]
        assert {trial["job"] for trial in look["trials"]} == {f"{array}_0", f"{array}_1"}
        for trial in look["trials"]:
            job = by_id[trial["job"]]
            assert (job["name"], job["state"], job["limit"]) == ("tune:small", "RUNNING", 1800)
            assert job["trials"] == [trial["number"]]
            assert job["node"] in ("n1", "n2", "n3", "n4")
            assert 0 < trial["best"] <= 1
        (tidy,) = [job for job in look["jobs"] if job["name"] == "tidy:small"]
        assert (tidy["state"], tidy["reason"]) == ("PENDING", "Dependency")
        assert (look["study"]["total"], look["study"]["workers"]) == (4, 2)

        fleet.until(
            lambda: follower.text and follower.process.poll() is not None,
            lambda: follower.text,
            deadline=120,
        )
        assert follower.process.returncode == 0, follower.text
    seen = run(config, "status")
    assert [words[0] for words in seen.trials.values()] == ["COMPLETE"] * 4
    assert "study small, 4 trials: 4 complete; best: trial" in seen.out
    assert seen.jobs == {}
    text = follower.text
    for element in (0, 1):
        assert f"[tune_{array}_{element}] " in text
    for trial in range(4):
        assert (
            len(re.findall(rf"^\[tune_{array}_[01]\] .*trial {trial}: complete", text, re.M)) == 1
        )
    assert re.search(rf"^\[tidy_{tidy['id']}\] ", text, re.M)
