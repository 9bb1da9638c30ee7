"""A real tuning job for the tests: small data, the command as a user types it, and its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests import toy
from tests.cluster import ACCOUNT, Cluster
from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.config import Config
from tripletkit.paths import StudyPaths, TrialPaths

COMMAND = Path(sys.executable).with_name("tripletkit")


def write_config(folder: Path, **changes) -> Path:
    """Small data and a configuration for it, in `folder`; returns the file."""
    toy.write_parquet(folder / "train.parquet", buildings=100, images=8, dim=32, noise=1.0)
    toy.write_parquet(folder / "val.parquet", buildings=40, first=1000, dim=32, noise=1.0)
    values: dict[str, dict] = {
        "global_": {"scratch_dir": folder, "log_dir": folder / "logs"},
        "paths": {
            "train_parquet_path": folder / "train.parquet",
            "val_parquet_path": folder / "val.parquet",
        },
        "training": {"batch_size": 16, "retrieval_metric_top_k": [1, 10], "device": "cpu"},
        "training_model": {"hidden_dim": 16, "output_dim": 8},
        "tuning": {
            "output_dir": folder / "trials", "storage_path": folder / "study.db",
            "study_name": "small", "max_epochs": 3, "objective": "map@r", "pruner": "none",
            "space": {
                "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
                "margin": {"type": "float", "low": 0.1, "high": 1.0},
            },
        },
        "slurm": {
            "account": ACCOUNT, "time": "00:30:00", "mem": "2000M", "cpus_per_task": 1, "gpus": 0,
            "setup": ["export OMP_NUM_THREADS=1"],
        },
    }  # fmt: skip
    for section, more in changes.items():
        values[section] |= more
    path = folder / "config.toml"
    fsio.write_text(path, configuration.dump(configuration.with_values(Config(), **values)))
    return path


def tripletkit(*arguments: str | Path, environment: dict | None = None) -> str:
    """Run a command; returns what it printed. Fails with its errors if it fails."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def study_paths(config: Path) -> StudyPaths:
    section = configuration.load(config, environ={}).tuning
    return StudyPaths(section.output_dir / section.study_name)


def until(what: Callable[[], object], describe: Callable[[], str], *, deadline: float) -> None:
    """Wait for a condition; fail with a description of how things are."""
    end = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < end, describe()
        time.sleep(0.2)


def wait_for_empty_queue(cluster: Cluster, logs: Path, *, deadline: float) -> None:
    """Until no job is left; fails with the queue and the ends of the logs."""

    def queue() -> str:
        return cluster.run("squeue", "--noheader", "--array")

    def describe() -> str:
        ends = [f"{p.name}: {p.read_text()[-1500:]}" for p in sorted(logs.glob("*.err"))]
        return "\n".join([queue(), *ends])

    until(lambda: not queue().strip(), describe, deadline=deadline)


def attempts(paths: TrialPaths) -> list[dict]:
    return [json.loads(line) for line in paths.attempts.read_text().splitlines()]


def epochs(paths: TrialPaths) -> list[int]:
    """The epochs in a trial's metrics file, in its order."""
    return [json.loads(line)["epoch"] for line in paths.metrics.read_text().splitlines()]
