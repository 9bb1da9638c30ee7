"""Full-gallery retrieval against bare matrix products, and how soon commands and training start."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks import synthetic
from tripletkit.device import full_precision
from tripletkit.train.retrieval import retrieve

NOISE = 2.0  # leaves a map@r of about 0.3, so that most queries have several positives to count
BIG = 500  # images of the big buildings of the skewed case
GEMM_TILES = {"cpu": (512, 1024, 2048), "cuda": (8192, 16384)}
STARTS = 5

# `tripletkit train` up to its second question whether to stop: that is after the first step.
FIRST_STEP = """
import sys, time
from pathlib import Path
from tripletkit import boundary
boundary.prepare_process()
from tripletkit import config, stages
from tripletkit.data import bands
from tripletkit.errors import Interrupted
from tripletkit.train import loop

asked = []
def should_stop():
    asked.append(time.perf_counter())
    return len(asked) > 1

begun = time.perf_counter()
try:
    stages.train(config.load(None, sys.argv[1:], environ={}), should_stop)
except Interrupted:
    print(asked[1] - begun)
"""


def retrieval(
    rows: int, dim: int, slices: int, device: torch.device, *, skewed: bool = False
) -> tuple[list[float], list[float]]:
    """Query-gallery pairs per second, slice by slice in turn: ours, and the products alone.

    Buildings have 5 images; if `skewed`, a tenth of the images, 5000 at most, belong to buildings
    with 500.
    """
    embeddings, building = gallery(rows, dim, device, skewed=skewed)
    units = torch.nn.functional.normalize(embeddings)
    tile = min(GEMM_TILES[device.type], key=lambda t: _took(lambda: _products(units, t), device))
    ours, bare = [], []
    for _ in range(slices):
        bare.append(rows * rows / _took(lambda: _products(units, tile), device))
        ours.append(rows * rows / _took(lambda: retrieve(embeddings, building), device))
    return ours, bare


def retrieval_seconds(rows: int, dim: int, device: torch.device) -> float:
    """One retrieval of all against all, after a small one that warms up."""
    embeddings, building = gallery(rows, dim, device)
    few = rows // 20
    retrieve(embeddings[:few], torch.arange(few, device=device) // synthetic.IMAGES)
    return _took(lambda: retrieve(embeddings, building), device)


def gallery(
    rows: int, dim: int, device: torch.device, *, skewed: bool = False
) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, dim], on `device`, of buildings in random order, and their codes."""
    building = torch.arange(rows) // synthetic.IMAGES
    if skewed:
        many = min(rows // 10, 10 * BIG)
        building[:many] = rows + torch.arange(many) // BIG
    random = torch.Generator().manual_seed(0)
    building = building.unique(return_inverse=True)[1]
    building = building[torch.randperm(rows, generator=random)].to(device)
    random = torch.Generator(device).manual_seed(0)
    centers = torch.randn(int(building.max()) + 1, dim, generator=random, device=device)
    noise = torch.randn(rows, dim, generator=random, device=device)
    return centers[building].add_(noise, alpha=NOISE), building


def import_seconds() -> dict[str, float]:
    """Medians over fresh processes: two commands that need no torch, and torch's own import."""
    module = [sys.executable, "-m", "tripletkit"]
    commands = {
        "tripletkit --help": [*module, "--help"],
        "tripletkit status": [*module, "status"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    with tempfile.TemporaryDirectory() as empty:
        return {
            name: statistics.median(_process_seconds(command, empty) for _ in range(STARTS))
            for name, command in commands.items()
        }


def first_step_seconds(folder: Path) -> float:
    """From after the imports to the end of the first step of `tripletkit train`; warm caches."""
    train = synthetic.write_parquet(folder / "first_step.parquet", 20_000, 64)
    found = []
    for start in range(1 + STARTS):
        settings = [
            f"global.scratch_dir={folder}",
            f"paths.train_parquet_path={train}",
            f"paths.checkpoint_dir={folder}/first_step_{start}",
        ]
        done = subprocess.run(
            [sys.executable, "-c", FIRST_STEP, *settings],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, cwd=folder,
        )  # fmt: skip
        found.append(float(done.stdout))
    return statistics.median(found[1:])  # the first one builds the caches


def _products(units: Tensor, tile: int) -> None:
    """Every query with the whole gallery, tile by tile."""
    room = units.new_empty(tile * tile)
    with full_precision(units.device):
        for queries in units.split(tile):
            for part in units.split(tile):
                shape = (len(queries), len(part))
                torch.mm(queries, part.T, out=room[: shape[0] * shape[1]].view(shape))


def _took(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _process_seconds(command: Sequence[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return time.perf_counter() - start
