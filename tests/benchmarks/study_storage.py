"""What the shared study costs a trial: our worker against plain `study.optimize`.

16 processes, PostgreSQL, 5,000 finished trials in the study, unless asked for others; a trial has
five parameters and reports 15 epochs. Nothing is trained, so that all of the time is overhead: the
storage, and for our worker also the trial's folder, configuration, log and attempts.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from threading import BrokenBarrierError
from typing import NamedTuple

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
PATIENCE = 900  # seconds

# Copies of one trial, with other parameters and values; through Optuna they would take ten minutes.
SERIES = (
    "WITH RECURSIVE series(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {copies})"
)
COPY = """
    INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete)
        {series} SELECT trial_id + n, n, study_id, state, datetime_start, datetime_complete
        FROM trials, series WHERE trial_id = {one};
    INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
        {series} SELECT trial_id + n, param_name,
            CASE param_name WHEN 'hidden_dim' THEN n % 3 ELSE param_value * (0.5 + {random}) END,
            distribution_json
        FROM trial_params, series WHERE trial_id = {one};
    INSERT INTO trial_values (trial_id, objective, value, value_type)
        {series} SELECT trial_id + n, objective, 0.2 * {random}, value_type
        FROM trial_values, series WHERE trial_id = {one};
    INSERT INTO trial_intermediate_values
        (trial_id, step, intermediate_value, intermediate_value_type)
        {series} SELECT trial_id + n, step, 0.2 * {random}, intermediate_value_type
        FROM trial_intermediate_values, series WHERE trial_id = {one};
"""
AFTERWARDS = """
    SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), {last});
    ANALYZE;
"""

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.benchmarks.study_storage"])


class Size(NamedTuple):
    """How much is asked of a study."""

    processes: int = PROCESSES
    trials: int = TRIALS  # of each process
    finished: int = FINISHED  # before


USUAL = Size()


def for_optuna(config: Config) -> str:
    """The storage as Optuna names it; SQLAlchemy's default driver is another one."""
    if config.tuning.storage_url is None:
        return f"sqlite:///{config.tuning.storage_path}"
    return config.tuning.storage_url.replace("postgresql://", "postgresql+psycopg2://")


def fill(config: Config, finished: int) -> None:
    """Give the study its finished trials."""
    shared = optuna.load_study(study_name=config.tuning.study_name, storage=for_optuna(config))
    trial = shared.ask()
    space.suggest(trial, Config().tuning.space)
    for epoch in range(EPOCHS):
        trial.report(0.1, epoch)
    shared.tell(trial, 0.1)
    values = {"one": trial._trial_id, "series": SERIES.format(copies=finished - 1)}
    if config.tuning.storage_url is None:
        random = "((random() & 1048575) / 1048576.0)"
        with contextlib.closing(sqlite3.connect(config.tuning.storage_path)) as connection:
            connection.executescript(COPY.format(random=random, **values))
        return
    copy = COPY.format(random="random()", **values)
    with contextlib.closing(psycopg2.connect(config.tuning.storage_url)) as connection:
        with connection.cursor() as cursor:
            cursor.execute(copy + AFTERWARDS.format(last=trial._trial_id + finished))
        connection.commit()


def plain(config: Config, size: Size) -> Callable[[int], None]:
    """What a user writes by hand; the function does so many trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared = optuna.load_study(study_name=config.tuning.study_name, storage=for_optuna(config))

    def objective(trial: optuna.Trial) -> float:
        space.suggest(trial, config.tuning.space)
        for epoch in range(EPOCHS):
            trial.report(0.5, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 0.5

    return lambda trials: shared.optimize(objective, n_trials=trials)


def ours(config: Config, size: Size) -> Callable[[int], None]:
    """Our worker, with a training that only reports; the function does so many trials."""

    def only_report(_config, _data, paths, *, report, should_stop) -> TrainResult:
        for epoch in range(EPOCHS):
            report(epoch, {"map@r": 0.5})
        return TrainResult("finished", EPOCHS, 0, {}, {}, {"map@r": 0.5}, 0)

    worker.loop.train = only_report
    job = str(multiprocessing.current_process().pid)
    shared = storage.open_study(config.tuning, seed=int(job), workers=size.processes)
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

    return run


KINDS = {"plain": plain, "ours": ours}


def process(
    kind: str,
    config: Config,
    size: Size,
    gate: multiprocessing.Barrier,
    took: multiprocessing.Queue,
) -> None:
    """One of the processes; puts its seconds per trial, or what went wrong."""
    try:
        run = KINDS[kind](config, size)
        run(1)  # reads the finished trials once
        gate.wait(PATIENCE)
        began = time.monotonic()
        run(size.trials)
        took.put((time.monotonic() - began) / size.trials)
        gate.wait(PATIENCE)
    except BrokenBarrierError:
        took.put(None)
    except Exception as error:  # noqa: BLE001 - the parent says what it was
        took.put(f"{type(error).__name__}: {error}")
        gate.abort()


@contextlib.contextmanager
def storage_of(backend: str, folder: Path) -> Iterator[Callable[[str], dict[str, object]]]:
    """Makes the configuration of a new, empty storage, given a name."""
    if backend == "sqlite":
        yield lambda name: {"storage_path": folder / f"{name}.db"}
    else:
        with postgres.start(max_connections=300) as server:
            yield lambda _: {"storage_url": server.database()}


def measure(
    size: Size = USUAL, backend: str = "postgresql", kinds: Collection[str] = tuple(KINDS)
) -> dict[str, list[float]]:
    """Seconds of overhead per trial of each process, for each of the kinds.

    A kind whose processes fail is left out, with a line that says why.
    """
    results = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        storage_of(backend, Path(folder)) as new_storage,
    ):
        for kind in kinds:
            values = new_storage(kind) | {
                "study_name": kind, "n_trials": 10 * (size.finished + size.processes * size.trials),
                "max_epochs": EPOCHS, "objective": "map@r", "output_dir": Path(folder),
            }  # fmt: skip
            config = configuration.with_values(
                Config(), tuning=values, paths={"val_parquet_path": "val.parquet"}
            )
            study.prepare(config, StudyPaths(Path(folder) / kind))
            fill(config, size.finished)
            seconds = together(kind, config, size)
            if all(isinstance(s, float) for s in seconds):
                results[kind] = seconds
            else:
                why = next((s for s in seconds if isinstance(s, str)), "a process failed")
                print(
                    f"{kind}, {size.processes} workers on {backend}: {why.strip().splitlines()[0]}",
                    flush=True,
                )
    return results


def together(kind: str, config: Config, size: Size) -> list[float | str | None]:
    """What each of the processes puts, at most one value each."""
    gate, took = fork.Barrier(size.processes), fork.Queue()
    processes = [
        fork.Process(target=process, args=(kind, config, size, gate, took))
        for _ in range(size.processes)
    ]
    for each in processes:
        each.start()
    found = [took.get(timeout=2 * PATIENCE) for _ in processes]
    for each in processes:
        each.join()
    return found
