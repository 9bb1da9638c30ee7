"""Interrupted equals uninterrupted: processes killed at random moments, resumed, compared."""

import multiprocessing
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.exactness import Moments, flat
from tests.worlds import clustered, near_and_far
from tripletkit import config as configuration
from tripletkit.paths import RunPaths, run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.assembly import Data
from tripletkit.train.loop import train

# A server that has torch loaded and forks: a process starts in milliseconds.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.test_group", "tests.test_resume"])


def make_config(paths: RunPaths, **training) -> configuration.Config:
    return configuration.with_values(
        configuration.Config(),
        global_={"scratch_dir": paths.root.parent},
        training_model={"hidden_dim": 32, "output_dim": 8},
        training={
            "num_epochs": 5, "batch_size": 16, "learning_rate": 1e-3, "monitor": "map@r",
            "retrieval_metric_top_k": [1], "device": "cpu", "save_every_n_epochs": 2,
            "ucb_warmup_samples": 50, "early_stopping_patience": 4,
            "checkpoint_every_minutes": 1e-9,  # after every step, so that kills hit writes
            **training,
        },
    )  # fmt: skip


def run(folder: Path, training: dict, die_at: int | None, stop_after: int | None) -> None:
    """One process's attempt at the run; leaves the number of its moments in a file."""
    torch.set_num_threads(1)
    store, val = clustered(seed=0), clustered(seed=1, name="val")
    data = Data(store, near_and_far(store), val, near_and_far(val))
    paths = run_paths(folder)
    steps = 0

    def should_stop() -> bool:
        nonlocal steps
        steps += 1
        return stop_after is not None and steps > stop_after

    moments = Moments(die_at)
    sys.setprofile(moments)
    train(make_config(paths, **training), data, paths, should_stop=should_stop)
    sys.setprofile(None)
    folder.with_suffix(".moments").write_text(str(moments.count))


def attempt(
    folder: Path, training: dict, *, die_at: int | None = None, stop_after: int | None = None
) -> bool:
    """Start a process on the run; returns whether it ended by itself."""
    process = fork.Process(target=run, args=(folder, training, die_at, stop_after))
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL)
    return code == 0


def assert_same(ours: RunPaths, theirs: RunPaths) -> None:
    """Weights, optimiser, bandit and progress bit for bit; the metric log byte for byte."""
    assert ours.metrics.read_bytes() == theirs.metrics.read_bytes()
    assert [p.name for p in ours.saved()] == [p.name for p in theirs.saved()]
    for mine, other in zip(ours.saved(), theirs.saved(), strict=True):
        assert flat(checkpoints.load(mine)) == flat(checkpoints.load(other))
    assert not list(ours.root.rglob("*.tmp"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("placement", ["device", "host"])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path, placement, seed):
    training = {"placement": placement}
    whole, torn = run_paths(tmp_path / "whole"), run_paths(tmp_path / "torn")
    counted = whole.root.with_suffix(".moments")
    assert attempt(whole.root, training)
    moments = int(counted.read_text())
    assert attempt(whole.root, training)
    start = int(counted.read_text())  # of a finished run: nothing but the start
    randoms = random.Random(seed)
    kills = 0
    while not attempt(torn.root, training, die_at=randoms.randint(1, start + moments // 5)):
        kills += 1
    assert kills >= 3  # a fifth at the most is done between two kills
    assert_same(torn, whole)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("stop_after", [1, 7])
def test_asked_to_stop_every_few_steps_equals_uninterrupted(tmp_path, placement, stop_after):
    training = {"placement": placement, "checkpoint_every_minutes": 1e6, "num_epochs": 2}
    whole, stopped = run_paths(tmp_path / "whole"), run_paths(tmp_path / "stopped")
    assert attempt(whole.root, training)
    while not stopped.final.exists():
        assert attempt(stopped.root, training, stop_after=stop_after)
    assert_same(stopped, whole)
