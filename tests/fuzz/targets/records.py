"""Files of a run, a study and a job that other processes, versions and people may have written."""

from __future__ import annotations

import functools
import json
import random
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import optuna

from tests.fuzz.draw import Draw, mutated
from tests.fuzz.judge import Surprise, Target
from tripletkit import compare, differences, endings, provenance, rerun
from tripletkit import config as configuration
from tripletkit.apply import facts
from tripletkit.cluster import jobs
from tripletkit.config import Config
from tripletkit.errors import TripletkitError
from tripletkit.monitor import why
from tripletkit.paths import LogPaths, run_paths, study_paths
from tripletkit.report import intervals
from tripletkit.report.run import read_history
from tripletkit.tune import attempts, cost
from tripletkit.tune.database import client, lease
from tripletkit.tune.database.server import DatabasePaths

WHEN = "2026-01-02T03:04:05Z"
ATTEMPT = {
    "job": "12_3", "restart": 0, "host": "n1", "pid": 7, "attempt": 1, "started": WHEN, "from_epoch": 0, "from_step": 0,
    "gpus": 1.0, "share": 1.0, "seen": 1.0, "saved": 1.0, "ended": WHEN, "outcome": "complete",
}  # fmt: skip
START = {
    "started": WHEN, "ended": WHEN, "config_digest": "x", "code": {"tripletkit": {"commit": "abc", "diff": None}, "work": None},
    "trainer": {"device": "cpu", "threads": 1, "processes": 1}, "machine": {"cpu": "x", "gpus": []}, "versions": {"torch": "2"},
}  # fmt: skip
SOURCE = {
    "fingerprint": "f",
    "content": "f",
    "source": "/d/t.parquet",
    "rows": 3,
    "buildings": 2,
    "dim": 4,
}
EVALUATION = {
    "data": {"source": "t.parquet", "fingerprint": "f", "queries": 3, "queried_buildings": 2, "images": 4},
    "bootstrap": {"level": 0.95, "resamples": 10},
    "columns": [{"name": "raw", "sha256": None, "metrics": {"mrr": 0.5}, "intervals": {"mrr": [0.4, 0.6]}},
                {"name": "x", "sha256": "s", "metrics": {"mrr": 0.6}, "intervals": {"mrr": [0.4, 0.7]}}],
    "differences": [],
}  # fmt: skip
RECORD = {
    "job": "12", "stage": "train", "name": "train-x", "host": "h", "pid": 1, "restart": 0, "config": "c.toml", "started": WHEN,
    "ended": None, "exit_code": None, "message": None, "fruitless": 0,
}  # fmt: skip
METRICS = {
    "epoch": 1,
    "step": 3,
    "val_loss": 0.5,
    "mrr": 0.5,
    "raw": {"mrr": 0.4},
    "bands": [[1.0, 2.0]],
    "train_loss": 0.1,
}
HOLDER = {
    "token": "t",
    "job": "12",
    "host": "h",
    "machine": "m",
    "since": WHEN,
    "state": "up",
    "message": "",
}
CONNECTION = {
    "host": "127.0.0.1",
    "port": 5432,
    "user": "u",
    "password": "s3cr3t",
    "database": "d",
    "node": socket.gethostname(),
}
BEST = {"source": "trial 1", "metric": "mrr", "value": 0.5, "params": {}, "epoch": 1}
FILES = {
    "trial_00000/attempts.jsonl": ATTEMPT, "trial_00000/provenance.json": {"format_version": 1, "data": {"training embeddings": SOURCE}, "starts": [START]},
    "trial_00000/metrics.jsonl": METRICS, "trial_00000/best_trial.json": BEST, "trial_00000/rerun.json": {"run": "x"},
    "trial_00000/evaluation/test/evaluation.json": EVALUATION, "study.json": {"id": "x"}, "trial_00000/config.toml": {"training": {"margin": 0.5}},
}  # fmt: skip


def config() -> Config:
    """Anew for each input: its paths begin at the folder that we are in."""
    return Config(tuning={"study_name": "s", "output_dir": "trials"}, global_={"log_dir": "logs"})  # type: ignore[arg-type]


def _records(data: bytes) -> None:
    draw = Draw(data)
    here = config()
    paths = study_paths(here)
    hit = draw.of([*FILES, "record", "holder", "connection"])
    for name, value in FILES.items():
        _write(draw, paths.root / name, value, name == hit)
    logs = LogPaths(here.global_.log_dir)
    database = DatabasePaths(Path("db"))
    _write(draw, logs.record("12"), RECORD, hit == "record")
    _write(draw, database.record, HOLDER, hit == "holder")
    _write(draw, database.connection, CONNECTION, hit == "connection")
    trial = paths.trial(0)
    run = run_paths(trial.root)
    errors = []
    looks = {
        "attempts": lambda: attempts.read(trial.attempts),
        "killed": lambda: attempts.killed_in_a_row(trial.attempts),
        "cost": lambda: cost.spent(paths, _study()),
        "attempts of all": lambda: [
            why._attempt(e, [], goes_on=False) for e in attempts.read(trial.attempts)
        ],
        "records": lambda: [str(each) for each in jobs.records(logs)],
        "states": lambda: jobs.states(logs, ["local-99999999"]),
        "holder": lambda: str(lease.read(database.record)),
        "status": lambda: str(client.status(Path("db"))),
        "connection": lambda: client.connection(Path("db")),
        "provenance": lambda: provenance.newest(provenance.read(trial.root)),
        "diff": lambda: provenance.code_diff(
            trial.root, provenance.newest(provenance.read(trial.root)).get("code", {}).get("work")
        ),
        "compare": lambda: differences.result_lines(_compared(trial.root)),
        "comparison": lambda: (
            differences.report(_compared(trial.root)) if hasattr(differences, "report") else None
        ),
        "rerun": lambda: (
            rerun._repeats(trial.root, Path("x")),
            list(rerun._warnings(compare.open_run(trial.root), "cpu")),
        ),
        "origin": lambda: facts._origin(run),
        "tested": lambda: facts._tested(run, "s"),
        "intervals": lambda: intervals.panels(run, lacks=lambda *_: None),
        "history": lambda: read_history(run.metrics, "val_loss"),
        "ending": lambda: endings._result("mrr", run),
        "signs": lambda: cost.signs_of_life(run),
        "config": lambda: (
            configuration.load(run.config, environ={}) if run.config.exists() else None
        ),
    }
    for name, look in looks.items():
        try:
            with mock.patch.object(
                provenance, "_folder", return_value=Path("/")
            ):  # git is asked once
                look()
        except (TripletkitError, OSError) as error:
            if "s3cr3t" in str(error):
                raise Surprise(f"{name} tells a secret") from None
            errors.append(error)
    begun = attempts.begin(trial.attempts, {"job": "13"}, from_epoch=1)
    assert begun is None
    attempts.end(trial.attempts, "stopped")
    if errors:
        raise errors[0]


@functools.cache
def _study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=1.0, intermediate_values={1: 0.5}))
    return study


def _compared(folder: Path) -> Any:
    run = compare.open_run(folder)
    return compare.compare(run, run)


def _write(draw: Draw, path: Path, value: Any, hit: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".toml":
        text = "[training]\nmargin = 0.5\n"
    else:
        many = [value, value] if path.suffix == ".jsonl" else [value]
        if hit and draw.below(3):
            many[-1] = draw.changed(draw.changed(value) if draw.flag() else value)
        text = "\n".join(json.dumps(each) for each in many) + "\n"
    content = text.encode(errors="surrogatepass")
    if hit and draw.below(3) == 0:
        kind = draw.below(6)
        content = (
            b"[" * 100_000, b"9" * 5000, b"", b"\xff\xfe", b"null\n",
            mutated(content, random.Random(draw.byte()), [b"\0", b"NaN", b"1e999", b"[", b"\n"]),
        )[kind]  # fmt: skip
    path.write_bytes(content)
    if hit and draw.below(12) == 1:
        path.unlink()
        path.mkdir()


def _draws() -> list[bytes]:
    source = random.Random(6)
    return [bytes([i]) + source.randbytes(n) for i in range(11) for n in range(3, 40, 4)]


RECORDS = Target(_records, _draws)
