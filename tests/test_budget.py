"""The budget of a study: which trials start, how it ends, and who is told."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from optuna.trial import TrialState, create_trial

from tests import fleet
from tests.cluster import ACCOUNT
from tests.test_cost import line, write, write_config
from tests.test_fleet import assert_no_secret, logs_of, open_study, trials_of
from tests.test_notify import TOKEN, Hook
from tripletkit import cli, endings, fsio, inputs, notify, stages, submission
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.monitor import status
from tripletkit.monitor.inventory import Inventory, Job
from tripletkit.paths import StudyPaths
from tripletkit.tune import attempts as records
from tripletkit.tune import budget, claims, cost, storage, study, worker
from tripletkit.tune.claims import Worker
from tripletkit.tune.worker import Surroundings

HOUR = 3600.0


class Fleet:
    """A study whose trials are written by hand: their marks, and their lines in attempts.jsonl."""

    def __init__(self, folder: Path, limit: float, total: int = 20) -> None:
        self.config = write_config(
            folder, tuning={"n_trials": total, "budget_gpu_hours": limit, "sampler": "random"}
        )
        self.paths = StudyPaths(folder / "s")
        where = {"storage_path": folder / "study.db", "study_name": "s"}
        self.shared = storage.create(self.config.tuning.model_copy(update=where))

    def trial(self, state: str, hours: float = 0.0, *, job: str = "1", seen: float = 0.0) -> int:
        """Add a trial that took so long, or has been running for so long.

        That one gave its last sign of life `seen` hours ago.
        """
        trial, now = self.shared.study.ask(), time.time()
        since = fsio.timestamp(now - HOUR * hours)
        mark = {"job": job, "slot": 0, "host": "n1", "attempt": 1, "since": since}
        trial.set_user_attr(claims.OWNER, mark)
        lines = {**line(0), "attempt": 1, "started": since, "gpus": 1.0, "share": 1.0}
        if state != "RUNNING":
            outcome = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(state)
            lines |= {"ended": fsio.timestamp(now), "outcome": outcome or "stopped"}
        write(self.paths, trial.number, lines)
        if state == "RUNNING":
            log = self.paths.trial(trial.number).log
            log.touch()
            os.utime(log, (now - HOUR * seen, now - HOUR * seen))
        if state == "WAITING":
            self.shared.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        elif state != "RUNNING":
            value = 0.5 if state == "COMPLETE" else None
            if state == "PRUNED":
                trial.report(0.5, 0)
            self.shared.study.tell(trial, value, state=TrialState[state])
        return trial.number

    def purse(self) -> budget.Budget:
        return budget.Budget(self.config, self.paths, slurm=True)

    def claim(self, job: str = "9", state: str = "running", purse=None) -> int | None:
        """The trial that a worker gets, while all other jobs are in this state."""
        purse = purse or self.purse()
        purse.measure(self.shared.study.get_trials())
        found = claims.claim(
            self.shared, Worker(job, 0, "n1", 1), self.config.tuning.total,
            lambda ids: dict.fromkeys(ids, state), purse.allows,
        )  # fmt: skip
        return found.trial.number if found else None


@pytest.mark.parametrize(
    ("limit", "trials", "starts"),
    [
        (0.0, [("COMPLETE", 100)], True),  # no budget
        (0.1, [], True),  # nobody knows yet what a trial costs
        (0.1, [("RUNNING", 0.05)], True),
        (0.1, [("RUNNING", 0.15)], False),  # what runs has used it up
        (3.1, [("COMPLETE", 1), ("PRUNED", 1)], True),  # 2 and 1 to come
        (2.9, [("COMPLETE", 1), ("PRUNED", 1)], False),
        (2.9, [("COMPLETE", 1), ("PRUNED", 0.5)], True),  # 1.5 and 0.75
        (3.9, [("COMPLETE", 1), ("COMPLETE", 1), ("RUNNING", 0.2)], False),  # 2, 1 and 1
        (4.1, [("COMPLETE", 1), ("COMPLETE", 1), ("RUNNING", 0.2)], True),
        (5.0, [("COMPLETE", 1), ("COMPLETE", 1), ("RUNNING", 2.1)], False),  # longer than expected
        (5.2, [("COMPLETE", 1), ("COMPLETE", 1), ("RUNNING", 2.1)], True),
        (2.9, [("COMPLETE", 1), ("FAIL", 1)], False),  # failed ones cost
        (2.2, [("COMPLETE", 1), ("FAIL", 0.1)], True),  # and say nothing of those to come
    ],
)
def test_a_trial_starts_if_it_can_end_within_the_budget(tmp_path, limit, trials, starts):
    made = Fleet(tmp_path, limit)
    for state, hours in trials:
        made.trial(state, hours)
    assert made.claim() == (len(trials) if starts else None)


@pytest.mark.parametrize(("limit", "goes_on"), [(1.9, False), (2.1, True)])
def test_one_that_was_handed_back_needs_the_rest_of_its_time(tmp_path, limit, goes_on):
    """1 hour complete, 0.4 done, 0.6 to come."""
    made = Fleet(tmp_path, limit)
    made.trial("COMPLETE", 1)
    waiting = made.trial("WAITING", 0.4)
    purse = made.purse()
    assert made.claim(purse=purse) == (waiting if goes_on else None)
    if not goes_on:
        assert str(purse.refused) == (
            "budget of 1.9 GPU-hours reached (1.4 spent): 1 of 20 trials done"
        )


@pytest.mark.parametrize("state", ["gone", "pending"])
def test_one_whose_worker_is_gone_cost_time_until_its_last_sign_of_life(tmp_path, state):
    """Its mark is two days old, and it worked for half an hour."""
    made = Fleet(tmp_path, 3.0, total=2)
    made.trial("COMPLETE", 1)
    number = made.trial("RUNNING", 48, seen=47.5)
    assert made.claim(state="running") is None
    assert made.claim(state=state) == number


@pytest.mark.parametrize("job", ["1", "local-1"])
@pytest.mark.parametrize(("limit", "starts"), [(3.1, True), (2.9, False)])
def test_one_of_which_nobody_knows_keeps_its_share_and_no_more(tmp_path, job, limit, starts):
    """Slurm is silent, or the process is one of another host: it may live, or be gone for long.

    1 hour complete, one to come, and one for it: it worked for half an hour, eight days ago.
    """
    made = Fleet(tmp_path, limit)
    made.trial("COMPLETE", 1)
    made.trial("RUNNING", 200, job=job, seen=199.5)
    assert made.claim(state="unknown") == (2 if starts else None)


@pytest.mark.parametrize(("limit", "goes_on"), [(2.5, False), (3.5, True)])
def test_a_requeued_worker_goes_on_with_its_trial_only_within_the_budget(tmp_path, limit, goes_on):
    made = Fleet(tmp_path, limit)
    made.trial("COMPLETE", 1)
    number = made.trial("RUNNING", 2, job="9")
    assert made.claim("9") == (number if goes_on else None)


def test_workers_that_claim_one_after_another_do_not_overshoot(tmp_path):
    """8 hours spent by trials of 1 hour, and 13 to spend: 5 of 10 workers get one."""
    made = Fleet(tmp_path, 13.01, total=100)
    for _ in range(8):
        made.trial("COMPLETE", 1)
    got = [made.claim(str(100 + n)) for n in range(10)]
    assert got == [8, 9, 10, 11, 12, *[None] * 5]


def _claim(config: Config, paths: StudyPaths, job: str, start, got) -> None:
    shared = storage.open_study(config.tuning, seed=0, workers=1)
    purse = budget.Budget(config, paths, slurm=True)
    start.wait()
    found = claims.claim(
        shared, Worker(job, 0, "n1", 1), 100, lambda ids: dict.fromkeys(ids, "running"), purse.allows
    )  # fmt: skip
    got.put(found.trial.number if found else None)


def test_workers_that_claim_at_once_do_not_overshoot(tmp_path):
    """3 hours spent by trials of 1 hour, and 5 to spend: 2 of 5 processes get one."""
    made = Fleet(tmp_path, 5.01, total=100)
    for _ in range(3):
        made.trial("COMPLETE", 1)
    config = configuration.with_values(made.config, tuning={"storage_path": tmp_path / "study.db"})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_budget"])
    start, got = context.Barrier(5), context.Queue()
    family = [
        context.Process(target=_claim, args=(config, made.paths, str(n), start, got))
        for n in range(100, 105)
    ]
    for each in family:
        each.start()
    numbers = [got.get(timeout=120) for _ in family]
    for each in family:
        each.join()
    assert sorted(n for n in numbers if n is not None) == [3, 4]


def test_the_lines_of_a_trial_that_is_over_are_read_once(tmp_path, monkeypatch):
    made = Fleet(tmp_path, 100)
    numbers = [made.trial("COMPLETE", 1) for _ in range(5)]
    read, asked = budget.records.read, []
    monkeypatch.setattr(budget.records, "read", lambda path: (asked.append(path), read(path))[1])
    purse = made.purse()
    for job in "345":
        assert made.claim(job, purse=purse) is not None
    over = {made.paths.trial(number).attempts for number in numbers}
    assert sorted(path for path in asked if path in over) == sorted(over)


def test_lines_that_cannot_be_read_cost_nothing_and_keep_nobody_from_working(tmp_path, caplog):
    made = Fleet(tmp_path, 2.5)
    for _ in range(2):
        file = made.paths.trial(made.trial("COMPLETE", 1)).attempts
    file.write_bytes(file.read_bytes()[:40] + b"\xff")
    purse = made.purse()
    assert [made.claim(job, purse=purse) for job in "34"] == [2, 3]
    warnings = {r.message for r in caplog.records if r.levelname == "WARNING"}
    assert warnings == {f"{file}, line 1 is no record of an attempt: left out"}


def test_without_gpus_the_budget_is_in_hours_of_workers(tmp_path):
    config = write_config(
        tmp_path, slurm={"gpus": 0}, tuning={"budget_gpu_hours": 2, "trials_per_gpu": 2}
    )
    purse = budget.Budget(config, StudyPaths(tmp_path / "s"), slurm=True)
    assert purse.unit == cost.WORKER_HOURS
    write(purse.paths, 0, {**line(0, HOUR, "complete", gpus=0, share=0.5), "attempt": 1})
    trial = create_trial(value=1, user_attrs={claims.OWNER: {"job": "1", "attempt": 1}})
    trial.number = 0
    assert purse._hours(trial) == 0.5


def test_what_the_study_keeps_of_it(tmp_path):
    made = Fleet(tmp_path, 2.5)
    made.trial("COMPLETE", 1)
    made.trial("COMPLETE", 1)
    reached = endings.budget_reached(made.config, made.shared, slurm=True)
    assert reached is not None
    assert budget.of_study(made.shared) == reached
    assert (reached.done, reached.total, reached.unit) == (2, 20, "GPU-hours")
    assert reached.spent == pytest.approx(2, abs=0.01)
    larger = configuration.with_values(made.config, tuning={"budget_gpu_hours": 3.5})
    assert endings.budget_reached(larger, made.shared, slurm=True) is None
    assert budget.of_study(made.shared) is None


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize(("limit", "used_up"), [(1.9, True), (3.1, False)])
def test_what_a_killed_worker_left_is_not_believed(tmp_path, noted, limit, used_up):
    """1 hour complete and half an hour lost, with as much to come; its worker is gone."""
    made = Fleet(tmp_path, limit, total=3)
    made.trial("COMPLETE", 1)
    made.trial("RUNNING", 0.5, job="local-999999")
    config = configuration.with_values(
        made.config,
        tuning={"storage_path": tmp_path / "study.db", "output_dir": tmp_path},
        global_={"log_dir": tmp_path / "logs"},
    )
    # As it was noted while the worker lived, and by nobody since.
    budget.note(made.shared, REACHED if noted else None)
    inventory = Inventory(config)
    trials = inventory.trials()
    gone = status.study_of(inventory, trials, ())
    assert (gone.budget is not None) == used_up
    living = [Job("local-999999", "tune:s", "RUNNING")]
    assert (status.study_of(inventory, trials, living).budget is not None) == noted


REACHED = budget.Reached(1, "GPU-hours", 1, 1, 3)


def work(config: Config, limit: float) -> None:
    """Be a worker of the study, in this process."""
    config = configuration.with_values(config, tuning={"budget_gpu_hours": limit})
    shared = storage.open_study(config.tuning, seed=0, workers=1)
    around = Surroundings(inputs.training_data, lambda ids: {}, lambda: False, lambda: math.inf)
    worker.run(shared, config, stages.study_paths(config), Worker("local-1", 0, "n1", 1), around)


def test_the_study_keeps_the_newest_answer(tmp_path):
    """Else it would be over, and well, for `wait` and others, with trials left and money for them."""
    config = configuration.load(fleet.write_config(tmp_path, tuning={"n_trials": 3}), environ={})
    shared = study.prepare(config, stages.study_paths(config))
    work(config, 1e-9)  # the first trial starts in any case
    assert [t.state.name for t in shared.study.get_trials()] == ["COMPLETE"]
    assert budget.of_study(shared).done == 1
    work(config, 10)
    assert [t.state.name for t in shared.study.get_trials()] == ["COMPLETE"] * 3
    assert budget.of_study(shared) is None

    budget.note(shared, REACHED)
    study.prepare(config, stages.study_paths(config))
    assert budget.of_study(shared) is None


def test_files_are_read_before_it_is_our_turn(tmp_path, monkeypatch):
    """With thousands of trials and a slow file system all other workers would wait for us."""
    config = configuration.load(fleet.write_config(tmp_path, tuning={"n_trials": 2}), environ={})
    study.prepare(config, stages.study_paths(config))
    work(config, 1e-9)
    took, read, open_study = [], records.read, storage.open_study

    def watched(*given, **more):
        shared = open_study(*given, **more)

        @contextlib.contextmanager
        def turn():
            with shared.turn(), monkeypatch.context() as patch:
                patch.setattr(records, "read", lambda path: took.append(path) or read(path))
                yield

        return replace(shared, turn=turn)

    monkeypatch.setattr(storage, "open_study", watched)
    work(config, 10)
    assert took == []


# --- real workers ----------------------------------------------------------------------------

BUDGET = 8 / HOUR  # worker-hours: some trials of a second or a few
TRIALS = 60


def spent(config: Path) -> cost.Spent:
    return cost.spent(fleet.study_paths(config), open_study(config).study)


def assert_stopped_by_its_budget(config: Path, hook: Hook) -> dict:
    """Some trials are complete, none is open, and one message says so; returns its facts."""
    trials = trials_of(config)
    assert 0 < len(trials) < TRIALS
    assert {t.state.name for t in trials} == {"COMPLETE"}
    ((path, message),) = hook.got
    assert path == f"/services/{TOKEN}"
    facts = message["tripletkit"]
    assert (facts["event"], facts["status"], facts["study"]) == ("study", "budget", "small")
    assert (facts["done"], facts["complete"], facts["total"]) == (len(trials), len(trials), TRIALS)
    assert facts["spent"] == pytest.approx(spent(config).gpu_hours, abs=1e-3)
    assert f"{facts['unit']} reached (" in message["text"]
    assert facts["best_value"] == max(t.value for t in trials)
    assert not fleet.study_paths(config).webhook.exists()
    return facts


class Said(NamedTuple):
    """What a command printed."""

    out: str
    err: str


@pytest.fixture
def tripletkit(capsys) -> Callable[..., Said]:
    """Run a command in this process, which has loaded everything already; fails if it fails."""

    def run(*words: str | Path) -> Said:
        capsys.readouterr()
        arguments = [str(word) for word in words]
        code = cli.run(lambda: cli.app(arguments, prog_name="tripletkit", standalone_mode=False))
        said = capsys.readouterr()
        assert code == 0, said.out + said.err
        return Said(said.out, said.err)

    return run


def test_a_study_ends_with_its_budget_and_goes_on_with_a_larger_one(
    tmp_path, tripletkit, monkeypatch
):
    config = fleet.write_config(tmp_path, tuning={"n_trials": TRIALS, "max_epochs": 4})
    flags = ("-c", config, "--cluster", "local", "--workers", "2")
    with Hook(200) as hook:
        monkeypatch.setenv(notify.VARIABLE, hook.url)
        tripletkit("tune", *flags, "--budget-gpu-hours", str(BUDGET))
        monkeypatch.delenv(notify.VARIABLE)
        said = tripletkit("wait", "-c", config).out
        fleet.until(lambda: hook.got, lambda: "no message", deadline=60)
    assert re.search(r"budget of 0\.00\d+ worker-hours reached", said), said
    facts = assert_stopped_by_its_budget(config, hook)
    assert facts["unit"] == "worker-hours"
    status = json.loads(tripletkit("status", "-c", config, "--json").out)
    assert "worker-hours reached" in status["study"]["budget"]
    before = len(trials_of(config))
    again = tripletkit("tune", *flags, "--budget-gpu-hours", str(BUDGET)).out
    assert "a larger --budget-gpu-hours goes on" in again
    assert "local job" not in again
    total = ("--n-trials", str(before + 1), "--budget-gpu-hours", "0")
    with Hook(200) as hook:
        tripletkit("tune", "-c", config, "--cluster", "here", *total, "--webhook", hook.url)
    assert len(trials_of(config)) == before + 1
    ((_, message),) = hook.got
    assert message["tripletkit"]["status"] == "done"
    done = f"study small: done, {before + 1} trials ({before + 1} complete); best map@r 0."
    assert message["text"].startswith(done)
    status = json.loads(tripletkit("status", "-c", config, "--json").out)
    assert status["study"]["budget"] is None


def test_a_worker_with_several_trials_at_once_tells_the_end_once(tmp_path, tripletkit):
    config = fleet.write_config(tmp_path, tuning={"n_trials": 3, "max_epochs": 1})
    with Hook(200) as hook:
        flags = ("--cluster", "here", "--trials-per-gpu", "2", "--webhook", hook.url)
        tripletkit("tune", "-c", config, *flags)
    ((_, message),) = hook.got
    facts = message["tripletkit"]
    assert (facts["status"], facts["done"], facts["complete"]) == ("done", 3, 3)
    assert not fleet.study_paths(config).webhook.exists()


@pytest.mark.parametrize("url", ["https://example.org/new", None])
@pytest.mark.parametrize("before", ["https://example.org/old", None])
@pytest.mark.parametrize("told", [False, True])
def test_what_cannot_start_leaves_the_address_that_was_there(tmp_path, url, before, told):
    """Workers that run already need it; unless they have told the end meanwhile."""
    paths = StudyPaths(tmp_path)
    if before:
        notify.keep(paths.webhook, before)

    def start() -> None:
        with submission._told(paths, url):
            text = paths.webhook.read_text() if paths.webhook.exists() else None
            assert text == (f"{url or before}\n" if url or before else None)
            if told:
                notify.forget(paths.webhook)
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        start()
    left = paths.webhook.read_text() if paths.webhook.exists() else None
    assert left == (f"{before}\n" if before and not told else None)


def wait_for_mail(slurm, count: int) -> list[str]:
    fleet.until(lambda: len(slurm.mails()) >= count, lambda: str(slurm.mails()), deadline=60)
    return slurm.mails()


def test_on_slurm(slurm, tmp_path, tripletkit, monkeypatch):
    """Two workers with a GPU each, a budget, mail and a webhook; then a fleet that fails."""
    config = fleet.write_config(
        tmp_path, tuning={"n_trials": TRIALS, "max_epochs": 4}, slurm={"gpus": 1}
    )
    start = ("tune", "-c", config, "--cluster", "slurm", "--account", ACCOUNT, "--workers", "2",
             "--mail", "me@example.org", "--budget-gpu-hours", str(BUDGET))  # fmt: skip
    shown = tripletkit(*start, "--dry-run")
    assert shown.out.startswith("#!/bin/bash")
    assert "--mail-user=me@example.org" in shown.out
    assert "--mail-type=FAIL" in shown.out, "the end is that of the job behind the workers"
    assert "at most" not in shown.out, "it is there to be copied"
    assert "at most 1 GPU-hours: workers (2) x time limit (0.5 h) x GPUs (1)" in shown.err
    before = slurm.mails()
    with Hook(200) as hook:
        monkeypatch.setenv(notify.VARIABLE, hook.url)
        said = tripletkit(*start).out
        monkeypatch.delenv(notify.VARIABLE)
        jobs = re.findall(r"slurm job (\d+)", said)
        assert len(jobs) == 2, said
        assert_no_secret(slurm, tmp_path / "logs", TOKEN, jobs)
        fleet.wait_for_empty_queue(slurm, logs_of(config), deadline=240)
    facts = assert_stopped_by_its_budget(config, hook)
    assert facts["unit"] == "GPU-hours"
    states = slurm.run("sacct", "-X", "-n", "-P", "--format=State", f"--jobs={','.join(jobs)}")
    assert set(states.split()) == {"COMPLETED"}
    assert "GPU-hours reached" in tripletkit("wait", "-c", config).out
    assert_no_secret(slurm, tmp_path, TOKEN, jobs)
    (mail,) = wait_for_mail(slurm, len(before) + 1)[len(before) :]
    assert "Name=tidy:small Ended" in mail, "one for the study, none for its workers"
    assert "me@example.org" in mail

    # There is no GPU: the workers fail, and with them the study.
    failing = ("--set", "training.device=cuda", "--budget-gpu-hours", "0")
    with Hook(200) as hook:
        tripletkit(*start[:-2], *failing, "--webhook", hook.url)
        fleet.wait_for_empty_queue(slurm, logs_of(config), deadline=240)
    ((_, message),) = hook.got
    assert message["tripletkit"]["status"] == "stopped"
    assert "and no worker is left" in message["text"]
    assert_no_secret(slurm, tmp_path, TOKEN, jobs)
    mails = wait_for_mail(slurm, len(before) + 3)[len(before) + 1 :]
    assert sum("Name=tune:small Failed" in mail for mail in mails) == 1, mails
    assert sum("Name=tidy:small Ended" in mail for mail in mails) == 1, mails
