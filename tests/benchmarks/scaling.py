"""`--scaling`: how training and the shared study scale, each curve beside its reference."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.benchmarks import measure, synthetic
from tests.benchmarks.measure import Bench, UnavailableError
from tests.benchmarks.processes import storage_module
from tests.benchmarks.training import IN_HAND, Job

SLICES = 3
ROWS = (10_000, 50_000, 200_000, 1_000_000, 5_000_000)
ROWS_DIM = 384  # 5 M rows are 3.8 GB, and 2.9 GB of neighbours
BATCHES = (64, 256, 1024, 4096, 16_384)
DIMS = (384, 768, 1024, 1536, 2048, 3072, 4096)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
TRIALS = 128  # of all workers together, but one each at least and eight at most
FINISHED = 1_000
SLOW = 20.0  # seconds per trial after which a curve ends: twice the workers take four times that

DEVICE = "table on the device"
HOST = "table on the host"


@dataclass
class Curve:
    """Points of one figure: series by name, each a list of (x, lowest, median, highest)."""

    name: str
    x: str
    y: str
    title: str
    series: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, series: str, x: float, values: Sequence[float]) -> None:
        point = [x, min(values), statistics.median(values), max(values)]
        self.series.setdefault(series, []).append(point)
        print(f"{self.name} {x:,.0f}, {series}: {measure.number(point[2])} {self.y}", flush=True)


def _train(bench: Bench, curve: Curve, x: float, job: Job, *placements: str) -> None:
    """One point of a training curve, and its reference, slices in turn."""
    batch = job.section.batch_size
    runs = {IN_HAND: job.in_hand()}
    runs |= {name: job.trainer(resident=name == DEVICE) for name in placements}
    pairs = [(run, float(batch)) for run in runs.values()]
    found = measure.rates(pairs, bench.seconds, bench.device, SLICES)
    for name, values in zip(runs, found, strict=True):
        curve.add(name, x, values)


def _job(bench: Bench, rows: int, dim: int, batch: int) -> Job:
    """A table in a file, as a store maps it; on a GPU a second one is made there."""
    path = bench.folder / f"{rows}x{dim}.f16"
    bands = bench.folder / f"{rows}.bands"
    needed = rows * (2 * dim + 4 * synthetic.BANDS * synthetic.NEIGHBORS)
    free = shutil.disk_usage(bench.folder).free
    if needed > free / 2:
        raise UnavailableError(f"{needed / 1e9:.1f} GB for files, of {free / 1e9:.1f} GB free")
    store = synthetic.store(rows, synthetic.mapped(path, rows, dim))
    table = synthetic.resident(rows, dim, bench.device) if bench.on_gpu else None
    return Job(bench.device, store, synthetic.bands(bands, rows), batch, table=table)


def rows(bench: Bench) -> Curve:
    """From a table in the processor's cache to one that is not."""
    curve = Curve(
        "rows", "rows of the table", "triplets/s", f"Training, {ROWS_DIM}-d float16, batch 256"
    )
    for count in ROWS:
        try:
            _train(bench, curve, count, _job(bench, count, ROWS_DIM, 256), DEVICE, HOST)
        except UnavailableError as error:
            print(f"rows {count:,}: left out: {error}", flush=True)
        for path in bench.folder.glob(f"{count}*"):
            path.unlink()  # what is mapped still stays until the job is gone
    return curve


def batch(bench: Bench) -> Curve:
    """From small batches to large ones."""
    curve = Curve("batch", "triplets in a batch", "triplets/s", "Training, 768-d, 100 k rows")
    for size in BATCHES:
        _train(bench, curve, size, _job(bench, 100_000, 768, size), DEVICE, HOST)
    return curve


def dims(bench: Bench) -> Curve:
    """From narrow embeddings to wide ones."""
    curve = Curve("dims", "numbers in an embedding", "triplets/s", "Training, batch 256, 20 k rows")
    for dim in DIMS:
        _train(bench, curve, dim, _job(bench, 20_000, dim, 256), DEVICE, HOST)
    return curve


def workers(bench: Bench) -> Curve:
    """A study shared by more and more processes of this machine."""
    storage = storage_module()
    curve = Curve(
        "workers",
        "workers of the study",
        "seconds per trial",
        f"Shared study, {FINISHED:,} finished trials, nothing trained",
    )
    names = {"ours": "tripletkit", "plain": "plain study.optimize"}
    for backend, words in (("postgresql", "PostgreSQL"), ("sqlite", "SQLite")):
        kinds = set(names)
        for count in WORKERS:
            trials = min(8, max(1, TRIALS // count))
            size = storage.Size(processes=count, trials=trials, finished=FINISHED)
            found = storage.measure(size, backend, sorted(kinds))
            for kind, seconds in found.items():
                curve.add(f"{names[kind]}, {words}", count, seconds)
            kinds = {kind for kind, s in found.items() if statistics.median(s) < SLOW}
    return curve


CURVES = {"rows": rows, "batch": batch, "dims": dims, "workers": workers}
