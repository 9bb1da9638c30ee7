"""What the shared study costs a trial: our worker against plain `study.optimize`.

16 processes, PostgreSQL, 5,000 finished trials in the study; a trial has five parameters and
reports 15 epochs. Nothing is trained, so that all of the time is overhead: the storage, and for our
worker also the trial's folder, configuration, log and attempts.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import tempfile
import time
from pathlib import Path

import optuna
import psycopg2

from tests import postgres
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.paths import StudyPaths
from tripletkit.train.loop import TrainResult
from tripletkit.tune import space, storage, study, worker

PROCESSES = 16
TRIALS = 4  # of each process and kind
EPOCHS = 15
FINISHED = 5_000

# Copies of one trial, with other parameters and values; through Optuna they would take ten minutes.
COPY = """
    INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete)
        SELECT trial_id + n, n, study_id, state, datetime_start, datetime_complete
        FROM trials, generate_series(1, %(copies)s) n WHERE trial_id = %(one)s;
    INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
        SELECT trial_id + n, param_name,
            CASE param_name WHEN 'hidden_dim' THEN n %% 3 ELSE param_value * (0.5 + random()) END,
            distribution_json
        FROM trial_params, generate_series(1, %(copies)s) n WHERE trial_id = %(one)s;
    INSERT INTO trial_values (trial_id, objective, value, value_type)
        SELECT trial_id + n, objective, 0.2 * random(), value_type
        FROM trial_values, generate_series(1, %(copies)s) n WHERE trial_id = %(one)s;
    INSERT INTO trial_intermediate_values
        (trial_id, step, intermediate_value, intermediate_value_type)
        SELECT trial_id + n, step, 0.2 * random(), intermediate_value_type
        FROM trial_intermediate_values, generate_series(1, %(copies)s) n
        WHERE trial_id = %(one)s;
    SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), %(one)s + %(copies)s + 1);
    ANALYZE;
"""

fork = multiprocessing.get_context("forkserver")


def for_optuna(url: str) -> str:
    """SQLAlchemy's default driver is another one."""
    return url.replace("postgresql://", "postgresql+psycopg2://")


def fill(url: str, name: str) -> None:
    """Give the study its finished trials."""
    shared = optuna.load_study(study_name=name, storage=for_optuna(url))
    trial = shared.ask()
    space.suggest(trial, Config().tuning.space)
    for epoch in range(EPOCHS):
        trial.report(0.1, epoch)
    shared.tell(trial, 0.1)
    one = trial._trial_id
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(COPY, {"one": one, "copies": FINISHED - 1})
        connection.commit()


def plain(config: Config, gate: multiprocessing.Barrier, took: multiprocessing.Queue) -> None:
    """What a user writes by hand."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared = optuna.load_study(
        study_name=config.tuning.study_name, storage=for_optuna(config.tuning.storage_url)
    )

    def objective(trial: optuna.Trial) -> float:
        space.suggest(trial, config.tuning.space)
        for epoch in range(EPOCHS):
            trial.report(0.5, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 0.5

    shared.optimize(objective, n_trials=1)  # reads the finished trials once
    gate.wait()
    began = time.monotonic()
    shared.optimize(objective, n_trials=TRIALS)
    took.put((time.monotonic() - began) / TRIALS)
    gate.wait()


def ours(config: Config, gate: multiprocessing.Barrier, took: multiprocessing.Queue) -> None:
    """Our worker, with a training that only reports."""

    def only_report(_config, _data, paths, *, report, should_stop) -> TrainResult:
        for epoch in range(EPOCHS):
            report(epoch, {"map@r": 0.5})
        return TrainResult("finished", EPOCHS, 0, {}, {}, {"map@r": 0.5}, 0)

    worker.loop.train = only_report
    job = str(multiprocessing.current_process().pid)
    shared = storage.open_study(config.tuning, seed=int(job), workers=PROCESSES)
    left = [0]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    surroundings = worker.Surroundings(
        load_data=lambda _: None,
        job_states=lambda jobs: dict.fromkeys(jobs, "running"),
        should_stop=stop,
        seconds_left=lambda: math.inf,
    )
    me = worker.Worker(job=job, restart=0, host="n1", pid=int(job))
    paths = StudyPaths(config.tuning.output_dir / config.tuning.study_name)

    def run(trials: int) -> None:
        left[0] = trials
        done = worker.run(shared, config, paths, me, surroundings)
        assert done.ended == ["complete"] * trials

    run(1)
    gate.wait()
    began = time.monotonic()
    run(TRIALS)
    took.put((time.monotonic() - began) / TRIALS)
    gate.wait()


def measure() -> dict[str, list[float]]:
    """Seconds of overhead per trial of each process, for both."""
    results = {}
    with postgres.start() as server, tempfile.TemporaryDirectory() as folder:
        for run in (plain, ours):
            url = server.database()
            values = {
                "storage_url": url, "study_name": run.__name__, "n_trials": 10 * FINISHED,
                "max_epochs": EPOCHS, "objective": "map@r", "output_dir": Path(folder),
            }  # fmt: skip
            config = configuration.with_values(
                Config(), tuning=values, paths={"val_parquet_path": "val.parquet"}
            )
            study.prepare(config, StudyPaths(Path(folder) / run.__name__))
            fill(url, run.__name__)
            gate, took = fork.Barrier(PROCESSES), fork.Queue()
            processes = [
                fork.Process(target=run, args=(config, gate, took)) for _ in range(PROCESSES)
            ]
            for process in processes:
                process.start()
            results[run.__name__] = [took.get(timeout=900) for _ in processes]
            for process in processes:
                process.join()
    return results
