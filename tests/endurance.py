"""Does a worker keep what it took? One worker, many small trials, and what it holds at each of them.

    .venv/bin/python -m tests.endurance --trials 1000 [--storage postgresql]

The worker is the real one. At the same place of every trial, its start, it notes its open files, its
threads and its memory; afterwards the folders of the trials are measured. Prints a table, and exits
with 1 if something is not flat.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests import toy
from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.config import Config
from tripletkit.paths import study_paths

C = ctypes.CDLL(None)
WARM_UP = 5  # trials; libraries are loaded and caches filled in them
MEMORY_PER_TRIAL = 20.0  # kB; Optuna keeps finished trials in memory, and TPE reads them
FEW = 200  # trials, in which the memory says more about caches that fill than about trials
BYTES = 1.05  # a trial's parameters and times have more digits or fewer


class Sample(NamedTuple):
    """What the worker held at the start of a trial."""

    files: int
    threads: int
    memory: int  # kB, resident


class Result(NamedTuple):
    """All samples, and of each trial's folder the files and bytes."""

    samples: list[Sample]
    inodes: list[int]
    sizes: list[int]
    others: int  # files elsewhere: caches, logs, the study


def write_config(folder: Path, trials: int, storage_url: str | None = None) -> Path:
    """Data that trains in no time, and a study of it."""
    toy.write_parquet(folder / "train.parquet", buildings=8)
    toy.write_parquet(folder / "val.parquet", buildings=4, first=100)
    config = configuration.with_values(
        Config(),
        global_={"scratch_dir": folder, "log_dir": folder / "logs"},
        paths={
            "train_parquet_path": folder / "train.parquet",
            "val_parquet_path": folder / "val.parquet",
        },
        training={"batch_size": 16, "retrieval_metric_top_k": [1], "device": "cpu"},
        training_model={"hidden_dim": 4, "output_dim": 4},
        tuning={
            "storage_path": folder / "study.db",
            "storage_url": storage_url,
            "n_trials": trials,
            "max_epochs": 2,
            "objective": "map@r",
            "space": {
                "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
                "margin": {"type": "float", "low": 0.1, "high": 1.0},
            },
        },
    )
    path = folder / "config.toml"
    fsio.write_text(path, configuration.dump(config))
    return path


def run(folder: Path, trials: int, storage_url: str | None = None) -> Result:
    """Run a study of so many trials in `folder`, with one worker in a process of its own."""
    config, notes = write_config(folder, trials, storage_url), folder / "samples.jsonl"
    with (folder / "worker.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", "from tests.endurance import work; work()", config, notes],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, (folder / "worker.log").read_text()[-3000:]
    samples = [Sample(*json.loads(line)) for line in notes.read_text().splitlines()]
    paths = study_paths(configuration.load(config, environ={}))
    folders = [paths.trial(number).root for number in range(trials)]
    found = [[each.stat().st_size for each in one.rglob("*")] for one in folders]
    here = sum(1 for _ in folder.rglob("*"))
    return Result(
        samples,
        inodes=[1 + len(sizes) for sizes in found],
        sizes=[sum(sizes) for sizes in found],
        others=here - sum(1 + len(sizes) for sizes in found),
    )


def work() -> None:
    """Be the worker, and note what it holds whenever it opens the data of a trial."""
    from tripletkit import boundary, inputs, slots, submission

    config, notes = map(Path, sys.argv[1:])
    boundary.prepare_process(plain=True)
    opened = inputs.remembering(inputs.training_data)

    def noting(section: Config) -> object:
        data = opened(section)
        with notes.open("a") as file:
            file.write(json.dumps(sample()) + "\n")
        return data

    slots._loader = lambda _place: noting  # type: ignore[assignment]
    ended = boundary.run(
        lambda: submission.tune(
            configuration.load(config, environ={}), "here", prepare=False, dry_run=False
        )
    )
    sys.exit(ended.exit_code)


def sample() -> Sample:
    """What this process holds; what it has freed goes back to the system first."""
    gc.collect()
    if hasattr(C, "malloc_trim"):  # glibc
        C.malloc_trim(0)
    status = Path("/proc/self/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in status if ":" in line)
    # One of the files is that of the listing, every time.
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as plain as can be
    return Sample(files, int(facts["Threads"]), int(facts["VmRSS"].split()[0]))


def growth(values: Sequence[float]) -> float:
    """Per trial: the median of the last half minus that of the first, over the trials between them."""
    values = values[min(WARM_UP, len(values) // 10) :]
    half = len(values) // 2
    risen = statistics.median(values[-half:]) - statistics.median(values[:half])
    return risen / (len(values) - half)


def problems(found: Result, trials: int) -> list[str]:
    """What is not flat."""
    told = []
    after = found.samples[WARM_UP:]
    if len(found.samples) != trials:
        told.append(f"{len(found.samples)} trials instead of {trials}")
    for name in ("files", "threads"):
        seen = {getattr(each, name) for each in after}
        if len(seen) > 1:
            told.append(f"{name} vary: {sorted(seen)}")
    per_trial = growth([each.memory for each in found.samples])
    if trials >= FEW and per_trial > MEMORY_PER_TRIAL:
        told.append(f"memory grows by {per_trial:.1f} kB per trial")
    if len(set(found.inodes)) > 1:
        told.append(f"inodes per trial vary: {sorted(set(found.inodes))}")
    if max(found.sizes) > BYTES * min(found.sizes):
        told.append(f"bytes per trial vary: {min(found.sizes)} to {max(found.sizes)}")
    return told


def table(found: Result, every: int) -> str:
    """The samples, some of them, and what grew."""
    lines = [
        f"{'trial':>6} {'open files':>10} {'threads':>8} {'memory MB':>10} {'inodes':>7} bytes"
    ]
    last = len(found.samples) - 1
    for number in sorted({*range(0, last + 1, every), last}):
        files, threads, memory = found.samples[number]
        lines.append(
            f"{number:>6} {files:>10} {threads:>8} {memory / 1024:>10.1f} "
            f"{found.inodes[number]:>7} {found.sizes[number]:,}"
        )
    kinds: dict[str, Callable[[Sample], float]] = {
        "open files": lambda each: each.files,
        "threads": lambda each: each.threads,
        "kB of memory": lambda each: each.memory,
    }
    grown = ", ".join(
        f"{growth([pick(each) for each in found.samples]):.2f} {name}"
        for name, pick in kinds.items()
    )
    lines.append(f"growth per trial, last half against first: {grown}")
    lines.append(
        f"files beside the trials' (caches, logs, the study): {found.others}; "
        f"folders of trials: {sum(found.sizes):,} bytes"
    )
    return "\n".join(lines)


def main() -> int:
    """Run it, print the table, say what is not flat."""
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--storage", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--every", type=int, default=100, help="trials between rows of the table")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="endurance-"))
    try:
        with ExitStack() as stack:
            url = None
            if given.storage == "postgresql":
                from tests import postgres

                url = stack.enter_context(postgres.Server()).database()
            found = run(folder, given.trials, url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(found, given.every))
    told = problems(found, given.trials)
    print("\n".join(told) or "flat")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
