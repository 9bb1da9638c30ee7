"""`tripletkit cancel` and `tripletkit wait`: real jobs, real processes, real studies.

Most jobs here are stand-ins that sleep under the name of a worker; the trials are signed for them.
Some are workers that train.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from tests import fleet
from tests.cluster import ACCOUNT, Cluster, wait
from tripletkit import cli, fsio, log
from tripletkit import config as configuration
from tripletkit.cluster import jobs, launch, queue
from tripletkit.config import Config, Slurm
from tripletkit.monitor import control
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.tune import budget, claims, storage, study
from tripletkit.tune.claims import Worker

SLEEP = "exec sleep 600"
# A background worker, as far as others can see: it holds its lock, and lives until told to end.
HOLDER = """
import fcntl, os, signal, sys
lock = open(f"{sys.argv[1]}/local-{os.getpid()}.lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Site:
    """A folder with a config.toml and the study `s`, the jobs of its cluster, and the commands."""

    def __init__(self, folder: Path, database: Path, capsys, slurm: Cluster | None = None) -> None:
        self.folder = folder
        self.capsys = capsys
        self.slurm = slurm
        self.logs = LogPaths(folder / "logs")
        self.logs.root.mkdir()
        shutil.copy(database, folder / "study.db")
        self.config = configuration.with_values(
            Config(),
            global_={"log_dir": self.logs.root},
            paths={"val_parquet_path": folder / "val.parquet"},
            tuning={
                "study_name": "s", "storage_path": folder / "study.db", "n_trials": 9,
                "output_dir": folder / "trials", "sampler": "random", "pruner": "none",
            },
        )  # fmt: skip
        self.file = folder / "config.toml"
        fsio.write_text(self.file, configuration.dump(self.config))
        self.shared = self.study("s")

    def study(self, name: str, **tuning: Any) -> storage.SharedStudy:
        """Prepare a study, as `tripletkit tune` does."""
        config = configuration.with_values(self.config, tuning={"study_name": name, **tuning})
        return study.prepare(config, StudyPaths(config.output_dir / name))

    def job(self, name: str = "tune:s", *options: str, command: str = SLEEP) -> str:
        """A job with the name, and the logs, of one of ours."""
        assert self.slurm
        identity = "%A_%a" if any("--array" in option for option in options) else "%j"
        log = f"{self.logs.out(name.partition(':')[0], identity)}"
        return self.slurm.sbatch(
            command, f"--job-name={name}", f"--output={log}", f"--error={log[:-3]}err",
            "--mem=100", *options,
        )  # fmt: skip

    def running(self, *ids: str) -> None:
        """Wait until they run."""
        for job in ids:
            self.slurm.wait_state(job, {"RUNNING"})

    def queue(self) -> dict[str, str]:
        """The jobs and elements in the queue, and their states."""
        rows = self.slurm.run("squeue", "--array", "-h", "-o", "%i %T").splitlines()
        return dict(row.split() for row in rows)

    def run(self, *arguments: str) -> Said:
        """A command in this process."""
        self.capsys.readouterr()
        code = self.call(*arguments)
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.err
        return Said(code, printed.out, printed.err)

    def call(self, *arguments: str) -> int:
        words = [*arguments, "--config", str(self.file)]
        return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A storage with its tables, which take a while, and without a study of ours."""
    folder = tmp_path_factory.mktemp("database")
    tuning = {"study_name": "nobodys", "storage_path": folder / "study.db"}
    storage.create(configuration.with_values(Config(), tuning=tuning).tuning)
    with closing(sqlite3.connect(folder / "study.db")) as opened:
        opened.execute("VACUUM INTO ?", (str(folder / "template.db"),))
    return folder / "template.db"


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Nobody here needs to spare a controller."""
    monkeypatch.setattr(control, "POLLS", (0.1, 0.3))
    for name in [name for name in os.environ if name.startswith(configuration.ENV_PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def site(slurm, tmp_path, database, capsys) -> Site:
    """On the cluster."""
    return Site(tmp_path, database, capsys, slurm)


@pytest.fixture
def here(tmp_path, database, capsys, monkeypatch) -> Site:
    """On a machine without Slurm."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return Site(tmp_path, database, capsys)


def sign(shared: storage.SharedStudy, job: str, slot: int = 0) -> int:
    """A new trial in work at this job, with a parameter and a report; its number."""
    me = Worker(job=job, restart=0, host=socket.gethostname(), pid=1, slot=slot)
    found = claims.claim(shared, me, 999, lambda ids: dict.fromkeys(ids, "running"))
    found.trial.suggest_float("margin", 0.1, 1)
    found.trial.report(0.25, 1)
    return found.trial.number


def tell(shared: storage.SharedStudy, number: int, **how: Any) -> None:
    """End a trial, as its worker would."""
    how = how or {"values": 0.5}
    shared.study.tell(number, **how)


def states(shared: storage.SharedStudy) -> list[str]:
    return [trial.state.name for trial in shared.study.get_trials()]


def kept(trial: FrozenTrial) -> tuple:
    """What a trial must not lose when its worker does."""
    return trial.number, trial.params, trial.intermediate_values, trial.user_attrs


class Process:
    """A background worker, which has started and may say how it ends."""

    def __init__(self, site: Site, name: str, *how: str) -> None:
        folder = site.logs.lock("x").parent
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-I", "-S", "-c", HOLDER, str(folder), *how]
        self.running = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.id = f"local-{int(self.running.stdout.readline())}"
        record = jobs.new_record(self.id, name.partition(":")[0], name, "")
        self.record = replace(record, pid=self.running.pid)
        self.file = site.logs.record(self.id)
        fsio.write_json(self.file, self.record.__dict__)

    def lives(self) -> bool:
        return self.running.poll() is None

    def ends(self, code: int) -> None:
        """With its last words."""
        last = replace(self.record, ended=fsio.timestamp(), exit_code=code, message="as told")
        fsio.write_json(self.file, last.__dict__)
        self.running.communicate()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        with self.running:
            self.running.kill()


# Cancel: what ends, and what goes on


class World(NamedTuple):
    """Jobs of every kind, of two studies and a run."""

    array: str  # two workers of `s` at work, one that waits
    worker: str  # a third
    tidy: str
    best: str
    train: str
    evaluate: str  # waits for `train`
    other: str  # a worker of the study `t`


@pytest.fixture
def world(site) -> World:
    array = site.job("tune:s", "--array=0-2%2")
    worker, train, other = site.job(), site.job("train:run_1"), site.job("tune:t")
    found = World(
        array=array,
        worker=worker,
        tidy=site.job("tidy:s", f"--dependency=afterany:{array}"),
        best=site.job("best:s"),
        train=train,
        evaluate=site.job("evaluate:run_1", f"--dependency=afterany:{train}"),
        other=other,
    )
    site.running(f"{array}_0", f"{array}_1", worker, found.best, train, other)
    return found


CASES = {
    "the parts of it, one by one": [
        ("{array}_2", "{array}_2", []),
        ("{array}_1", "{array}_1", [1]),
        ("trial:0", "{array}_0", [0]),
        ("job:{worker}", "{worker}", [2]),
        ("run_1", "{train} {evaluate}", []),
        ("{best}", "{best}", []),
        ("t", "{other}", [0]),
    ],
    "an array": [("{array}", "{array}_0 {array}_1 {array}_2", [0, 1])],
    "a study": [("s", "{array}_0 {array}_1 {array}_2 {worker} {tidy}", [0, 1, 2])],
}


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES.keys())
def test_what_is_cancelled_ends_and_nothing_else(site, world, cases):
    """Of each case: the target, the jobs that end, the trials that are handed back."""
    mine, theirs = site.shared, site.study("t")
    for number, job in enumerate((f"{world.array}_0", f"{world.array}_1", world.worker)):
        assert sign(mine, job) == number
    assert sign(theirs, world.other) == 0
    for target, ending, handed_back in cases:
        changed, left_alone = (theirs, mine) if target == "t" else (mine, theirs)
        before, untouched = changed.study.get_trials(), left_alone.study.get_trials()
        there = site.queue()

        said = site.run("cancel", target.format(**world._asdict()))

        assert said.code == 0, said.err
        gone = set(ending.format(**world._asdict()).split())
        assert gone <= there.keys()
        now = site.queue()
        assert now.keys() == there.keys() - gone
        for job, state in now.items():  # what waited for one that ended may run now
            assert state in {there[job], "RUNNING"}
        assert left_alone.study.get_trials() == untouched
        for was, trial in zip(before, changed.study.get_trials(), strict=True):
            back = was.number in handed_back
            assert trial.state.name == ("WAITING" if back else was.state.name)
            assert kept(trial) == kept(was)
            assert (f"trial {was.number}: its worker is gone" in said.out) == back


def test_what_was_cancelled_is_said(site, world):
    sign(site.shared, f"{world.array}_0")
    out = site.run("cancel", "s").out.splitlines()
    assert f"cancelled {world.array}_[0-2] tune:s (2 RUNNING, 1 PENDING)" in out
    assert f"cancelled {world.worker} tune:s (1 RUNNING)" in out
    assert f"cancelled {world.tidy} tidy:s (1 PENDING)" in out
    assert out[-3:] == [
        "trial 0: its worker is gone; it waits for the next one",
        "study s, 9 trials: 1 waiting, 8 to come",
        "`tripletkit tune` with the same flags goes on with what is left",
    ]


def test_a_trial_and_an_array_of_the_same_number(site):
    """Young clusters have small numbers: the trial's worker ends, not the array called like it."""
    array = site.job("tune:s", "--array=0-1")
    for _ in range(int(array)):
        site.shared.study.add_trial(optuna.trial.create_trial(value=0.5))
    assert str(sign(site.shared, f"{array}_0")) == array
    site.running(array)
    assert site.run("cancel", f"trial:{array}").code == 0
    assert site.queue() == {f"{array}_1": "RUNNING"}


@pytest.mark.parametrize("how", [{"values": 0.5}, {"state": TrialState.WAITING}])
def test_the_last_worker_of_a_trial_that_is_not_in_work_goes_on(site, how):
    job = site.job()
    site.running(job)
    number = sign(site.shared, job)
    if "values" in how:
        tell(site.shared, number)
    else:
        found = site.shared.study.get_trials()[number]
        site.shared.study._storage.set_trial_state_values(found._trial_id, TrialState.WAITING)
    state = states(site.shared)[number]
    said = site.run("cancel", "trial:0")
    assert (said.code, said.out) == (0, f"trial 0 is {state}: no job works on it\n")
    assert site.queue() == {job: "RUNNING"}
    assert states(site.shared) == [state]


def test_where_nothing_is_active_the_trials_are_still_looked_after(site):
    job = site.job(command="true")
    site.slurm.wait_state(job, {"COMPLETED"})
    wait(lambda: not site.queue(), lambda: str(site.queue()), 30)
    sign(site.shared, job)
    for target in ("s", f"job:{job}"):
        said = site.run("cancel", target)
        assert said.code == 0
        assert "nothing of it runs or waits in the queue" in said.out
    assert states(site.shared) == ["WAITING"]


def test_without_its_storage_a_study_is_cancelled_all_the_same(site):
    job = site.job("tune:away")
    site.running(job)
    (site.config.output_dir / "away").mkdir()
    (site.config.output_dir / "away" / "study.json").touch()
    said = site.run("cancel", "away")
    assert said.code == 0
    assert site.queue() == {}
    assert "cannot look after the trials of away: there is no study 'away'" in said.err
    assert "`tripletkit doctor --fix` can, later" in said.err


@pytest.fixture
def away(slurm, monkeypatch) -> Callable[[bool], None]:
    """Whether the controller answers us: `away(True)` lets it vanish, `away(False)` brings it back."""
    path = slurm.folder / "away.conf"
    text = (slurm.folder / "slurm.conf").read_text()
    path.write_text(re.sub(r"(?m)^(SlurmctldPort|MessageTimeout)=.*", r"\1=2", text))
    monkeypatch.setattr(queue, "PAUSES", ())
    found = slurm.environment["SLURM_CONF"]
    return lambda gone: monkeypatch.setenv("SLURM_CONF", str(path) if gone else found)


def test_while_slurm_is_silent_nobody_says_that_nothing_runs(site, away):
    """A worker that has not started yet is known to Slurm alone."""
    held = site.job("db:x", "--hold")
    worker = launch.Job(
        "tune", "tune:s", Slurm(account=ACCOUNT, mem="100M", gpus=0), site.logs.root,
        dependency=f"afterok:{held}",
    )  # fmt: skip
    (job,) = launch.submit(worker, late(site, "tune:s"), cluster="slurm").jobs
    away(True)
    said = site.run("cancel", f"job:{job}")
    assert (said.code, said.out) == (4, "")
    assert "Unable to contact slurm controller" in said.err
    assert "scontrol ping" in said.err
    with Process(site, "tune:s") as local:  # what can be done is done
        number = sign(site.shared, local.id)
        said = site.run("cancel", "s")
        assert local.running.wait(30) == -signal.SIGTERM
    assert said.code == 4
    assert "nothing of it runs" not in said.out
    assert states(site.shared)[number] == "WAITING"
    away(False)
    assert site.queue().keys() == {held, job}
    assert site.run("cancel", "s").code == 0
    assert site.queue().keys() == {held}


# Cancel: processes of this machine


def test_a_background_worker_is_cancelled(here):
    with Process(here, "tune:s") as worker, Process(here, "tune:t") as other:
        sign(here.shared, worker.id)
        (before,) = here.shared.study.get_trials()
        said = here.run("cancel", worker.id)
        assert said.code == 0
        assert f"cancelled {worker.id} tune:s (1 RUNNING)" in said.out
        assert worker.running.wait(30) == -signal.SIGTERM
        assert other.lives()
    (after,) = here.shared.study.get_trials()
    assert after.state.name == "WAITING"
    assert kept(after) == kept(before)


def test_a_process_with_the_id_of_an_old_worker_is_not_touched(here):
    """Process ids come again: this one works for the study `t`, an older one did for `s`."""
    with Process(here, "tune:t") as other:
        tell(here.shared, sign(here.shared, other.id))
        assert "nothing of it runs" in here.run("cancel", "s").out
        assert other.lives()
        number = sign(here.shared, other.id)
        assert "nothing of it runs" in here.run("cancel", f"trial:{number}").out
        assert other.lives()


def late(site: Site, name: str) -> Callable[[], int]:
    """A call that Python takes its time to load; then it is a worker that lives."""

    root, gate = site.logs.root, site.folder / "gate"

    class Late:  # in here, so that it is sent whole and needs no module of ours
        def __init__(self) -> None:
            self.logs = LogPaths(root)

        def __setstate__(self, state: dict[str, LogPaths]) -> None:
            self.__dict__.update(state)
            while not gate.exists():
                time.sleep(0.02)

        def __call__(self) -> int:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            record = jobs.new_record(jobs.current_job(), "tune", name, "")
            with jobs.recorded(self.logs, record):
                time.sleep(600)
            return 0

    return Late()


def kill(pid: int) -> None:
    """End a child of ours that may have ended already."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def start_late(here) -> Iterator[Callable[[str], str]]:
    """Starts a background worker by its name; the job has not even a record yet."""
    started = []

    def start(name: str) -> str:
        asked = launch.Job("tune", name, Slurm(), here.logs.root)
        (job,) = launch.submit(asked, late(here, name), cluster="local").jobs
        started.append(int(job.removeprefix("local-")))
        return job

    yield start
    for pid in started:
        kill(pid)


def ended(job: str) -> bool:
    """Whether a child of ours has ended."""
    return os.waitpid(int(job.removeprefix("local-")), os.WNOHANG) != (0, 0)


def test_a_background_worker_is_cancelled_before_it_could_say_anything(here, start_late):
    job = start_late("tune:s")
    said = here.run("cancel", job)
    assert said.code == 0
    assert f"cancelled {job}" in said.out
    wait(lambda: ended(job), lambda: f"{job} lives on", 30)


def test_a_study_is_cancelled_with_the_workers_that_are_only_starting(here, start_late):
    """Whose worker it is, it says when it is up: so long nothing can be done about it."""
    job, other = start_late("tune:s"), start_late("tune:t")
    opening = threading.Timer(0.3, (here.folder / "gate").touch)
    opening.start()
    said = here.run("cancel", "s")
    opening.join()
    assert said.code == 0
    assert f"cancelled {job} tune:s" in said.out
    assert other not in said.out
    wait(lambda: ended(job), lambda: f"{job} lives on", 30)
    assert not ended(other)


def test_a_process_of_another_host_is_cancelled_there(here):
    record = replace(jobs.new_record("local-17", "tune", "tune:s", ""), host="elsewhere")
    fsio.write_json(here.logs.record("local-17"), record.__dict__)
    number = sign(here.shared, "local-17")
    for target in ("local-17", f"trial:{number}", "s"):
        said = here.run("cancel", target)
        assert said.code == 2
        assert "local-17 runs on elsewhere" in said.err
        assert "cancel it there" in said.err
    assert states(here.shared) == ["RUNNING"]


def test_with_a_trial_all_that_its_job_works_on_are_handed_back(here):
    with Process(here, "tune:s") as worker:
        for slot in range(3):
            assert sign(here.shared, worker.id, slot) == slot
        said = here.run("cancel", "trial:1")
    assert said.code == 0
    assert "its job ends, and trials 0, 1, 2 wait for another worker" in " ".join(said.err.split())
    assert states(here.shared) == ["WAITING"] * 3


def test_a_job_that_does_not_leave_keeps_its_trial(here, monkeypatch):
    monkeypatch.setattr(control, "LEAVING", 0.5)
    with Process(here, "tune:s", "deaf") as worker:
        sign(here.shared, worker.id)
        said = here.run("cancel", worker.id)
    assert said.code == 1
    assert f"still there after 0 s: {worker.id}" in said.err
    assert "`tripletkit doctor --fix` then looks after their trials" in said.err
    assert states(here.shared) == ["RUNNING"]


# Names


@pytest.mark.parametrize("command", ["cancel", "wait"])
def test_a_name_without_a_meaning(here, command):
    sign(here.shared, "local-999999")
    here.study("t")
    for name in ("nonsense", "", "job:1", "trial:1", "1", "12_3", "local-1", "../s"):
        said = here.run(command, name)
        assert (said.code, said.out) == (2, ""), name
        assert f"nothing here is called {name!r}" in said.err
        assert "study s, trials 0 to 0" in said.err
        assert "studies: t" in said.err
    assert states(here.shared) == ["RUNNING"]


# Wait


class Waiting:
    """`tripletkit wait` in a thread; `shown` is what a terminal would show, look by look."""

    def __init__(self, site: Site, monkeypatch, *arguments: str) -> None:
        self.shown: list[str] = []
        self.said: Said | None = None
        monkeypatch.setattr(log, "progress", self._bar)

        def wait_for_it() -> None:
            self.said = site.run("wait", *arguments)

        self.thread = threading.Thread(target=wait_for_it, daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def _bar(self, total: int, description: str) -> Iterator[Callable[[int, str], None]]:
        yield lambda completed, text: self.shown.append(text)

    def sees(self, text: str) -> None:
        """Until a look shows this."""
        wait(lambda: text in "".join(self.shown[-1:]), lambda: f"{self.shown}, {self.said}", 60)
        assert self.said is None

    def end(self) -> Said:
        self.thread.join(60)
        assert self.said is not None, self.shown
        return self.said


@pytest.fixture
def waiting(monkeypatch) -> Callable[..., Waiting]:
    return lambda site, *arguments: Waiting(site, monkeypatch, *arguments)


def test_a_study_is_over_when_all_its_trials_are(here, waiting):
    """Whatever its workers still do."""
    shared = here.study("s", n_trials=3)
    with Process(here, "tune:s") as worker:
        looks = waiting(here)
        looks.sees("study s, 3 trials: 3 to come; jobs: 1 RUNNING")
        tell(shared, sign(shared, worker.id))
        tell(shared, sign(shared, worker.id), state=TrialState.FAIL)
        number = sign(shared, worker.id)
        looks.sees("1 running, 1 complete, 1 failed; best: trial 0")
        tell(shared, number, state=TrialState.PRUNED)
        said = looks.end()
        assert worker.lives()
    assert said.code == 0
    assert "study s, 3 trials: 1 complete, 1 pruned, 1 failed; best: trial 0" in said.out


def test_a_study_that_is_over_needs_no_waiting(here):
    shared = here.study("s", n_trials=1)
    tell(shared, sign(shared, "local-999999"))
    for arguments in ([], ["s"], ["--timeout", "0"]):
        said = here.run("wait", *arguments)
        assert (said.code, said.err) == (0, "")
        assert said.out.startswith("study s, 1 trials: 1 complete; best: trial 0")


def test_trials_are_left_and_no_worker_is(here):
    tell(here.shared, sign(here.shared, "local-999999"))
    sign(here.shared, "local-999999")
    said = here.run("wait")
    assert said.code == 1
    assert "study s, 9 trials: 1 running, 1 complete, 7 to come" in said.err
    assert "trials are left, and no worker is" in said.err


def test_where_the_budget_is_used_up_a_trial_of_a_job_that_is_gone_changes_nothing(here):
    budget.note(here.shared, budget.Reached(1, "worker-hours", 1, 1, 9))
    tell(here.shared, sign(here.shared, "local-999999"))
    sign(here.shared, "local-999999")
    said = here.run("wait")
    assert (said.code, said.err) == (0, "")
    assert "budget of 1 worker-hours reached (1 spent): 1 of 9 trials done" in said.out


def test_the_worker_that_failed_is_named(here, waiting):
    with Process(here, "tune:s") as bad, Process(here, "tune:s") as good:
        looks = waiting(here)
        looks.sees("2 RUNNING")
        bad.ends(3)
        looks.sees("1 RUNNING")
        good.ends(0)
        said = looks.end()
    assert said.code == 1
    assert f"{bad.id} tune:s: FAILED, as told" in said.err
    assert good.id not in said.err
    assert "trials are left" in said.err
    assert "`tripletkit why`" in said.err


def test_a_worker_that_failed_is_a_warning_if_others_finish_the_study(here, waiting):
    shared = here.study("s", n_trials=1)
    with Process(here, "tune:s") as bad, Process(here, "tune:s") as good:
        looks = waiting(here)
        looks.sees("2 RUNNING")
        bad.ends(3)
        looks.sees("1 RUNNING")
        tell(shared, sign(shared, good.id))
        said = looks.end()
    assert said.code == 0
    assert f"{bad.id} tune:s: FAILED, as told" in said.err


def test_what_failed_before_is_history(here, waiting):
    shared = here.study("s", n_trials=1)
    with Process(here, "tune:s") as failed:
        failed.ends(3)
    with Process(here, "tune:s") as worker:
        looks = waiting(here)
        looks.sees("1 RUNNING")
        tell(shared, sign(shared, worker.id))
        said = looks.end()
    assert (said.code, said.err) == (0, "")


def test_a_worker_that_is_only_starting_is_waited_for(here, start_late, waiting):
    """Right after `tripletkit tune --cluster local`."""
    shared = here.study("s", n_trials=1)
    job = start_late("tune:s")
    looks = waiting(here)
    looks.sees("jobs: 1 PENDING")
    (here.folder / "gate").touch()
    looks.sees("jobs: 1 RUNNING")
    tell(shared, sign(shared, job))
    assert looks.end().code == 0


def test_a_storage_that_is_away_is_asked_again_while_workers_live(here, waiting):
    shared = here.study("s", n_trials=1)
    file = here.folder / "study.db"
    with Process(here, "tune:s") as worker:
        file.rename(here.folder / "away.db")
        looks = waiting(here)
        looks.sees("jobs: 1 RUNNING")
        (here.folder / "away.db").rename(file)
        tell(shared, sign(shared, worker.id))
        said = looks.end()
    assert said.code == 0
    assert "there is no study 's' in" in said.err
    assert "asking again" in said.err


def test_a_trial_is_waited_for(here, waiting):
    with Process(here, "tune:s") as worker:
        for number, how in enumerate(("COMPLETE", "PRUNED", "FAIL")):
            assert sign(here.shared, worker.id) == number
            looks = waiting(here, f"trial:{number}")
            looks.sees(f"trial {number}: RUNNING; jobs: 1 RUNNING")
            value = {"values": 0.5} if how == "COMPLETE" else {}
            tell(here.shared, number, state=TrialState[how], **value)
            said = looks.end()
            if how == "FAIL":
                assert said.code == 1
                assert "trial 2 is FAIL" in said.err
            else:
                assert (said.code, said.out) == (0, f"trial {number}: 1 {how}\n")


def test_a_trial_that_waits_for_a_worker_is_waited_for_while_there_is_one(here, waiting):
    sign(here.shared, "local-999999")
    (trial,) = here.shared.study.get_trials()
    here.shared.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    with Process(here, "tune:s") as worker:
        looks = waiting(here, "trial:0")
        looks.sees("trial 0: WAITING; jobs: 1 RUNNING")
        worker.ends(0)
        said = looks.end()
    assert said.code == 1
    assert "trial 0 is WAITING" in said.err


def test_a_process_is_waited_for(here, waiting):
    for code, ending in ((0, "COMPLETED"), (3, "FAILED, as told"), (130, "STOPPED, as told")):
        with Process(here, "train:run_1") as job:
            looks = waiting(here, job.id)
            looks.sees(f"job {job.id}: jobs: 1 RUNNING")
            job.ends(code)
            said = looks.end()
        if code:
            assert said.code == 1
            assert f"{job.id} train:run_1: {ending}" in said.err
        else:
            assert (said.code, said.out) == (0, f"job {job.id}: 1 {ending}\n")


def test_a_run_is_judged_by_its_newest_job(here, waiting):
    """Yesterday's training failed, and was started again."""
    for code, started in ((3, "2026-01-01T10:00:00Z"), (0, "2026-01-02T10:00:00Z")):
        with Process(here, "train:run_1") as job:
            job.record = replace(job.record, started=started)
            looks = waiting(here, "run_1")
            looks.sees("run run_1: jobs: 1 RUNNING")
            job.ends(code)
            said = looks.end()
            assert said.code == (1 if code else 0), said
            assert (job.id in said.err) == bool(code)
        assert here.run("wait", "run_1").code == said.code


def test_after_the_timeout_it_says_how_far_it_is(here, monkeypatch):
    monkeypatch.setattr(control, "POLLS", (300, 300))  # not what decides how long it takes
    with Process(here, "tune:s") as worker:
        sign(here.shared, worker.id)
        for target, how_far in {
            "s": "study s, 9 trials: 1 running, 8 to come; jobs: 1 RUNNING",
            "trial:0": "RUNNING; jobs: 1 RUNNING",
            worker.id: "jobs: 1 RUNNING",
        }.items():
            for timeout in ("0", "0.2"):
                said = here.run("wait", target, "--timeout", timeout)
                assert said.code == 1
                assert f"is not over after {timeout} s: {how_far}" in said.err
    assert here.run("wait", "--timeout", "-1").code == 2


def test_what_cannot_be_seen_from_here(here):
    record = replace(jobs.new_record("local-17", "tune", "tune:s", ""), host="elsewhere")
    fsio.write_json(here.logs.record("local-17"), record.__dict__)
    said = here.run("wait", "local-17")
    assert said.code == 2
    assert "local-17 runs on elsewhere" in said.err
    fsio.write_json(here.logs.record("77"), replace(record, job="77").__dict__)
    said = here.run("wait", "job:77")
    assert said.code == 4
    assert "job 77 is a Slurm job, and there is no Slurm here" in said.err


def test_ctrl_c_ends_the_waiting_and_nothing_else(here, tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "slurm.conf").touch()  # it answers with an error
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    with Process(here, "tune:s") as worker:
        command = [fleet.COMMAND, "wait", "--config", here.file]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as waiting:
            assert "asking again" in waiting.stderr.readline()
            waiting.send_signal(signal.SIGINT)
            out, err = waiting.communicate(timeout=60)
        assert (waiting.returncode, out, err) == (130, "", "")
        assert worker.lives()


# Wait: on the cluster


def test_jobs_are_waited_for(site, waiting):
    """An array, one of whose elements fails."""
    gate = site.folder / "gate"
    command = f"while ! test -e {gate}; do sleep 0.1; done; test $SLURM_ARRAY_TASK_ID != 1"
    array = site.job("tune:s", "--array=0-2", command=command)
    site.running(array)
    looks = waiting(site, array)
    looks.sees(f"job {array}: jobs: 3 RUNNING")
    gate.touch()
    said = looks.end()
    assert said.code == 1
    assert f"{array}_1 tune:s: FAILED" in said.err
    assert f"{array}_0" not in said.err
    said = site.run("wait", f"{array}_2")
    assert (said.code, said.out) == (0, f"job {array}_2: 1 COMPLETED\n")
    assert site.run("wait", f"job:{array}_1").code == 1


@pytest.mark.parametrize("target", ["job", "run", "study"])
def test_a_job_that_is_cancelled_before_it_starts_is_named(site, waiting, target):
    name = "train:run_1" if target == "run" else "tune:s"
    job = site.job(name, "--hold")
    looks = waiting(site, {"job": f"job:{job}", "run": "run_1", "study": "s"}[target])
    looks.sees("jobs: 1 PENDING")
    site.slurm.run("scancel", job)
    said = looks.end()
    assert said.code == 1
    assert f"{job} {name}: CANCELLED" in said.err


def test_a_job_that_is_requeued_meanwhile_is_waited_for(site, waiting):
    job = site.job("tune:s", "-wn1", command=f'test "$SLURM_RESTART_COUNT" || {SLEEP}')
    site.running(job)
    looks = waiting(site, f"job:{job}")
    looks.sees("1 RUNNING")
    site.slurm.run("scontrol", "requeue", job)
    looks.sees("1 PENDING")
    # Not to wait until its node takes it again.
    site.slurm.run("scontrol", "update", f"jobid={job}", "ReqNodeList=n2", "StartTime=now")
    said = looks.end()
    assert (said.code, said.out) == (0, f"job {job}: 1 COMPLETED\n")
    assert [run.state for run in queue.past([job])] == ["REQUEUED", "COMPLETED"]


def test_while_slurm_is_silent_it_is_asked_again(site, away, waiting):
    """Also about workers that have not started yet, which Slurm alone knows of."""
    shared = site.study("s", n_trials=1)
    job = site.job("tune:s", "--hold")
    away(True)
    looks = waiting(site)
    looks.sees("study s, 1 trials: 1 to come; jobs: ")
    away(False)
    looks.sees("jobs: 1 PENDING")
    tell(shared, sign(shared, job))
    said = looks.end()
    assert said.code == 0
    assert said.err.count("Unable to contact slurm controller") == 1
    assert "asking again" in said.err


# Workers that train

TOTAL, EPOCHS = 3, 12


def at_work(site: Site) -> FrozenTrial:
    """The first trial that has reported something and goes on."""
    found: list[FrozenTrial] = []

    def look() -> list[FrozenTrial]:
        trials = site.shared.study.get_trials()
        found[:] = [t for t in trials if t.state.name == "RUNNING" and t.last_step]
        return found

    logs = site.logs.root
    fleet.until(look, lambda: "".join(p.read_text() for p in logs.glob("*.err")), deadline=180)
    return found[0]


@pytest.fixture
def sites(slurm, tmp_path, database, capsys, monkeypatch) -> Iterator[dict[str, Site]]:
    """Two with data, for workers that train: on the cluster, and in the background of this host."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sites: dict[str, Site] = {}
    for where in ("slurm", "local"):
        (tmp_path / where).mkdir()
        site = sites[where] = Site(tmp_path / where, database, capsys, slurm)
        fleet.write_config(
            site.folder,
            tuning={"study_name": "s", "n_trials": TOTAL, "max_epochs": EPOCHS},
            training={"checkpoint_every_minutes": 0.001, "batch_size": 32},
        )
    yield sites
    for file in sites["local"].logs.root.glob("tune_local-*.err"):
        kill(int(file.stem.rpartition("-")[2]))


def test_after_cancelling_the_same_command_goes_on(sites):
    def tune(where: str) -> None:
        assert sites[where].run("tune", "--cluster", where).code == 0
        said = sites[where].run("wait", "--timeout", "0")  # at once, while Python starts
        assert "is not over after 0 s" in said.err

    def cancel(where: str, target: str, job: str) -> list[FrozenTrial]:
        """The trials that wait for the next worker."""
        said = sites[where].run("cancel", target)
        assert said.code == 0
        assert f"cancelled {job} tune:s" in said.out
        assert "RUNNING" not in states(sites[where].shared)
        said = sites[where].run("wait")
        assert said.code == 1
        assert "trials are left, and no worker is" in said.err
        trials = sites[where].shared.study.get_trials()
        return [trial for trial in trials if trial.state.name == "WAITING"]

    left = {}
    for where in sites:
        tune(where)
        job = claims.owner(at_work(sites[where]))["job"]
        left[where] = cancel(where, "s" if where == "slurm" else job, job)
    assert sites["slurm"].queue() == {}

    for where in sites:
        tune(where)
    for where, site in sites.items():
        said = site.run("wait", "--timeout", "300")
        assert said.code == 0, said.err
        assert f"study s, {TOTAL} trials: {TOTAL} complete; best: trial " in said.out
        trials = site.shared.study.get_trials()
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * TOTAL
        paths = [fleet.study_paths(site.file).trial(number) for number in range(TOTAL)]
        assert [fleet.epochs(each) for each in paths] == [list(range(EPOCHS + 1))] * TOTAL
        for was in left[where]:  # it went on under its number
            now = trials[was.number]
            assert now.params == was.params
            assert was.intermediate_values.items() <= now.intermediate_values.items()
            assert len(fleet.attempts(paths[was.number])) == 2 or not was.intermediate_values
