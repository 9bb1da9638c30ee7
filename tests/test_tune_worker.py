"""A worker on real trials: stopped, killed, pruned, failed and taken over."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch

from tests import toy
from tripletkit import config as configuration
from tripletkit import inputs, stages
from tripletkit.config import Config
from tripletkit.errors import ConfigError, DataError, RunError
from tripletkit.paths import run_paths
from tripletkit.train import loop
from tripletkit.tune import attempts, claims, retry, storage, study, worker
from tripletkit.tune.claims import Worker
from tripletkit.tune.worker import Summary, Surroundings

pytest_plugins = ["tests.postgres"]

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.test_tune_worker", "torch._dynamo"])


@pytest.fixture(autouse=True)
def one_thread():
    """Everywhere alike, since sums in another order are other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    toy.write_parquet(folder / "train.parquet", buildings=40, dim=16, noise=1.0)
    toy.write_parquet(folder / "val.parquet", buildings=20, first=100, dim=16, noise=1.0)
    return folder


@pytest.fixture
def config(files, tmp_path) -> Config:
    return make_config(files, tmp_path)


def make_config(files: Path, folder: Path) -> Config:
    return configuration.with_values(
        Config(),
        global_={"scratch_dir": folder, "log_dir": folder / "logs"},
        paths={
            "train_parquet_path": files / "train.parquet",
            "val_parquet_path": files / "val.parquet",
            "cache_dir": files / "cache",
        },
        training={
            "batch_size": 16, "device": "cpu", "retrieval_metric_top_k": [1],
            "checkpoint_every_minutes": 1e-9,  # after every step
        },
        training_model={"hidden_dim": 16, "output_dim": 8},
        tuning={
            "output_dir": folder / "trials", "storage_path": folder / "study.db", "n_trials": 2,
            "max_epochs": 4, "objective": "map@r", "sampler": "random", "pruner": "none",
            "space": {
                "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
                "margin": {"type": "float", "low": 0.1, "high": 1.0},
            },
        },
    )  # fmt: skip


def surroundings(**given) -> Surroundings:
    return Surroundings(
        load_data=given.get("load_data", inputs.training_data),
        job_states=given.get("job_states", lambda jobs: dict.fromkeys(jobs, "gone")),
        should_stop=given.get("should_stop", lambda: False),
        seconds_left=given.get("seconds_left", lambda: math.inf),
    )


def me(job: str = "1", restart: int = 0) -> Worker:
    return Worker(job=job, restart=restart, host="n1", pid=os.getpid())


def work(config: Config, who: Worker | None = None, **given) -> Summary:
    shared = storage.open_study(config.tuning, seed=0, workers=1)
    return worker.run(
        shared, config, stages.study_paths(config), who or me(), surroundings(**given)
    )


def prepare(config: Config) -> storage.SharedStudy:
    return study.prepare(config, stages.study_paths(config))


def trials_of(shared) -> list[optuna.trial.FrozenTrial]:
    return shared.study.get_trials()


def metrics_of(config: Config, number: int) -> list[dict]:
    path = stages.study_paths(config).trial(number).metrics
    return [json.loads(line) for line in path.read_text().splitlines()]


def attempts_of(config: Config, number: int) -> list[dict]:
    return attempts.read(stages.study_paths(config).trial(number).attempts)


def uninterrupted(config: Config, number: int, params: dict, folder: Path) -> bytes:
    """The metrics file of the same trial, trained in one go elsewhere."""
    paths = run_paths(folder)
    values = {"training": {**params, "num_epochs": 4, "monitor": "map@r", "save_every_n_epochs": 4}}
    whole = configuration.with_values(config, **values)
    loop.train(whole, inputs.training_data(whole), paths)
    return paths.metrics.read_bytes()


def test_a_worker_runs_the_whole_study(config):
    shared = prepare(config)
    assert work(config) == Summary(ended=["complete", "complete"], progress=True, open=False)
    for trial in trials_of(shared):
        records = metrics_of(config, trial.number)
        assert trial.state.name == "COMPLETE"
        assert trial.value == max(record["map@r"] for record in records)
        assert trial.intermediate_values == {r["epoch"]: r["map@r"] for r in records}
        assert sorted(trial.intermediate_values) == [0, 1, 2, 3, 4]
        paths = stages.study_paths(config).trial(trial.number)
        ran = configuration.load(paths.config)
        assert ran.training.learning_rate == trial.params["learning_rate"]
        assert ran.training.margin == trial.params["margin"]
        assert paths.final.exists()
        (attempt,) = attempts_of(config, trial.number)
        assert attempt["outcome"] == "complete"
        assert attempt["job"] == "1"
        assert f"trial {trial.number}: complete" in paths.log.read_text()


def test_a_full_study_gets_no_more_trials(config):
    shared = prepare(config)
    work(config)
    assert work(config) == Summary()  # neither progress nor anything open
    assert len(trials_of(shared)) == 2


def test_loss_is_minimised(config):
    config = configuration.with_values(config, tuning={"objective": "val_loss"})
    shared = prepare(config)
    work(config)
    for trial in trials_of(shared):
        assert trial.value == min(record["val_loss"] for record in metrics_of(config, trial.number))
    assert shared.study.best_value == min(t.value for t in trials_of(shared))


def stop_after(steps: int):
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > steps

    return should_stop


def test_stopped_midway_a_trial_waits_and_another_worker_goes_on(config, tmp_path):
    shared = prepare(config)
    summary = work(config, me("1"), should_stop=stop_after(30))
    assert summary == Summary(ended=["stopped"], progress=True, open=True)
    (trial,) = trials_of(shared)
    assert trial.state.name == "WAITING"
    params, reports = trial.params, trial.intermediate_values
    assert 0 < max(reports) < 4

    assert work(config, me("2")).ended == ["complete", "complete"]
    trial = trials_of(shared)[0]
    assert trial.state.name == "COMPLETE"
    assert trial.params == params
    assert reports.items() < trial.intermediate_values.items()
    whole = uninterrupted(config, 0, params, tmp_path / "whole")
    assert stages.study_paths(config).trial(0).metrics.read_bytes() == whole
    first, second = attempts_of(config, 0)
    assert (first["outcome"], first["job"]) == ("stopped", "1")
    assert (second["outcome"], second["job"]) == ("complete", "2")
    assert second["from_epoch"] == max(reports)


def test_stopped_before_the_first_step_is_no_progress(config):
    prepare(config)
    assert work(config, should_stop=stop_after(1)) == Summary(
        ended=["stopped"], progress=False, open=True
    )


def work_and_die(config: Config, reports: int) -> None:
    """Killed right after so many reports; 0: before the training begins."""
    torch.set_num_threads(1)
    if reports == 0:
        work(config, me("1"), load_data=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    report = optuna.Trial.report
    done = []

    def report_and_die(*arguments):
        report(*arguments)
        done.append(1)
        if len(done) == reports:
            os.kill(os.getpid(), signal.SIGKILL)

    optuna.Trial.report = report_and_die
    work(config, me("1"))


def die(config: Config, reports: int) -> None:
    process = fork.Process(target=work_and_die, args=(config, reports))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("reports", [1, 3, 5])
def test_killed_midway_a_trial_goes_on_from_its_checkpoint(config, tmp_path, reports):
    shared = prepare(config)
    die(config, reports)
    params = trials_of(shared)[0].params
    assert trials_of(shared)[0].state.name == "RUNNING"

    assert work(config, me("2")).ended == ["complete", "complete"]
    trial = trials_of(shared)[0]
    assert trial.params == params
    assert sorted(trial.intermediate_values) == [0, 1, 2, 3, 4]
    whole = uninterrupted(config, 0, params, tmp_path / "whole")
    assert stages.study_paths(config).trial(0).metrics.read_bytes() == whole
    killed, last = attempts_of(config, 0)
    assert "outcome" not in killed
    assert last["outcome"] == "complete"


def test_epochs_that_were_finished_but_not_reported_are_reported(config):
    """Killed between the metrics file and the storage."""
    shared = prepare(config)
    work(config, me("1"), should_stop=stop_after(30))
    path = stages.study_paths(config).trial(0)
    on_file = {r["epoch"]: r["map@r"] for r in metrics_of(config, 0)}
    # The same trial, as if nothing had been reported.
    fresh = configuration.with_values(config, tuning={"study_name": "fresh"})
    other = prepare(fresh)
    claims.claim(other, me("1"), 2, lambda jobs: {}).release()
    path.root.rename(stages.study_paths(fresh).trial(0).root)
    work(fresh, me("2"), should_stop=lambda: True)
    assert trials_of(other)[0].intermediate_values == {}
    work(fresh, me("2"), should_stop=stop_after(1))
    assert trials_of(other)[0].intermediate_values == on_file
    assert len(trials_of(shared)) == 1


def test_a_trial_that_another_worker_took_is_left_to_it(config):
    shared = prepare(config)
    taken = []

    def load(config: Config):
        if not taken:
            taken.append(claims.claim(shared, me("2"), 2, lambda jobs: dict.fromkeys(jobs, "gone")))
        return inputs.training_data(config)

    summary = work(
        config, me("1"), load_data=load, job_states=lambda j: dict.fromkeys(j, "running")
    )
    assert summary.ended == ["taken over", "complete"]
    assert taken[0].holds()
    assert trials_of(shared)[0].state.name == "RUNNING"
    assert trials_of(shared)[1].state.name == "COMPLETE"


def test_bad_trials_are_pruned_and_count(config, monkeypatch):
    monkeypatch.setattr(worker, "ASKING_SHARE", math.inf)  # the epochs take milliseconds
    config = configuration.with_values(
        config,
        tuning={
            "n_trials": 6, "pruner": "successive_halving", "max_epochs": 4,
            "space": {"init": {"type": "categorical", "choices": ["lda", "random"]}},
        },
    )  # fmt: skip
    shared = prepare(config)
    for init in ("lda", "lda", "lda", "random", "random", "random"):
        shared.study.enqueue_trial({"init": init})
    work(config)
    states = [t.state.name for t in trials_of(shared)]
    assert states[0] == "COMPLETE"
    assert states[3:] == ["PRUNED"] * 3
    pruned = trials_of(shared)[5]
    assert pruned.value == pruned.intermediate_values[max(pruned.intermediate_values)]
    assert max(pruned.intermediate_values) < 4
    assert attempts_of(config, 5)[0]["outcome"] == "pruned"


def test_a_trial_is_not_pruned_before_it_is_where_it_was(config, monkeypatch):
    """Killed after a report, it goes on from an older checkpoint: the study has the later epoch."""
    monkeypatch.setattr(worker, "ASKING_SHARE", math.inf)
    config = configuration.with_values(config, tuning={"n_trials": 1})
    shared, paths = prepare(config), stages.study_paths(config).trial(0)
    aside = paths.root.parent / "aside"

    def reported() -> dict[int, float]:
        return trials_of(shared)[0].intermediate_values

    def stop_at(epoch: int) -> Callable[[], bool]:
        return lambda: bool(trials_of(shared)) and max(reported(), default=0) >= epoch

    work(config, should_stop=stop_at(1))
    shutil.copytree(paths.checkpoints, aside)
    work(config, should_stop=stop_at(3))
    assert max(reported()) == 3
    for path in paths.saved():
        path.unlink()
    for path in aside.glob("checkpoint_*.pt"):
        shutil.copy(path, paths.checkpoints)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda _: True)
    work(config)
    assert trials_of(shared)[0].state.name == "PRUNED"
    assert [each["epoch"] for each in metrics_of(config, 0)] == sorted(reported()) == [0, 1, 2, 3]


def test_asking_whether_to_prune_takes_a_small_share_of_the_time(config, monkeypatch):
    prepare(config)
    asked = []
    clock = [0.0]

    def ask(trial):
        asked.append(clock[0])
        clock[0] += 2.0  # a slow storage
        return False

    monkeypatch.setattr(optuna.Trial, "should_prune", ask)
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock[0])
    trial = worker._Trial(
        claims.claim(prepare(config), me(), 2, lambda jobs: {}),
        config,
        stages.study_paths(config).trial(0),
    )
    for epoch in range(1000):
        clock[0] += 1.0
        trial._report(epoch, {"map@r": 0.5})
    assert len(asked) * 2.0 <= worker.ASKING_SHARE * clock[0] + 2.0
    assert len(asked) >= 9


@pytest.mark.parametrize(
    ("space", "values", "kind"),
    [
        ("learning_rate", [1e38], "nan"),
        ("use_residual", [False], "bad_configuration"),
    ],
)
def test_a_trial_that_cannot_work_fails_with_its_cause(config, space, values, kind):
    config = configuration.with_values(
        config,
        tuning={"space": {space: {"type": "categorical", "choices": values}}},
        training={"precision": "fp32"},
    )
    shared = prepare(config)
    assert work(config).ended == ["failed", "failed"]
    for trial in trials_of(shared):
        assert trial.state.name == "FAIL"
        assert trial.user_attrs[claims.CAUSE]["kind"] == kind
        (attempt,) = attempts_of(config, trial.number)
        assert (attempt["outcome"], attempt["cause"]) == ("failed", kind)


def test_three_failures_in_a_row_end_the_worker(config):
    config = configuration.with_values(
        config,
        tuning={
            "n_trials": 9,
            "space": {"use_residual": {"type": "categorical", "choices": [False]}},
        },
    )
    shared = prepare(config)
    with pytest.raises(RunError, match="3 trials in a row failed"):
        work(config)
    assert len(trials_of(shared)) == 3


SAMPLERS = {"negative_sampler": {"type": "categorical", "choices": ["random", "fixed:7"]}}


def test_what_fails_all_trials_alike_fails_the_worker_and_no_trial(config):
    """There are no bands in these data at all."""
    config = configuration.with_values(config, training={"negative_sampler": "fixed:7"})
    shared = prepare(config)
    with pytest.raises(ConfigError, match="fixed:7"):
        work(config)
    assert [t.state.name for t in trials_of(shared)] == ["WAITING"]


def test_a_worker_that_has_trained_before_knows_that_it_is_the_trial(config):
    config = configuration.with_values(config, tuning={"space": SAMPLERS})
    shared = prepare(config)
    for sampler in ("random", "fixed:7"):
        shared.study.enqueue_trial({"negative_sampler": sampler})
    assert work(config).ended == ["complete", "failed"]
    assert trials_of(shared)[1].user_attrs[claims.CAUSE]["kind"] == "bad_configuration"


def test_a_broken_gpu_is_no_fault_of_the_trial(config):
    shared = prepare(config)

    def broken(config: Config):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    with pytest.raises(RuntimeError, match="ECC"):
        work(config, load_data=broken)
    assert trials_of(shared)[0].state.name == "WAITING"


def test_asked_to_stop_while_the_storage_is_away_the_trial_stays_with_its_job(
    config, start_postgres, monkeypatch
):
    monkeypatch.setattr(retry, "LAST_PATIENCE", 1.0)
    server = start_postgres()
    config = configuration.with_values(config, tuning={"storage_url": server.database()})
    prepare(config)
    stop = stop_after(30)

    def stop_and_lose() -> bool:
        if stopping := stop():
            server.stop()
        return stopping

    shared = storage.open_study(config.tuning, seed=0, workers=1, should_stop=stop_and_lose)
    paths, around = stages.study_paths(config), surroundings(should_stop=stop_and_lose)
    began = time.monotonic()
    summary = worker.run(shared, config, paths, me("7"), around)
    assert summary == Summary(ended=["stopped"], progress=True, open=True)
    assert time.monotonic() - began < retry.PATIENCE / 4
    server.start()
    assert trials_of(shared)[0].state.name == "RUNNING"
    assert work(config, me("7", restart=1)).ended == ["complete", "complete"]
    assert [each["outcome"] for each in attempts_of(config, 0)] == ["stopped", "complete"]


def test_frozen_while_another_finished_its_trial_a_worker_goes_on_with_the_next(config):
    shared = prepare(config)
    finished = []

    def load(config: Config):
        if not finished:
            finished.append(1)
            work(config_of_study, me("2"), job_states=lambda jobs: dict.fromkeys(jobs, "gone"))
        return inputs.training_data(config)

    config_of_study = configuration.with_values(config, tuning={"n_trials": 1})
    summary = work(
        config, me("1"), load_data=load, job_states=lambda j: dict.fromkeys(j, "running")
    )
    assert summary.ended == ["taken over", "complete"]
    assert [t.state.name for t in trials_of(shared)] == ["COMPLETE", "COMPLETE"]


def test_a_checkpoint_within_an_epoch_is_getting_further(tmp_path):
    path = tmp_path / "attempts.jsonl"
    for step in (0, 40, 80, 80):
        attempts.begin(path, {"job": "7"}, from_epoch=0, from_step=step)
    assert attempts.killed_in_a_row(path) == 2


def test_bad_data_ends_the_worker_but_not_the_trial(config):
    shared = prepare(config)

    def broken(config: Config):
        raise DataError("train.parquet: truncated")

    with pytest.raises(DataError, match="truncated"):
        work(config, load_data=broken)
    assert trials_of(shared)[0].state.name == "WAITING"
    assert work(config).ended == ["complete", "complete"]


def test_a_trial_that_is_killed_again_and_again_at_one_place_fails(config):
    shared = prepare(config)
    for _ in range(worker.KILLS_IN_A_ROW):
        die(config, 0)
    work(config, me("2"))
    killed, other = trials_of(shared)
    assert killed.state.name == "FAIL"
    assert killed.user_attrs[claims.CAUSE]["kind"] == "killed"
    assert other.state.name == "COMPLETE"


def test_a_trial_that_gets_further_each_time_may_be_killed_often(config):
    shared = prepare(config)
    for _ in range(worker.KILLS_IN_A_ROW):
        die(config, 2)
    assert work(config, me("2")).ended[0] == "complete"
    assert trials_of(shared)[0].state.name == "COMPLETE"


def test_shortly_before_the_time_limit_no_trial_is_begun(config):
    shared = prepare(config)
    assert work(config, seconds_left=lambda: 30.0) == Summary(ended=[], open=True)
    assert trials_of(shared) == []


def test_prepared_again_a_study_goes_on(config):
    first = prepare(config)
    work(config)
    more = configuration.with_values(config, tuning={"n_trials": 3})
    second = prepare(more)
    assert second.study.user_attrs[study.ID] == first.study.user_attrs[study.ID]
    assert work(more).ended == ["complete"]


def test_a_folder_of_another_study_of_that_name_is_refused(config, tmp_path):
    prepare(config)
    other = configuration.with_values(config, tuning={"storage_path": tmp_path / "other.db"})
    with pytest.raises(configuration.files.ConfigError, match="another study"):
        prepare(other)


def test_choices_cannot_change_while_there_are_trials(config):
    space = {"hidden_dim": {"type": "categorical", "choices": [16, 32]}}
    config = configuration.with_values(config, tuning={"space": space})
    prepare(config)
    work(config)
    space = {"hidden_dim": {"type": "categorical", "choices": [16, 64]}}
    changed = configuration.with_values(config, tuning={"space": space})
    with pytest.raises(configuration.files.ConfigError, match="choices"):
        prepare(changed)
