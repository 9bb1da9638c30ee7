"""`make bench`: speed and memory as ratios of something measured in the same run.

Prints a markdown table and writes it, with the raw numbers as JSON, into the folder given as
argument (default: build/benchmarks).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.benchmarks import naive_trainer, study_storage
from tripletkit.config import Training, TrainingModel
from tripletkit.data.bands import Bands
from tripletkit.data.store import Store, open_store
from tripletkit.device import (
    autocast,
    choose_device,
    choose_precision,
    make_deterministic,
    put,
)
from tripletkit.train.bandit import Bandit
from tripletkit.train.head import Head
from tripletkit.train.loss import triplet_loss
from tripletkit.train.sampler import TripletIndex
from tripletkit.train.step import DeviceStep, HostStep, Learner

IMAGES = 5  # per building
BANDS = 7
NEIGHBORS = 150
SLICES = 5


def write_embeddings(path: Path, rows: int, dim: int, *, prefix: str = "b", seed: int = 0) -> Path:
    """Clustered synthetic embeddings in the input schema, written in small row groups."""
    random = np.random.default_rng(seed)
    schema = pa.schema(
        [
            ("building_id", pa.string()),
            ("streetview_image_id", pa.string()),
            ("embedding", pa.list_(pa.float32(), dim)),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            building = np.arange(start, start + count) // IMAGES
            centers = random.standard_normal((count // IMAGES + 1, dim), np.float32)
            x = centers[building - building[0]] + random.standard_normal((count, dim), np.float32)
            writer.write_table(
                pa.table(
                    [
                        pa.array([f"{prefix}{b}" for b in building]),
                        pa.array([f"{prefix}{i}" for i in range(start, start + count)]),
                        pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dim),
                    ],
                    schema=schema,
                )
            )
    return path


def random_bands(store: Store, seed: int = 0) -> Bands:
    """Bands of the usual size with random neighbours: the trainer's cost does not depend on who."""
    random = np.random.default_rng(seed)
    rows, buildings = len(store.building), len(store.building_ids)
    per_band = NEIGHBORS // BANDS
    neighbors = random.integers(0, buildings - 1, (rows, BANDS * per_band), dtype=np.int32)
    neighbors += neighbors >= store.building[:, None]  # never the own building
    offsets = np.arange(rows * BANDS + 1, dtype=np.int64) * per_band
    return Bands(count=BANDS, neighbors=neighbors.ravel(), offsets=offsets)


def rates(runs: list[Callable[[], object]], triplets: int, seconds: float) -> list[list[float]]:
    """Triplets per second of each of `runs`, slice by slice in turn, after one as warm-up.

    In turn, because a shared machine's speed drifts: only slices side by side compare.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + SLICES):
        for run, into in zip(runs, found, strict=True):
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds / (1 + SLICES):
                run()
                count += 1
            synchronize()
            into.append(count * triplets / (time.perf_counter() - start))
    return [into[1:] for into in found]


class Job:
    """One configuration of head, data and batch, and the ways to train on it."""

    def __init__(self, store: Store, batch: int, device: torch.device, precision: str) -> None:
        self.store = store
        self.section = Training(batch_size=batch)
        self.device = device
        self.precision = choose_precision(precision, device)
        self.bands = random_bands(store)
        self.model = TrainingModel()

    def learner(self, bands: int, home: torch.device) -> Learner:
        head = Head(self.model, self.store.embeddings.shape[1]).to(self.device)
        return Learner(head, self.section, Bandit(self.section, bands, home), self.precision)

    def trainer(self, *, resident: bool = True) -> Callable[[], None]:
        """Our step, as the loop calls it."""
        home = self.device if resident else torch.device("cpu")
        index = TripletIndex(self.store, self.bands, home)
        kind = DeviceStep if resident else HostStep
        step = kind(self.learner(index.bands, home), index, put(self.store.embeddings, home))
        epoch = 0
        step.begin(0, epoch, 0)

        def run() -> None:
            nonlocal epoch
            if step.place + self.section.batch_size > len(index.anchors):
                step.finish()
                epoch += 1
                step.begin(0, epoch, 0)
            step()

        return run

    def in_hand(self) -> Callable[[], None]:
        """Forward, loss and backward of the same head on one batch that is already there."""
        learner = self.learner(BANDS, self.device)
        size, dim = 3 * self.section.batch_size, self.store.embeddings.shape[1]
        x = torch.randn(size, dim, device=self.device).to(self.precision)

        def run() -> None:
            with autocast(self.device, self.precision):
                anchor, positive, negative = learner.head(x).chunk(3)
            loss = triplet_loss(anchor, positive, negative, margin=0.5, distance="euclidean")
            for parameter in learner.head.parameters():
                parameter.grad = None
            loss.mean().backward()

        return run

    def naive(self, steps: int) -> float:
        """The per-item Dataset + DataLoader trainer."""
        head = Head(self.model, self.store.embeddings.shape[1]).to(self.device)
        offsets = self.bands.offsets.reshape(-1)

        def by_anchor_band(row: int) -> list[list[int]]:
            cells = offsets[row * BANDS : (row + 1) * BANDS + 1]
            return [self.bands.neighbors[a:b].tolist() for a, b in pairwise(cells)]

        return naive_trainer.run(
            head,
            self.store.embeddings,
            self.store.building,
            [by_anchor_band(row) for row in range(len(self.store.building))],
            batch_size=self.section.batch_size,
            steps=steps,
            workers=2,
        )


def bench_training(folder: Path, device: torch.device, seconds: float) -> list[dict[str, object]]:
    results = []
    for dim, rows in ((768, 20_000), (4096, 5_000)):
        store = open_store(write_embeddings(folder / f"{dim}.parquet", rows, dim), folder / "cache")
        job = Job(store, 256, device, "auto")
        name = f"training, {dim}-d, batch 256"
        runs = [job.trainer(), job.in_hand(), job.trainer(resident=False)]
        ours, bound, host = rates(runs, 256, seconds)
        results.append(row(f"{name}, against forward and backward in hand", ours, bound, 0.7))
        results.append(row(f"{name}, host placement against device", host, ours, 0.7))
        if dim == 768:
            half = Job(store, 256, device, "bf16")
            results.append(row(f"{name}, bf16 against fp32", *rates(
                [half.trainer(), job.trainer()], 256, seconds), 1.0))  # fmt: skip
            ours, naive = [], []
            for _ in range(SLICES):
                naive.append(job.naive(steps=int(2 * seconds)))
                ours += rates([job.trainer()], 256, seconds / SLICES)[0][-1:]
            results.append(row(f"{name}, against a per-item DataLoader trainer", ours, naive, 10.0))
    return results


def bench_memory(folder: Path) -> list[dict[str, object]]:
    """Train and evaluate 200 k rows x 768 through the command line; peak RSS of the process."""
    train = write_embeddings(folder / "big.parquet", 200_000, 768)
    val = write_embeddings(folder / "big_val.parquet", 10_000, 768, prefix="v", seed=1)
    common = [
        f"--set=global.scratch_dir={folder}",
        f"--set=paths.train_parquet_path={train}",
        f"--set=paths.val_parquet_path={val}",
        "--set=training.num_epochs=1",
        "--set=training.batch_size=1024",
    ]
    results = []
    for command in (["train"], ["evaluate", "--split", "train"]):
        if command[0] == "evaluate":
            command.append("--set=training.retrieval_metric_max_queries=5000")
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "tripletkit", *command, *common],
            stdout=subprocess.DEVNULL, cwd=folder,
        ) as process:  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"tripletkit {command} failed")
        took = time.perf_counter() - start
        name = f"peak RSS of `{command[0]}`, 200 k x 768, GB ({took:.0f} s)"
        results.append(row(name, [usage.ru_maxrss * 1024 / 1e9], [1.5], 1.0, at_most=True))
    return results


def bench_study() -> dict[str, object]:
    seconds = study_storage.measure()
    name = "seconds per trial in the study, 16 workers, against plain study.optimize"
    return row(name, seconds["ours"], seconds["plain"], 0.6, at_most=True)


def row(
    name: str,
    values: list[float],
    references: list[float],
    target: float,
    *,
    at_most: bool = False,
) -> dict[str, object]:
    """One line: medians, and the median of the ratios side by side."""
    ratios = [v / r for v, r in zip(values, references, strict=True)]
    ratio = statistics.median(ratios)
    value, reference = statistics.median(values), statistics.median(references)
    met = ratio <= target if at_most else ratio >= target
    print(f"{name}: {value:,.4g} / {reference:,.4g} = {ratio:.2f} (target {target})", flush=True)
    return {
        "what": name, "value": value, "reference": reference, "ratio": ratio,
        "spread": [min(ratios), max(ratios)],
        "target": ("<= " if at_most else ">= ") + f"{target:g}", "met": met,
    }  # fmt: skip


def markdown(results: list[dict[str, Any]], machine: str) -> str:
    lines = [
        f"{machine}",
        "",
        "| what | value | reference | ratio | lowest to highest | target |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        mark = "" if r["met"] else " (missed)"
        lines.append(
            f"| {r['what']} | {r['value']:,.4g} | {r['reference']:,.4g} | {r['ratio']:.2f} "
            f"| {r['spread'][0]:.2f} to {r['spread'][1]:.2f} | {r['target']}{mark} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--seconds", type=float, default=12, help="per measured rate")
    parser.add_argument("--study", action="store_true", help="only the study's storage")
    arguments = parser.parse_args()
    device = choose_device("auto")
    make_deterministic(device)
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if arguments.study:
        bench_study()
        return
    with tempfile.TemporaryDirectory() as folder:
        results = bench_training(Path(folder), device, arguments.seconds)
        results += bench_memory(Path(folder))
    results.append(bench_study())
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = markdown(results, f"{machine}, torch {torch.__version__}")
    (arguments.out / "benchmarks.md").write_text(table)
    (arguments.out / "benchmarks.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n" + table)


if __name__ == "__main__":
    main()
