"""Training on a GPU: rows that need one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tests.benchmarks import measure, synthetic
from tests.benchmarks.measure import Bench, Row
from tests.benchmarks.training import IN_HAND, Job
from tripletkit.train.head import Head

DIM = 4096
ROWS = 500_000  # 4 GB on the device
HOST_ROWS = 100_000  # 0.8 GB in a file, far more than any processor caches
SIDE = 8192  # of the matrices that say what the device can do


def matrix_product(
    device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Callable[[], object], float]:
    """A large product of random matrices, and its floating-point operations."""
    a, b, out = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2.0 * SIDE**3


def operations(head: Head, *, done: bool) -> float:
    """Floating-point operations of the head's matrices for one triplet, forward and backward.

    Two per weight and row, three times: forward, gradient of the weight, gradient of the input.
    The layers that read the embeddings need no gradient of their input: with `done` it is left
    out, else counted as is customary.
    """
    first = (head.input_layer.weight, head.residual_proj.weight)  # type: ignore[union-attr]
    outer = sum(weight.numel() for weight in first)
    every = sum(p.numel() for p in head.parameters() if p.ndim == 2)
    return 3 * 2 * (3 * every - (outer if done else 0))


def gpu_training(bench: Bench) -> Iterator[Row]:
    """A large table on the device: small batches, large batches, the captured graph."""
    device = bench.gpu()
    table = synthetic.resident(ROWS, DIM, device)
    store = synthetic.store(ROWS, synthetic.shape_only(ROWS, DIM))
    bands = synthetic.bands(bench.folder / "gpu.bands", ROWS)

    job = Job(device, store, bands, 256, table=table)
    runs = [job.trainer(), job.trainer(graph=False), job.in_hand()]
    ours, eager, bound = measure.rates([(run, 256) for run in runs], bench.seconds, device)
    name = "training, 4096-d, 500 k rows on the device, batch 256"
    yield measure.absolute(name, ours, unit="triplets/s", target=1e6, at_most=False)
    yield measure.ratio(f"{name}, captured", ours, eager, unit="triplets/s", beside="eager")
    yield measure.ratio(name, ours, bound, unit="triplets/s", beside=IN_HAND)

    job = Job(device, store, bands, 8192, table=table)
    product, count = matrix_product(device)
    runs = [(job.trainer(), 8192.0), (job.in_hand(), 8192.0), (product, count)]
    ours, bound, peak = measure.rates(runs, bench.seconds, device)
    name = "training, 4096-d, 500 k rows on the device, batch 8192"
    yield measure.ratio(name, ours, bound, unit="triplets/s", beside=IN_HAND)
    for done, words, target in ((True, "", 0.5), (False, ", gradient of the input counted", None)):
        yield measure.ratio(
            f"{name}{words}",
            [rate * operations(job.head(), done=done) / 1e12 for rate in ours],
            [rate / 1e12 for rate in peak],
            unit="TFLOP/s",
            beside=f"bf16 product of {SIDE} x {SIDE}",
            target=target,
        )


def gpu_host(bench: Bench) -> Iterator[Row]:
    """The same table in a file on the host and on the device."""
    device = bench.gpu()
    table = synthetic.mapped(bench.folder / "host.f16", HOST_ROWS, DIM)
    bands = synthetic.bands(bench.folder / "host.bands", HOST_ROWS)
    job = Job(device, synthetic.store(HOST_ROWS, table), bands, 4096)
    runs = [job.trainer(resident=False), job.trainer()]
    host, ours = measure.rates([(run, 4096) for run in runs], bench.seconds, device)
    yield measure.ratio(
        "training, 4096-d, batch 4096, host placement",
        host,
        ours,
        unit="triplets/s",
        beside="device placement",
        target=0.7,
    )
