"""Several trainings at once on one device, against one that has it for itself."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import synthetic
from tests.benchmarks.training import Job
from tripletkit import boundary, processes
from tripletkit.device import choose_device, choose_precision, make_deterministic
from tripletkit.train import resident
from tripletkit.train.resident import Parcel

ROWS = {"cpu": 20_000, "cuda": 200_000}
DIM, BATCH = 768, 256
ROUNDS = 3
SECONDS = 3.0  # of each measurement
STEPS = {"cpu": 1, "cuda": 32}  # between two looks at the clock
PATIENCE = 300.0  # seconds for the others, who import torch meanwhile


def gain(device: torch.device, slots: int, folder: Path) -> tuple[float, float]:
    """Triplets per second of `slots` trainings at once, and of one alone; medians of turns.

    On a CPU each has its share of the cores, and the one alone has all. On a GPU they share one
    table, as the trials of a worker do.
    """
    boundary.prepare_process()  # for the environment that the processes get
    rows = ROWS[device.type]
    store = synthetic.store(rows, synthetic.mapped(folder / "trials.f16", rows, DIM))
    bands = synthetic.bands(folder / "trials.bands", rows)
    parcel = None
    if device.type == "cuda":
        parcel = Parcel(resident.load(store, bands, device, choose_precision("auto", device)))
    barrier = multiprocessing.get_context("spawn").Barrier(slots)
    works = [
        partial(_train, str(device), folder, parcel, number, slots, barrier)
        for number in range(slots)
    ]
    ended = processes.run(works, [{}] * slots, should_stop=lambda: False, together=True)
    rates: list[list[tuple[float, float]]] = processes.results(ended)
    together = [sum(turn[0] for turn in turns) for turns in zip(*rates, strict=True)]
    return statistics.median(together), statistics.median(turn[1] for turn in rates[0])


def _train(
    wanted: str,
    folder: Path,
    parcel: Parcel | None,
    number: int,
    slots: int,
    barrier: Any,
    _should_stop: Callable[[], bool],
) -> list[tuple[float, float]]:
    """In each turn its rate beside the others, and of number 0 its rate alone; else 0."""
    device = choose_device(wanted)
    make_deterministic(device)
    rows = ROWS[device.type]
    store = synthetic.store(rows, synthetic.mapped(folder / "trials.f16", rows, DIM))
    bands = synthetic.bands(folder / "trials.bands", rows)
    table = parcel.open().table if parcel is not None else None
    run = Job(device, store, bands, BATCH, table=table).trainer()
    threads = torch.get_num_threads()
    _rate(run, device, seconds=0.5)
    turns = []
    for _ in range(ROUNDS):
        torch.set_num_threads(max(1, threads // slots))
        barrier.wait(PATIENCE)
        beside = _rate(run, device)
        barrier.wait(PATIENCE)
        torch.set_num_threads(threads)
        turns.append((beside, _rate(run, device) if number == 0 else 0.0))
    barrier.wait(PATIENCE)  # nobody frees memory while another one measures
    return turns


def _rate(run: Callable[[], None], device: torch.device, seconds: float = SECONDS) -> float:
    """Triplets per second."""
    steps, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        for _ in range(STEPS[device.type]):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps += STEPS[device.type]
    return steps * BATCH / passed
