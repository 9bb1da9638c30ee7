"""What a study has cost: known answers from attempts written by hand, and a slow reference."""

import json
import os
import time
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.cluster import jobs
from tripletkit.config import Config
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.tune import attempts, cost

START = 1_700_000_000.0  # some time in the past, Unix seconds
HOUR = 3600.0


def write_config(folder: Path, **changes) -> Config:
    values = {
        "global_": {"log_dir": folder / "logs"},
        "tuning": {"output_dir": folder, "study_name": "s", "max_epochs": 10, "n_trials": 8},
        "slurm": {"gpus": 1, "time": "02:00:00"},
    }
    for section, more in changes.items():
        values[section] |= more
    config = configuration.with_values(Config(), **values)
    fsio.write_text(StudyPaths(folder / "s").config, configuration.dump(config))
    return config


@pytest.fixture
def paths(tmp_path) -> StudyPaths:
    write_config(tmp_path)
    return StudyPaths(tmp_path / "s")


def line(start: float, end: float | None = None, outcome: str | None = None, **more) -> dict:
    """A line of attempts.jsonl; times in seconds after START."""
    found = {"job": "local-1", "host": "n1", "slot": 0, "started": fsio.timestamp(START + start)}
    if end is not None:
        found |= {"ended": fsio.timestamp(START + end), "outcome": outcome}
    signs = {key: START + more.pop(key) for key in ("seen", "saved") if key in more}
    return {**found, "from_epoch": 0, "from_step": 0, "gpus": 0.5, "share": 0.5, **signs, **more}


def write(paths: StudyPaths, number: int, *lines: dict) -> None:
    file = paths.trial(number).attempts
    fsio.write_text(file, "".join(json.dumps(each) + "\n" for each in lines))


def touch(file: Path, seconds: float) -> None:
    file.touch()
    os.utime(file, (START + seconds, START + seconds))


def study(*trials: tuple[str, int]) -> optuna.Study:
    """A study whose trials are in these states and have reported up to these epochs."""
    made = optuna.create_study()
    for state, epoch in trials:
        done = state in ("COMPLETE", "PRUNED")
        reports = dict.fromkeys(range(epoch + 1), 0.5) if epoch >= 0 else {}
        made.add_trial(
            create_trial(
                state=TrialState[state], value=0.5 if done else None, intermediate_values=reports
            )
        )
    return made


def test_one_attempt_is_its_time_and_its_share_of_the_gpus(paths):
    write(paths, 3, line(0, 90, "complete", slot=1))
    (attempt,) = cost.attempts(paths)
    assert attempt == cost.Attempt(
        trial=3, job="local-1", host="n1", slot=1, started=START, ended=START + 90,
        outcome="complete", gpus=0.5, share=0.5, kept=START + 90,
    )  # fmt: skip
    assert attempt.seconds == 90


def test_what_is_done_again_is_wasted_and_what_is_on_file_is_not(paths):
    """Killed after 600 s with a checkpoint of 400 s; the next one waited in the queue till 1000 s."""
    write(paths, 0, line(0), line(1000, 1400, "complete", seen=600, saved=400))
    first, second = cost.attempts(paths)
    assert (first.outcome, first.ended) == ("killed", START + 600)
    assert (second.outcome, second.ended) == ("complete", START + 1400)
    found = cost.spent(paths, study(("COMPLETE", 10)))
    assert found == cost.Spent(
        gpu_hours=pytest.approx(0.5 * 1000 / HOUR),
        useful=pytest.approx(0.5 * 800 / HOUR),
        wasted=pytest.approx(0.5 * 200 / HOUR),
        saved=0.0,
    )


def test_a_checkpoint_from_before_an_attempt_saves_nothing_of_it(paths):
    write(paths, 0, line(500), line(1000, 1100, "complete", seen=600, saved=400))
    assert cost.spent(paths, study(("COMPLETE", 10))).wasted == pytest.approx(0.5 * 100 / HOUR)


def test_all_of_a_trial_that_failed_is_wasted(paths):
    write(paths, 0, line(0), line(100, 200, "failed", seen=50, saved=50))
    found = cost.spent(paths, study(("FAIL", 3)))
    assert (found.useful, found.wasted) == (0.0, pytest.approx(0.5 * 150 / HOUR))


def test_a_trial_that_was_stopped_and_waits(paths):
    """It saved its state at 250 s of 300."""
    write(paths, 0, line(0, 300, "stopped"))
    touch(paths.trial(0).last, 250)
    found = cost.spent(paths, study(("WAITING", 3)))
    assert found.useful == pytest.approx(0.5 * 250 / HOUR)
    assert found.wasted == pytest.approx(0.5 * 50 / HOUR)


def test_one_that_was_killed_ended_with_its_last_sign_of_life(paths):
    write(paths, 0, line(0))
    trial = paths.trial(0)
    touch(trial.last, 40)
    touch(trial.metrics, 70)
    touch(trial.log, 60)
    (attempt,) = cost.attempts(paths)
    assert (attempt.outcome, attempt.ended, attempt.kept) == ("killed", START + 70, START + 40)


def test_one_that_left_no_sign_took_no_time(paths):
    write(paths, 0, line(0))
    (attempt,) = cost.attempts(paths)
    assert (attempt.outcome, attempt.seconds) == ("killed", 0)


def test_one_that_runs_lasts_until_now(paths):
    logs = LogPaths(paths.root.parent / "logs")
    record = jobs.new_record(jobs.current_job(), "tune", "tune:s", "")
    write(paths, 0, {**line(0), "job": record.job, "host": record.host})
    with jobs.recorded(logs, record):
        before = time.time()
        (attempt,) = cost.attempts(paths)
        assert attempt.outcome == "running"
        assert before <= attempt.ended <= time.time()
        assert cost.spent(paths, study(("RUNNING", 1))).wasted == 0
    (attempt,) = cost.attempts(paths)
    assert attempt.outcome == "killed"


def test_what_pruning_saved(paths):
    """An epoch of complete trials took 80 s on average; 8 and 6 of 10 were not trained."""
    write(paths, 0, line(0, 1000, "complete"))
    write(paths, 1, line(0, 600, "complete"))
    write(paths, 2, line(0, 500, "pruned"))
    write(paths, 3, line(0, 50, "pruned", gpus=1.0))
    trials = study(("COMPLETE", 10), ("COMPLETE", 10), ("PRUNED", 2), ("PRUNED", 4))
    assert cost.spent(paths, trials).saved == pytest.approx(80 * (8 * 0.5 + 6 * 1.0) / HOUR)


def test_without_a_complete_trial_the_pruned_one_says_how_long_an_epoch_takes(paths):
    write(paths, 0, line(0, 100, "pruned"))
    write(paths, 1, line(0, 5, "pruned"))  # before its first epoch: nobody knows
    trials = study(("PRUNED", 2), ("PRUNED", 0))
    assert cost.spent(paths, trials).saved == pytest.approx(50 * 8 * 0.5 / HOUR)


def test_without_gpus_hours_of_workers_count(paths):
    write(paths, 0, line(0, 900, "complete", gpus=0.0, share=0.25))
    found = cost.spent(paths, study(("COMPLETE", 10)))
    assert (found.gpu_hours, found.unit) == (pytest.approx(0.25 * 0.25), "worker-hours")
    write(paths, 1, line(0, 900, "complete", gpus=1.0, share=1.0))
    found = cost.spent(paths, study(("COMPLETE", 10), ("COMPLETE", 10)))
    assert (found.gpu_hours, found.unit) == (pytest.approx(0.25), "GPU-hours")


def test_nothing_was_done_yet(paths):
    paths.trial(0).root.mkdir(parents=True)  # claimed, and not begun
    assert cost.attempts(paths) == []
    assert cost.spent(paths, study()) == cost.Spent(0.0, 0.0, 0.0, 0.0, "GPU-hours")


def test_old_lines_hold_what_the_configuration_says(tmp_path):
    write_config(tmp_path, slurm={"gpus": 4}, tuning={"trials_per_gpu": 2})
    paths = StudyPaths(tmp_path / "s")
    write(paths, 0, old_line(0, 60, "stopped", job="7"), line(100, 160, "complete"))
    first, second = cost.attempts(paths)
    assert (first.gpus, first.share, first.slot) == (0.5, 0.125, 0)
    assert (second.gpus, second.share) == (0.5, 0.5)


def old_line(*times, **more) -> dict:
    """Before they said what an attempt held, and what there was of the one before it."""
    return {k: v for k, v in line(*times, **more).items() if k not in ("gpus", "share", "slot")}


def test_old_lines_of_background_workers_held_no_gpu_as_far_as_we_know(paths):
    write(paths, 0, old_line(0, HOUR, "complete"))
    found = cost.spent(paths, study(("COMPLETE", 10)))
    assert (found.gpu_hours, found.unit) == (1.0, "worker-hours")
    write(paths, 1, line(0, HOUR, "complete", gpus=0.0, share=0.5))
    found = cost.spent(paths, study(("COMPLETE", 10), ("COMPLETE", 10)))
    assert (found.gpu_hours, found.unit) == (1.5, "worker-hours")


def test_old_lines_do_not_say_what_was_lost(paths):
    """One that was stopped had saved its state."""
    write(paths, 0, old_line(0, HOUR, "stopped"), old_line(2 * HOUR, 3 * HOUR, "complete"))
    found = cost.spent(paths, study(("COMPLETE", 10)))
    assert (found.useful, found.wasted) == (2.0, 0.0)
    write(paths, 0, line(0, HOUR, "stopped"), line(2 * HOUR, 3 * HOUR, "complete"))
    found = cost.spent(paths, study(("COMPLETE", 10)))
    assert (found.useful, found.wasted) == (0.5, 0.5), "the others say that there was nothing"


def test_old_lines_do_not_say_when_they_were_killed(paths):
    """Then it was before the next one started."""
    write(paths, 0, line(0), line(70, 90, "complete"))
    assert [each.seconds for each in cost.attempts(paths)] == [70, 20]


def test_attempts_that_were_read_already_are_not_read_again(paths, monkeypatch):
    write(paths, 0, line(0, 90, "complete"))
    known, trials = cost.attempts(paths), study(("COMPLETE", 10))
    found = cost.spent(paths, trials)
    monkeypatch.setattr(attempts, "read", lambda path: pytest.fail(f"reads {path}"))
    assert cost.spent(paths, trials, known) == found


def test_a_clock_that_goes_backwards_costs_nothing(paths):
    write(paths, 0, line(100, 40, "stopped"), line(50, 60, "complete", seen=500, saved=500))
    assert [each.seconds for each in cost.attempts(paths)] == [0, 10]


def test_what_an_attempt_holds(tmp_path):
    config = write_config(tmp_path, slurm={"gpus": 2}, tuning={"trials_per_gpu": 3})
    assert cost.share(config, slurm=True) == {"gpus": 2 / 6, "share": 1 / 6}
    cpu = configuration.with_values(config, training={"device": "cpu"})
    assert cost.share(cpu, slurm=True) == {"gpus": 2 / 6, "share": 1 / 6}, "it is charged"
    assert cost.share(cpu, slurm=False) == {"gpus": 0, "share": 1 / 6}


def test_what_is_recorded_is_what_is_read(paths):
    """The lines that a worker writes: times, shares, and what it found of the attempt before."""
    trial = paths.trial(0)
    attempts.begin(trial.attempts, {"job": "7", "attempt": 1}, from_epoch=0, facts={"gpus": 0.25})
    touch(trial.metrics, 1e9)
    touch(trial.last, 1e9 - 20)
    signs = cost.signs_of_life(trial)
    assert signs == {"seen": START + 1e9, "saved": START + 1e9 - 20}
    attempts.begin(trial.attempts, {"job": "8", "attempt": 2}, from_epoch=1, facts=signs)
    attempts.end(trial.attempts, "failed", at=START + 2e9)
    first, second = attempts.read(trial.attempts)
    assert (first["gpus"], second["seen"], second["saved"]) == (0.25, signs["seen"], signs["saved"])
    assert cost.attempts(paths)[1].ended == START + 2e9


plan = st.lists(
    st.tuples(
        st.integers(0, 50),  # seconds of waiting
        st.integers(0, 60),  # of work
        st.integers(-20, 70),  # until the newest checkpoint, after its start
        st.sampled_from(["killed", "stopped"]),
    ),
    min_size=1,
    max_size=5,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(plan, st.sampled_from(["COMPLETE", "PRUNED", "FAIL"])), max_size=4))
def test_every_second_is_useful_or_wasted(tmp_path, trials):
    """Against a count second by second: one is lost if it is worked after the newest checkpoint."""
    folder = tmp_path / fsio.digest([repr(trials)])
    write_config(folder)
    paths, useful, wasted = StudyPaths(folder / "s"), 0, 0
    for number, (tries, state) in enumerate(trials):
        lines, now, signs = [], 0, {}
        for index, (wait, work, saved, how) in enumerate(tries):
            now += wait
            begun, last = now, index == len(tries) - 1
            outcome = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}[state]
            ended = outcome if last else "stopped"
            killed = how == "killed" and not last
            lines.append(line(begun, *([] if killed else [begun + work, ended]), **signs))
            for second in range(begun, begun + work):
                kept = (last and state != "FAIL") or (state != "FAIL" and second < begun + saved)
                useful, wasted = useful + kept, wasted + (not kept)
            now += work
            signs = {"seen": now, "saved": begun + saved}
        write(paths, number, *lines)
    found = cost.spent(paths, study(*((state, 1) for _, state in trials)))
    assert found.useful == pytest.approx(0.5 * useful / HOUR)
    assert found.wasted == pytest.approx(0.5 * wasted / HOUR)
    assert found.gpu_hours == pytest.approx(found.useful + found.wasted)


# --- the quote -------------------------------------------------------------------------------


def quote(config: Config, paths: StudyPaths, trials: optuna.Study | None, **more) -> list[str]:
    return cost.quote(config, paths, trials, slurm=more.pop("slurm", True))


def test_a_quote_from_measured_trials(tmp_path):
    config = write_config(tmp_path, tuning={"workers": 4, "trials_per_gpu": 2})
    paths = StudyPaths(tmp_path / "s")
    for number, minutes in enumerate([30, 40, 60, 110]):
        outcome = "pruned" if number == 0 else "complete"
        write(paths, number, line(0, 60 * minutes, outcome))
    trials = study(("PRUNED", 2), *[("COMPLETE", 10)] * 3)
    # 4 of 8 are left, an hour on average, on half a GPU each; the quartiles are 37.5 and 72.5 min.
    assert quote(config, paths, trials) == [
        (
            "4 trials: about 2 GPU-hours (1.2 to 2.4), by 60 minutes for a trial: the average of "
            "4, 1 of them pruned"
        ),
        (
            "at most 4 GPU-hours: workers (2) x time limit (2 h) x GPUs (1), which Slurm may "
            "charge; a worker that reaches the limit starts again while trials are left"
        ),
    ]


def test_attempts_that_were_interrupted_and_open_trials(tmp_path):
    """All attempts at a trial count, trials that run or failed do not, those that wait are to come."""
    config = write_config(tmp_path, tuning={"n_trials": 5})
    paths = StudyPaths(tmp_path / "s")
    write(paths, 0, line(0, 1800, "stopped"), line(9000, 10800, "complete", saved=1800, seen=1800))
    write(paths, 1, line(0, 60, "failed"))
    write(paths, 2, line(0, 60, "stopped"))
    write(paths, 3, line(0))
    trials = study(("COMPLETE", 10), ("FAIL", 0), ("WAITING", 1), ("RUNNING", 1))
    (measured, *_) = quote(config, paths, trials)
    assert measured.startswith("2 trials: about 2 GPU-hours (2 to 2), by 60 minutes for a trial")
    write(paths, 99, line(0, 7, "complete"))  # a folder that was copied there, say
    assert quote(config, paths, trials)[0] == measured


def test_without_a_measured_trial_only_the_most_is_known(tmp_path):
    config = write_config(tmp_path, tuning={"workers": 3}, slurm={"gpus": 2, "time": "90"})
    most, advice = quote(config, StudyPaths(tmp_path / "s"), None)
    assert most.startswith("at most 9 GPU-hours: workers (3) x time limit (1.5 h) x GPUs (2)")
    assert "--n-trials 1" in advice
    assert quote(config, StudyPaths(tmp_path / "s"), None, slurm=False) == []


def test_without_gpus_a_quote_is_in_hours_of_workers(tmp_path):
    config = write_config(
        tmp_path, slurm={"gpus": 0}, tuning={"workers": 20, "budget_gpu_hours": 5}
    )
    most, _, budget = quote(config, StudyPaths(tmp_path / "s"), None)
    assert most.startswith("at most 16 worker-hours: workers (8) x time limit (2 h), which")
    assert budget == "budget of the study: 5 worker-hours"
