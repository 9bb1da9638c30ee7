"""The training step: against its own arithmetic, and one placement or precision against another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tests.benchmarks import measure, synthetic
from tests.benchmarks.measure import Bench, Row
from tripletkit.config import Training, TrainingModel
from tripletkit.data.bands import Bands
from tripletkit.data.store import Store
from tripletkit.device import autocast, choose_precision, put, type_on
from tripletkit.train.bandit import Bandit
from tripletkit.train.head import Head
from tripletkit.train.loss import triplet_loss
from tripletkit.train.sampler import TripletIndex
from tripletkit.train.step import DeviceStep, HostStep, Learner

IN_HAND = "forward and backward in hand"
HOST = torch.device("cpu")


def stepping(step: DeviceStep | HostStep, anchors: int) -> Callable[[], None]:
    """A step as the training loop calls it, epoch after epoch; all batches are whole."""
    epoch = 0
    step.begin(0, epoch, 0)

    def run() -> None:
        nonlocal epoch
        if step.place + step.batch > anchors:
            epoch += 1
            step.begin(0, epoch, 0)
        step()

    return run


class Job:
    """One head, table and batch, and the ways to train on it.

    `table` is the store's on the device, where it is there already (and maybe nowhere else).
    """

    def __init__(
        self,
        device: torch.device,
        store: Store,
        bands: Bands,
        batch: int,
        *,
        precision: str = "auto",
        table: Tensor | None = None,
    ) -> None:
        self.device = device
        self.store = store
        self.bands = bands
        self.section = Training(batch_size=batch)
        self.precision = choose_precision(precision, device)
        self.table = table
        self.dim = store.embeddings.shape[1]

    def head(self) -> Head:
        torch.manual_seed(0)
        return Head(TrainingModel(), self.dim).to(self.device)

    def trainer(self, *, resident: bool = True, graph: bool = True) -> Callable[[], None]:
        """Our step, with the table on the device or on the host."""
        home = self.device if resident else HOST
        index = TripletIndex(self.store, self.bands, home)
        bandit = Bandit(self.section, index.bands, home)
        learner = Learner(self.head(), self.section, bandit, self.precision)
        table = self.table if resident else None
        if table is None:
            table = put(
                self.store.embeddings,
                home,
                type_on(home, self.store.embeddings, self.precision),
            )
        if not resident:
            return stepping(HostStep(learner, index, table), len(index.anchors))
        step = DeviceStep(learner, index, table)
        if not graph:
            step._replay.allowed = False
        return stepping(step, len(index.anchors))

    def in_hand(self) -> Callable[[], None]:
        """Forward, loss and backward of the same head on one batch that is already there."""
        head = self.head()
        x = torch.randn(3 * self.section.batch_size, self.dim, device=self.device)
        x = x.to(self.precision)

        def run() -> None:
            with autocast(self.device, self.precision):
                y = head(x).view(3, self.section.batch_size, -1)
            loss = triplet_loss(y, margin=0.5, distance="euclidean")
            for parameter in head.parameters():
                parameter.grad = None
            loss.mean().backward()

        return captured(run, self.device)


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On CUDA one graph, so that it is the arithmetic that counts and not Python."""
    # A graph knows addresses, not tensors: keep alive what `run` reads.
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()

    def replay() -> None:
        assert run is not None
        graph.replay()

    return replay


def small_job(bench: Bench, rows: int, dim: int, **options: object) -> Job:
    """A job at batch 256 on a table in a file."""
    table = synthetic.mapped(bench.folder / f"{rows}x{dim}.f16", rows, dim)
    bands = synthetic.bands(bench.folder / f"{rows}.bands", rows)
    return Job(bench.device, synthetic.store(rows, table), bands, 256, **options)  # type: ignore[arg-type]


def step(bench: Bench) -> Iterator[Row]:
    """The whole step against forward and backward, and the host's table against the device's."""
    for dim, rows in ((768, 20_000), (4096, 5_000)):
        job = small_job(bench, rows, dim)
        runs = [job.trainer(), job.in_hand(), job.trainer(resident=False)]
        ours, bound, host = measure.rates([(run, 256) for run in runs], bench.seconds, bench.device)
        name = f"training, {dim}-d, batch 256"
        target = None if bench.on_gpu else 0.7  # a GPU's targets are in gpu.py
        yield measure.ratio(name, ours, bound, unit="triplets/s", beside=IN_HAND, target=target)
        yield measure.ratio(
            f"{name}, host placement",
            host,
            ours,
            unit="triplets/s",
            beside="device placement",
            target=target,
        )


def precision(bench: Bench) -> Iterator[Row]:
    """Why `precision = "auto"` is what it is on this device."""
    jobs = [small_job(bench, 20_000, 768, precision=wanted) for wanted in ("bf16", "fp32")]
    bf16, fp32 = measure.rates([(j.trainer(), 256) for j in jobs], bench.seconds, bench.device)
    name = "training, 768-d, batch 256, bf16"
    yield measure.ratio(name, bf16, fp32, unit="triplets/s", beside="fp32")
