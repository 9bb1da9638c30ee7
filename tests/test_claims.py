"""Who works on which trial: exact totals, takeovers, and nothing that lives is touched."""

import multiprocessing
import os
import signal
import socket
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from tripletkit.config import Tuning
from tripletkit.tune import claims, storage
from tripletkit.tune.claims import Worker

pytest_plugins = ["tests.postgres"]

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.test_claims"])


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def tuning(request, tmp_path) -> Tuning:
    """A study's place on each kind of storage."""
    if request.param == "postgresql":
        return Tuning(storage_url=request.getfixturevalue("database"), sampler="random")
    suffix = {"sqlite": "db", "journal": "journal"}[request.param]
    return Tuning(storage_path=tmp_path / f"study.{suffix}", sampler="random")


@pytest.fixture
def study(tmp_path) -> storage.SharedStudy:
    return storage.create(Tuning(storage_path=tmp_path / "study.db", sampler="random"))


def worker(job: str, restart: int = 0) -> Worker:
    return Worker(job=job, restart=restart, host="n1", pid=1)


def all_are(state: str):
    return lambda jobs: dict.fromkeys(jobs, state)


def nobody_asked(jobs):
    raise AssertionError(f"asked for {jobs}")


def states(shared) -> list[str]:
    return [t.state.name for t in shared.study.get_trials()]


def test_a_claimed_trial_runs_and_names_its_owner(study):
    claim = claims.claim(study, worker("7_3"), 5, nobody_asked)
    stored = study.study.get_trials()[0]
    assert stored.state == TrialState.RUNNING
    assert stored.user_attrs[claims.OWNER]["job"] == "7_3"
    assert stored.user_attrs[claims.OWNER]["attempt"] == 1
    assert claim.holds()


def test_at_the_total_there_is_nothing_left(study):
    for job in "123":
        assert claims.claim(study, worker(job), 3, all_are("running"))
    assert claims.claim(study, worker("4"), 3, all_are("running")) is None
    assert claims.open_trials(study, 3) == 0
    assert claims.open_trials(study, 5) == 2


def test_without_locks_a_trial_too_many_is_given_up(study, monkeypatch):
    """Two workers see two trials of three and both ask for the third."""
    for job in "12":
        claims.claim(study, worker(job), 3, all_are("running"))
    ask = study.study.ask

    def ask_as_second():
        ask()  # the other one was faster
        return ask()

    monkeypatch.setattr(study.study, "ask", ask_as_second)
    assert claims.claim(study, worker("3"), 3, all_are("running")) is None
    assert states(study) == ["RUNNING", "RUNNING", "RUNNING", "FAIL"]


def claim_and_complete(tuning: Tuning, job: str, total: int, numbers) -> None:
    """A worker without training."""
    shared = storage.open_study(tuning, seed=int(job), workers=8)
    while found := claims.claim(shared, worker(job), total, all_are("running")):
        shared.study.tell(found.trial, 1.0)
        numbers.put(found.trial.number)


def test_many_workers_run_exactly_the_total(tuning):
    shared = storage.create(tuning)
    numbers = fork.Queue()
    workers = [
        fork.Process(target=claim_and_complete, args=(tuning, str(job), 29, numbers))
        for job in range(8)
    ]
    for process in workers:
        process.start()
    done = sorted(numbers.get(timeout=60) for _ in range(29))
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert done == list(range(29))
    assert numbers.empty()
    assert states(shared) == ["COMPLETE"] * 29


def test_a_requeued_job_goes_on_with_its_own_trial(study):
    first = claims.claim(study, worker("7"), 9, nobody_asked)
    x = first.trial.suggest_float("x", 0, 1)
    first.trial.report(0.5, 1)
    claims.claim(study, worker("8"), 9, all_are("running"))
    again = claims.claim(study, worker("7", restart=1), 9, all_are("running"))
    assert again.trial.number == first.trial.number
    assert again.trial.suggest_float("x", 0, 1) == x
    assert again.owner["attempt"] == 2
    assert study.study.get_trials()[0].intermediate_values == {1: 0.5}
    assert not first.holds()
    assert again.holds()


def test_before_new_trials_come_those_of_workers_that_are_gone(study):
    lost = claims.claim(study, worker("7"), 9, nobody_asked)
    taken = claims.claim(study, worker("8"), 9, all_are("gone"))
    assert taken.trial.number == lost.trial.number
    assert not lost.holds()


@pytest.mark.parametrize("state", ["running", "unknown"])
def test_trials_of_workers_that_live_or_may_live_are_left_alone(study, state):
    claims.claim(study, worker("7"), 1, nobody_asked)
    assert claims.claim(study, worker("8"), 1, all_are(state)) is None


def test_trials_of_jobs_that_will_come_back_are_taken_only_when_nothing_else_is_left(study):
    away = claims.claim(study, worker("7"), 2, nobody_asked)
    new = claims.claim(study, worker("8"), 2, all_are("pending"))
    assert new.trial.number != away.trial.number
    study.study.tell(new.trial, 1.0)
    assert claims.claim(study, worker("8"), 2, all_are("pending")).trial.number == 0


def test_a_released_trial_waits_and_comes_before_new_ones(study):
    first = claims.claim(study, worker("7"), 9, nobody_asked)
    x = first.trial.suggest_float("x", 0, 1)
    first.release()
    assert states(study) == ["WAITING"]
    again = claims.claim(study, worker("8"), 9, nobody_asked)
    assert again.trial.number == 0
    assert again.trial.suggest_float("x", 0, 1) == x


def test_releasing_a_trial_that_was_taken_over_changes_nothing(study):
    first = claims.claim(study, worker("7"), 9, nobody_asked)
    second = claims.claim(study, worker("8"), 9, all_are("gone"))
    first.release()
    assert states(study) == ["RUNNING"]
    assert second.holds()


def test_a_trial_whose_creator_died_before_it_signed_is_taken(study):
    study.study.ask()  # no owner
    assert claims.claim(study, worker("7"), 9, nobody_asked).trial.number == 0


def test_a_job_that_comes_back_while_we_ask_keeps_its_trial(study):
    claims.claim(study, worker("7"), 1, nobody_asked)
    back = None

    def came_back(jobs):
        nonlocal back
        back = claims.claim(study, worker("7", restart=1), 1, nobody_asked)
        return dict.fromkeys(jobs, "gone")  # what we were told before

    assert claims.claim(study, worker("8"), 1, came_back) is None
    assert back.holds()


def local(job: str, host: str) -> Worker:
    return Worker(job=f"local-{job}", restart=0, host=host, pid=int(job))


def test_processes_of_two_hosts_may_have_the_same_number(study):
    here = claims.claim(study, local("7", "n1"), 1, nobody_asked)
    assert claims.claim(study, local("7", "n2"), 1, nobody_asked) is None
    assert here.holds()
    assert claims.lost(study, nobody_asked) == []  # n1 is not this host
    assert claims.claim(study, local("7", "n1"), 1, nobody_asked).trial.number == 0


def test_what_became_of_a_process_is_asked_on_its_host_only(study):
    here = socket.gethostname()
    claims.claim(study, local("7", "elsewhere"), 9, nobody_asked)
    claims.claim(study, local("8", here), 9, all_are("running"))
    asked = []

    def job_states(jobs):
        asked.extend(jobs)
        return dict.fromkeys(jobs, "gone")

    assert [t.number for t in claims.lost(study, job_states)] == [1]
    assert claims.claim(study, local("9", here), 9, job_states).trial.number == 1
    assert asked == ["local-8", "local-8"]


def test_a_failed_trial_says_why(study):
    claims.claim(study, worker("7"), 9, nobody_asked).fail("nan", "the loss became nan")
    stored = study.study.get_trials()[0]
    assert stored.state == TrialState.FAIL
    assert stored.user_attrs[claims.CAUSE] == {"kind": "nan", "message": "the loss became nan"}


def test_only_lost_trials_are_handed_back(study):
    for job in ("gone", "running", "pending"):
        claims.claim(study, worker(job), 9, all_are("running"))
    done = claims.claim(study, worker("done"), 9, all_are("running"))
    study.study.tell(done.trial, 1.0)
    lost = claims.lost(study, lambda jobs: {job: job for job in jobs})
    assert [t.number for t in lost] == [0]
    assert claims.hand_back(study, lost) == [0]
    assert states(study) == ["WAITING", "RUNNING", "RUNNING", "COMPLETE"]


def test_a_trial_taken_over_meanwhile_is_not_handed_back(study):
    claims.claim(study, worker("7"), 1, nobody_asked)
    lost = claims.lost(study, all_are("gone"))
    taken = claims.claim(study, worker("8"), 1, all_are("gone"))
    assert claims.hand_back(study, lost) == []
    assert taken.holds()


def claim_and_die(tuning: Tuning) -> None:
    """Killed between the new trial and its owner."""
    shared = storage.open_study(tuning, seed=0, workers=1)
    optuna.Trial.set_user_attr = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    claims.claim(shared, worker("dead"), 9, nobody_asked)


def test_killed_within_its_turn_a_worker_blocks_nobody(tuning):
    shared = storage.create(tuning)
    process = fork.Process(target=claim_and_die, args=(tuning,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert states(shared) == ["RUNNING"]
    assert claims.claim(shared, worker("7"), 9, nobody_asked).trial.number == 0


# Several workers in one job


def slot(number: int, job: str = "7", restart: int = 0) -> Worker:
    return replace(worker(job, restart), slot=number)


def test_another_slot_of_the_job_is_a_rival_that_lives(study):
    first = claims.claim(study, slot(0), 2, all_are("running"))
    second = claims.claim(study, slot(1), 2, all_are("running"))
    assert second.trial.number != first.trial.number
    assert second.owner["slot"] == 1
    assert claims.claim(study, slot(2), 2, all_are("running")) is None
    assert first.holds()
    assert second.holds()


def test_a_slot_that_is_started_again_goes_on_with_its_own_trial(study):
    for number in range(3):
        claims.claim(study, slot(number), 9, all_are("running"))
    again = claims.claim(study, slot(1), 9, all_are("running"))
    assert (again.trial.number, again.owner["attempt"]) == (1, 2)
    requeued = claims.claim(study, slot(2, restart=1), 9, all_are("running"))
    assert requeued.trial.number == 2


def test_slots_of_a_job_that_is_gone_are_taken_by_others(study):
    for number in range(2):
        claims.claim(study, slot(number), 2, all_are("running"))

    def states(jobs):
        return {job: "gone" if job == "7" else "running" for job in jobs}

    taken = [claims.claim(study, slot(number, job="8"), 2, states) for number in range(2)]
    assert [claim.trial.number for claim in taken] == [0, 1]
    assert all(claim.holds() for claim in taken)


def test_a_mark_without_a_slot_is_that_of_slot_0(study):
    """It was made by an earlier version."""
    claim = claims.claim(study, worker("7"), 2, all_are("running"))
    mark = {key: value for key, value in claim.owner.items() if key != "slot"}
    claim.trial.set_user_attr(claims.OWNER, mark)
    assert claims.claim(study, slot(1), 1, all_are("running")) is None
    assert claims.claim(study, slot(0), 1, all_are("running")).trial.number == claim.trial.number
