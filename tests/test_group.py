"""Several processes that train one head together, against one that does it alone."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests import fleet
from tests.cluster import Cluster
from tests.test_loop import make_config
from tests.toy import write_parquet
from tests.worlds import clustered, near_and_far
from tripletkit import config as configuration
from tripletkit import processes
from tripletkit.errors import DataError, RunError
from tripletkit.paths import run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train import group
from tripletkit.train.assembly import Data
from tripletkit.train.group import ALONE, Group
from tripletkit.train.loop import train

# A server that has torch loaded and forks: a process starts in milliseconds.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.test_group", "tests.test_resume"])


def environment(rank: int, size: int) -> dict[str, str]:
    """What a launcher tells each process of a group."""
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    return {**{name: str(n) for name, n in numbers.items()}, "GLOO_SOCKET_IFNAME": "lo"}


def rendezvous(folder: Path) -> str:
    """Where the processes of a new group meet."""
    return f"file://{folder}/rendezvous-{time.time_ns()}"


def together(folder: Path, size: int, work, *arguments) -> list:
    """What `work(group, *arguments)` returns in each of `size` processes that form a group."""
    results, call = fork.SimpleQueue(), (rendezvous(folder), work, arguments)
    members = [
        fork.Process(target=member, args=(rank, size, results, *call)) for rank in range(size)
    ]
    for each in members:
        each.start()
    for each in members:
        each.join()
    assert [each.exitcode for each in members] == [0] * size
    returned = dict(results.get() for _ in members)
    return [returned[rank] for rank in range(size)]


def member(rank: int, size: int, results, *call) -> None:
    os.environ |= environment(rank, size)
    results.put((rank, in_group(*call)))


def in_group(where, work, arguments, _should_stop=None):
    torch.set_num_threads(1)
    with group.member(rendezvous=where) as us:
        return work(us, *arguments)


# What they do together


def exchange(us: Group) -> dict:
    a, b = torch.tensor([1.0, 2.0]) * (us.rank + 1), torch.full((2, 1), float(us.rank))
    us.add(a, b)
    rows = torch.arange(10).reshape(5, 2)
    return {
        "sums": (a.tolist(), b.tolist()),
        "whole": [us.whole(torch.arange(n)[us.share(n)], n).tolist() for n in (0, 1, 2, 3, 7)],
        "rows": us.whole(rows[us.share(5)], 5).tolist(),
        "any": [us.any(us.rank == 2), us.any(False), us.any(True)],
        "first": us.first({"from": us.rank}),
        "all": list(us.all(us.rank)),
        "leads": us.leads,
    }


def test_what_a_group_does_together(tmp_path):
    results = together(tmp_path, 3, exchange)
    for rank, result in enumerate(results):
        assert result["sums"] == ([6.0, 12.0], [[3.0], [3.0]])
        assert result["whole"] == [list(range(n)) for n in (0, 1, 2, 3, 7)]
        assert result["rows"] == torch.arange(10).reshape(5, 2).tolist()
        assert result["any"] == [True, False, True]
        assert result["first"] == {"from": 0}
        assert result["all"] == [0, 1, 2]
        assert result["leads"] == (rank == 0)


def test_shares_cover_everything_once_and_differ_by_one_at_most():
    for size in range(1, 6):
        for count in range(12):
            shares = [range(count)[Group(rank, size).share(count)] for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged():
    result = exchange(ALONE)
    assert result["sums"] == ([1.0, 2.0], [[0.0], [0.0]])
    assert result["any"] == [False, False, True]
    assert (result["first"], result["all"]) == ({"from": 0}, [0])


# Training


def world() -> Data:
    store, val = clustered(buildings=30, seed=0), clustered(buildings=20, seed=1, name="val")
    return Data(store, near_and_far(store), val, near_and_far(val))


def train_all(us: Group, folder: Path, cases: list[dict]) -> list:
    results = []
    for number, case in enumerate(cases):
        paths = run_paths(folder / str(number))
        config = configuration.with_values(
            make_config(paths, **case), training_model={"dropout": 0.0}
        )
        results.append(train(config, world(), paths, group=us))
    return results


CASES = [
    {"placement": "device"},
    {"placement": "host"},
    # 120 anchors: the last batch has one row, so that some processes have none at all.
    {"batch_size": 7, "num_epochs": 2, "negative_sampler": "uniform"},
    {"batch_size": 17, "num_epochs": 2, "loss_distance": "cosine", "retrieval_metric_max_queries": 33},
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = train_all(ALONE, folder, CASES)
    torch.set_num_threads(threads)
    return folder, results


def numbers(path: Path) -> np.ndarray:
    """Every number in metrics.jsonl, in order."""

    def flat(value):
        if isinstance(value, dict):
            return [x for item in value.values() for x in flat(item)]
        if isinstance(value, list):
            return [x for item in value for x in flat(item)]
        return [np.nan if value is None else float(value)]

    return np.array(flat([json.loads(line) for line in path.read_text().splitlines()]))


@pytest.mark.parametrize("size", [2, 4])
def test_a_group_gets_the_result_of_one_process(tmp_path, alone, size):
    folder, expected = alone
    every = together(tmp_path, size, train_all, tmp_path, CASES)
    for number, result in enumerate(expected):
        for results in every:  # all ranks know, and agree to the last bit
            assert results[number].metrics == every[0][number].metrics
            assert results[number].metrics == pytest.approx(dict(result.metrics), abs=2e-4)
        ours, theirs = (run_paths(f / str(number)) for f in (tmp_path, folder))
        np.testing.assert_allclose(numbers(ours.metrics), numbers(theirs.metrics), atol=2e-3)
        a, b = (checkpoints.load(paths.final) for paths in (ours, theirs))
        for key, weight in b["model_state_dict"].items():
            torch.testing.assert_close(a["model_state_dict"][key], weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a["bandit"], b["bandit"], rtol=1e-3, atol=1e-3)
        assert sorted(p.name for p in ours.root.iterdir()) == sorted(
            p.name for p in theirs.root.iterdir()
        )


def stop_on_one(us: Group, folder: Path, after: int) -> tuple[str, int]:
    """Only the last rank is asked to stop, after so many steps."""
    paths, asked = run_paths(folder / "run"), iter(range(10**9))

    def stop() -> bool:
        return us.rank == us.size - 1 and next(asked) >= after

    result = train(make_config(paths), world(), paths, should_stop=stop, group=us)
    return result.status, result.steps


def test_all_stop_when_one_is_asked_to_and_another_number_of_them_goes_on(tmp_path):
    assert together(tmp_path, 3, stop_on_one, tmp_path, 0) == 3 * [("stopped", 0)]
    first = together(tmp_path, 2, stop_on_one, tmp_path, 1)
    assert first[0] == first[1]
    (last,) = [stop_on_one(ALONE, tmp_path, 10**9)]
    assert last[0] == "finished"
    whole = run_paths(tmp_path / "whole")
    train(make_config(whole), world(), whole)
    stopped = checkpoints.load(run_paths(tmp_path / "run").final)
    assert stopped["global_step"] == checkpoints.load(whole.final)["global_step"]


# When something goes wrong


def run_two(folder: Path, work) -> None:
    """Have a job run `work(group)` in two processes."""
    call = functools.partial(in_group, rendezvous(folder), work, ())
    environments = [environment(rank, 2) for rank in range(2)]
    ended = processes.run([call] * 2, environments, should_stop=lambda: False, together=True)
    processes.results(ended)


def fail_on_one(us: Group) -> None:
    if us.rank == 1:
        raise DataError("row 7 is bad", hint="mend it")
    us.any(False)  # waits for the other for ever


def die_on_one(us: Group) -> None:
    if us.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    us.any(False)


def test_one_that_fails_ends_all_with_its_error(tmp_path):
    with pytest.raises(DataError, match="row 7 is bad") as error:
        run_two(tmp_path, fail_on_one)
    assert error.value.hint == "mend it"


def test_one_that_is_killed_ends_all_and_is_named(tmp_path):
    with pytest.raises(RunError, match=r"process 1 of this job died \(SIGKILL\)") as error:
        run_two(tmp_path, die_on_one)
    assert "slurm.mem" in (error.value.hint or "")


# As users start it


@pytest.fixture
def project(tmp_path) -> Path:
    write_parquet(tmp_path / "train.parquet", buildings=40)
    write_parquet(tmp_path / "val.parquet", buildings=20, first=40)
    (tmp_path / "config.toml").write_text(
        '[global]\nscratch_dir = "scratch"\n'
        '[paths]\ntrain_parquet_path = "train.parquet"\nval_parquet_path = "val.parquet"\n'
        "[training_model]\nhidden_dim = 16\noutput_dim = 4\ndropout = 0.0\n"
        '[training]\nnum_epochs = 3\nbatch_size = 16\ndevice = "cpu"\n'
    )
    return tmp_path


def start(project: Path, *command: str, name: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, "--config", "config.toml", "--set", f"paths.checkpoint_dir={name}"],
        cwd=project, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


def test_gpus_and_torchrun_start_groups_that_agree_with_one_process(project):
    python = sys.executable
    tripletkit = [python, "-m", "tripletkit", "train"]
    torchrun = [
        python,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "tripletkit.train",
    ]
    outputs = {
        "one": start(project, *tripletkit, name="one"),
        "gpus": start(project, *tripletkit, "--gpus=2", name="gpus"),
        "torchrun": start(project, *torchrun, name="torchrun"),
    }
    for name, done in outputs.items():
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("checkpoints, metrics and log") == 1  # one of them talks
        assert done.stderr.count("best val_loss") == 1
        np.testing.assert_allclose(
            numbers(project / "scratch" / name / "metrics.jsonl"),
            numbers(project / "scratch" / "one" / "metrics.jsonl"),
            atol=1e-3,
        )
    assert "[rank 0]" in outputs["torchrun"].stderr


def test_on_slurm_a_job_uses_all_its_gpus_and_goes_on_after_a_requeue(slurm, tmp_path):
    config = fleet.write_config(
        tmp_path, training={"num_epochs": 20, "checkpoint_every_minutes": 0.01},
        training_model={"dropout": 0.0},
    )  # fmt: skip
    output = fleet.tripletkit("train", "-c", config, "--cluster", "slurm", "--gpus", "2")
    job = output.split("slurm job ")[1].split()[0]
    paths = run_paths(tmp_path / "checkpoints")
    fleet.until(paths.best.exists, lambda: slurm.run("squeue"), deadline=120)
    assert ranks_of(job, slurm) == 2
    slurm.run("scancel", "--signal=USR2", f"{job}.0")
    fleet.until(paths.final.exists, lambda: slurm.run("squeue"), deadline=180)
    fleet.wait_for_empty_queue(slurm, tmp_path / "logs", deadline=60)
    assert "resuming from" in paths.log.read_text()
    assert ranks_of(job, slurm) == 0
    whole = run_paths(tmp_path / "whole")
    fleet.tripletkit(
        "train", "-c", config, "--set", f"paths.checkpoint_dir={whole.root}", "--gpus", "0",
        environment={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    a, b = (checkpoints.load(each.final) for each in (paths, whole))
    assert a["global_step"] == b["global_step"]
    np.testing.assert_allclose(numbers(paths.metrics), numbers(whole.metrics), atol=0.02)


def ranks_of(job: str, slurm: Cluster) -> int:
    """Processes that train for this job, beside the one that waits for them.

    Another cluster on this machine may have a job of the same number.
    """
    count = 0
    for number in slurm.processes():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(number)
            ours = process.environ().get("SLURM_JOB_ID") == job
            count += ours and any("spawn_main" in word for word in process.cmdline())
    return count
