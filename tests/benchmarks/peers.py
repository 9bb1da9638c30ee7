"""Other trainers on the same head and data: a per-item loader, and pytorch-metric-learning's own."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tests.benchmarks import measure, naive_trainer, synthetic
from tests.benchmarks.measure import Bench, Row, UnavailableError
from tests.benchmarks.training import Job, small_job

ROWS, DIM, BATCH = 20_000, 768, 256
WORKERS = 2
SLICES = 3  # each starts the peer's workers anew, which takes longer than the slice
PER_BUILDING = 4  # images of a building in one of its batches; divides 3 * BATCH
WARM_UP = 5  # steps before the clock starts: workers begin, their queues fill


def peers(bench: Bench) -> Iterator[Row]:
    """Ours against each peer, a run of ours beside each run of theirs."""
    job = small_job(bench, ROWS, DIM)
    ours = job.trainer()
    yield from _against(
        bench,
        ours,
        _per_item(job),
        f"training, {DIM}-d, batch {BATCH}",
        BATCH,
        unit="triplets/s",
        beside="per-item Dataset and DataLoader",
        target=10.0,
    )
    for every, words in ((False, "a random triplet per image"), (True, "all violating triplets")):
        yield from _against(
            bench,
            ours,
            _metric_learning(job, every=every),
            f"training, {DIM}-d, {3 * BATCH} images a step",
            3 * BATCH,
            unit="images/s",
            beside=f"pytorch-metric-learning, {words}",
            target=None,
        )


def _against(
    bench: Bench,
    ours: Callable[[], None],
    peer: Callable[[int], float],
    name: str,
    units: int,
    *,
    unit: str,
    beside: str,
    target: float | None,
) -> Iterator[Row]:
    """Slices in turn; the peer starts its workers anew in each, off the clock."""
    part = bench.seconds / SLICES
    with nondeterministic():
        steps = max(2, round(part * peer(4)))
    found: list[float] = []
    theirs: list[float] = []
    for _ in range(SLICES):
        with nondeterministic():
            theirs.append(units * peer(steps))
        found += measure.rates([(ours, units)], 2 * part, bench.device, slices=1)[0]
    yield measure.ratio(name, found, theirs, unit=unit, beside=beside, target=target)


class nondeterministic:  # noqa: N801 - reads as a statement
    """Peers run as they come; our steps stay deterministic."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(False)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(True)


# --- a loader with one Python call per triplet -------------------------------------------------


def _per_item(job: Job) -> Callable[[int], float]:
    """Steps per second of `naive_trainer`."""
    cells = np.split(job.bands.neighbors, job.bands.offsets[1:-1])
    lists = [cell.tolist() for cell in cells]
    by_row = [lists[i : i + synthetic.BANDS] for i in range(0, len(lists), synthetic.BANDS)]

    def run(steps: int) -> float:
        rate = naive_trainer.run(
            job.head(),
            job.store.embeddings,
            job.store.building,
            by_row,
            batch_size=BATCH,
            steps=steps,
            workers=WORKERS,
        )
        return rate / BATCH

    return run


# --- pytorch-metric-learning -------------------------------------------------------------------


class Images(Dataset[tuple[Tensor, int]]):
    """One image's embedding and its building."""

    def __init__(self, embeddings: NDArray[np.float16], building: NDArray[np.int32]) -> None:
        self.embeddings = embeddings
        self.building = building

    def __len__(self) -> int:
        return len(self.building)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.embeddings[row].astype(np.float32)), int(self.building[row])


def _metric_learning(job: Job, *, every: bool) -> Callable[[int], float]:
    """Steps per second of its `MetricLossOnly` with `MPerClassSampler`, three batches of images.

    With `every` triplet that its miner finds in a batch to violate the margin, as its examples
    do, or with one random triplet per image, the least that it can be asked for.
    """
    try:
        from pytorch_metric_learning import losses, miners, samplers, trainers
    except ModuleNotFoundError as error:
        raise UnavailableError(f"pytorch-metric-learning is not installed ({error})") from None
    logging.getLogger("PML").setLevel(logging.ERROR)
    data = Images(job.store.embeddings, job.store.building)
    labels = job.store.building.tolist()

    def run(steps: int) -> float:
        head = job.head()
        at: list[float] = []

        def clock(_: object) -> None:
            if job.device.type == "cuda":
                torch.cuda.synchronize(job.device)
            at.append(time.perf_counter())

        trainer = trainers.MetricLossOnly(
            models={"trunk": head},
            optimizers={"trunk_optimizer": torch.optim.AdamW(head.parameters(), lr=1e-4)},
            batch_size=3 * BATCH,
            loss_funcs={
                "metric_loss": losses.TripletMarginLoss(
                    margin=0.5, triplets_per_anchor="all" if every else 1
                )
            },
            mining_funcs={"tuple_miner": miners.TripletMarginMiner(margin=0.5)} if every else {},
            dataset=data,
            sampler=samplers.MPerClassSampler(labels, m=PER_BUILDING, batch_size=3 * BATCH),
            iterations_per_epoch=WARM_UP + steps,
            dataloader_num_workers=WORKERS,
            data_device=job.device,
            end_of_iteration_hook=clock,
        )
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():  # its progress
            warnings.simplefilter("ignore")
            trainer.train(num_epochs=1)
        first, last = at[WARM_UP - 1], at[-1]
        return steps / (last - first)

    return run
