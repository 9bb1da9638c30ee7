"""Whole processes: the memory of commands, and a study shared by 16 workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks import measure, synthetic
from tests.benchmarks.measure import Bench, Row, UnavailableError

SMALL, LARGE, DIM = 100_000, 200_000, 768  # below, buffers are not full yet


class Peak(NamedTuple):
    """The most memory that a process had, in GB, and its seconds."""

    resident: float  # with the pages of mapped files
    private: float  # without
    seconds: float


def memory(bench: Bench) -> Iterator[Row]:
    """Train and evaluate through the command line, the table on the host."""
    train = {
        rows: synthetic.write_parquet(bench.folder / f"memory-{rows}.parquet", rows, DIM)
        for rows in (SMALL, LARGE)
    }
    val = synthetic.write_parquet(
        bench.folder / "memory-val.parquet", 5_000, DIM, prefix="v", seed=1
    )
    small, large = (_train(bench, train[rows], val) for rows in (SMALL, LARGE))
    growth = (LARGE - SMALL) * DIM * 2 / 1e9
    yield measure.ratio(
        f"private memory of `train`, growth from {SMALL // 1000} k to {LARGE // 1000} k x {DIM}",
        [max(0.0, large.private - small.private)],
        [growth],
        unit="GB",
        beside="growth of the table",
        target=0.5,
        at_most=True,
    )
    evaluate = _run(
        bench,
        ["evaluate", "--split=train", "--set=training.retrieval_metric_max_queries=5000"],
        train[LARGE],
        val,
    )
    for command, peak in (("train", large), ("evaluate", evaluate)):
        yield measure.absolute(
            f"peak RSS of `{command}`, {LARGE // 1000} k x {DIM} ({peak.seconds:.0f} s)",
            [peak.resident],
            unit="GB",
            target=None if bench.on_gpu else 1.5,  # CUDA's libraries alone are more
        )


def _train(bench: Bench, train: Path, val: Path) -> Peak:
    return _run(bench, ["train"], train, val)


def _run(bench: Bench, command: Sequence[str], train: Path, val: Path) -> Peak:
    """Run a command of tripletkit in a folder of its own per training file."""
    home = bench.folder / train.stem
    home.mkdir(exist_ok=True)
    arguments = [
        *command,
        f"--set=global.scratch_dir={home}",
        f"--set=paths.train_parquet_path={train}",
        f"--set=paths.val_parquet_path={val}",
        "--set=training.num_epochs=1",
        "--set=training.batch_size=1024",
        "--set=training.placement=host",
    ]
    return run(home, arguments)


def run(home: Path, command: Sequence[str]) -> Peak:
    """Run a command of tripletkit in a folder, which gets its log."""
    log = home / f"{command[0]}.log"
    began, resident, private = time.perf_counter(), 0.0, 0.0
    with log.open("wb") as output, subprocess.Popen(
        [sys.executable, "-m", "tripletkit", *command],
        stdout=output, stderr=output, cwd=home,
    ) as process:  # fmt: skip
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                now = _memory(process.pid)
                # Not what wait4 says: that begins with the memory of who started the process.
                resident = max(resident, now.get("VmHWM", 0.0))
                private = max(private, now.get("RssAnon", 0.0))
                time.sleep(0.02)
        except BaseException:
            process.kill()
            raise
        _, status, _ = ended
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"tripletkit {command[0]} failed:\n{log.read_text()[-2000:]}")
    return Peak(resident, private, time.perf_counter() - began)


def _memory(pid: int) -> dict[str, float]:
    """What a process has now, in GB; `VmHWM` the most that it had, `RssAnon` without mapped files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in status.splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 / 1e9 for name, value in fields.items()}


def trials(bench: Bench) -> Iterator[Row]:
    """Two trainings at once on the device."""
    from tests.benchmarks import trials_per_gpu

    together, alone = trials_per_gpu.gain(bench.device, 2, bench.folder)
    yield measure.ratio(
        f"two trainings at once, {trials_per_gpu.DIM}-d, batch {trials_per_gpu.BATCH}",
        [together],
        [alone],
        unit="triplets/s",
        beside="one alone",
    )


def study(bench: Bench) -> Iterator[Row]:
    """Seconds per trial in a shared study that trains nothing."""
    study_storage = storage_module()
    seconds = study_storage.measure()
    yield measure.ratio(
        f"overhead of a trial, {study_storage.PROCESSES} workers on PostgreSQL, "
        f"{study_storage.FINISHED:,} finished trials",
        seconds["ours"],
        seconds["plain"],
        unit="s",
        beside="plain `study.optimize`",
        target=0.6,
        at_most=True,
    )


def storage_module():
    """`study_storage`, if this machine can run it."""
    try:
        from tests import postgres
        from tests.benchmarks import study_storage
    except ModuleNotFoundError as error:
        raise UnavailableError(f"needs {error.name}") from None
    try:
        postgres.binary("postgres")
        postgres.binary("initdb")
    except AssertionError:
        raise UnavailableError("needs PostgreSQL") from None
    return study_storage
