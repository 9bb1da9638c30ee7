"""How fast data get ready: the cache, exact bands and a warm start, beside what they are made of."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from tripletkit.data.bands import ANCHOR, BANDS, BUILDINGS
from tripletkit.data.neighbors import TILES, nearest_buildings
from tripletkit.data.store import open_store
from tripletkit.device import full_precision

IMAGES = 5  # per building
GROUP = 100 * 2**20  # bytes of vectors in a row group
READ_ROWS = 1024
READ_OPTIONS = {"pre_buffer": False, "buffer_size": 64 * 2**10}  # the fastest that was found
LEVELS = 7
CODE = """
import sys, time
from pathlib import Path
import torch
from tripletkit.data.bands import open_bands
from tripletkit.data.store import check_leakage, open_store
from tripletkit.train.sampler import TripletIndex
folder = Path(sys.argv[1])
"""
BUILD = """
open_store(folder / "rss.parquet", folder / "cache")
status = Path("/proc/self/status").read_text()  # ru_maxrss starts with what forked us
print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)
"""
START = """
start = time.perf_counter()
train, val = (open_store(folder / f"{n}.parquet", folder / "cache") for n in ("train", "val"))
check_leakage({"train": train, "val": val})
bands = open_bands(folder / "bands.parquet", train, folder / "cache")
TripletIndex(train, bands, torch.device("cpu"))
print(time.perf_counter() - start)
"""


def cache_build(folder: Path, dim: int, rows: int, slices: int) -> tuple[list[float], list[float]]:
    """MB of vectors a second: building the cache of a float32 file, and pyarrow only reading it."""
    path = _write(folder / "rates.parquet", rows, dim)
    megabytes = rows * dim * 4 / 1e6

    def build() -> None:
        open_store(path, folder / "cache")

    def read() -> None:
        with pq.ParquetFile(path, **READ_OPTIONS) as file:
            for _ in file.iter_batches(READ_ROWS, columns=["embedding"]):
                pass

    ours, reference = [], []
    for number in range(slices + 1):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        pair = megabytes / _seconds(build), megabytes / _seconds(read)
        if number:  # the first is a warm-up
            ours.append(pair[0])
            reference.append(pair[1])
    shutil.rmtree(folder / "cache")
    path.unlink()
    return ours, reference


def cache_build_rss(folder: Path, dim: int, rows: int) -> float:
    """Peak RSS, GB, of a process that builds the cache of a file with one row group."""
    path = _write(folder / "rss.parquet", rows, dim, group=rows)
    peak = _run(BUILD, folder)
    shutil.rmtree(folder / "cache")
    path.unlink()
    return peak


def bands(
    folder: Path, dim: int, rows: int, slices: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """FLOP a second of the products in an exact search, and of such products alone."""
    store = open_store(_write(folder / "points.parquet", rows, dim), folder / "cache")
    queries, tile = TILES[device.type]
    queries = min(queries, rows)
    Q, G = (torch.randn(n, dim, device=device) for n in (queries, tile))
    block = np.arange(queries)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def search() -> None:
        for _ in nearest_buildings(store, block, min(150, rows // IMAGES - 1), device):
            pass

    def products() -> None:
        with full_precision(device):
            for _ in range(-(-rows // tile)):
                Q @ G.T
        synchronize()

    ours, reference = [], []
    for number in range(slices + 1):
        pair = (
            2 * queries * rows * dim / _seconds(search),
            2 * queries * tile * -(-rows // tile) * dim / _seconds(products),
        )
        if number:
            ours.append(pair[0])
            reference.append(pair[1])
    return ours, reference


def warm_start(folder: Path, rows: int, dim: int, neighbors: int) -> float:
    """Seconds from warm caches to all that a training of `rows` images needs, after the imports."""
    held = rows // 10 // IMAGES * IMAGES
    _write(folder / "train.parquet", rows - held, dim)
    _write(folder / "val.parquet", held, dim, first=rows - held)
    _write_bands(folder / "bands.parquet", rows - held, neighbors)
    _run(START, folder)  # builds the caches
    return _run(START, folder)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _run(code: str, folder: Path) -> float:
    """The number that the code prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE + code, folder],
        stdout=subprocess.PIPE,
        check=True,
    )
    return float(done.stdout)


def _write(path: Path, rows: int, dim: int, *, first: int = 0, group: int = 0) -> Path:
    """Random vectors of images numbered from `first`."""
    random = np.random.default_rng(first)
    schema = pa.schema(
        [
            ("building_id", pa.string()),
            ("streetview_image_id", pa.string()),
            ("embedding", pa.list_(pa.float32(), dim)),
        ]
    )
    group = group or max(1, min(100_000, GROUP // (4 * dim)))
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(first, first + rows, group):
            number = np.arange(start, min(start + group, first + rows))
            flat = random.standard_normal(len(number) * dim, np.float32)
            columns = (_names(number // IMAGES), _images(number), _vectors(flat, dim))
            writer.write_table(pa.table(list(columns), schema=schema), row_group_size=group)
    return path


def _write_bands(path: Path, rows: int, neighbors: int) -> None:
    """Metadata with random neighbours."""
    random = np.random.default_rng(0)
    buildings = -(-rows // IMAGES)
    with pq.ParquetWriter(
        path, _bands_of(np.arange(0), random, buildings, neighbors).schema
    ) as out:
        for start in range(0, rows, 100_000):
            number = np.arange(start, min(start + 100_000, rows))
            out.write_table(_bands_of(number, random, buildings, neighbors))


def _bands_of(
    number: np.ndarray, random: np.random.Generator, buildings: int, neighbors: int
) -> pa.Table:
    step = random.integers(1, buildings, (len(number), neighbors))  # never the own building
    codes = (number[:, None] // IMAGES + step) % buildings
    levels = np.sort(random.integers(0, LEVELS, codes.shape, dtype=np.int32), 1)
    ends = pa.array(np.arange(len(number) + 1, dtype=np.int32) * neighbors)
    lists = [pa.ListArray.from_arrays(ends, x) for x in (_names(codes.ravel()), levels.ravel())]
    return pa.table([_images(number), *lists], [ANCHOR, BUILDINGS, BANDS])


def _names(number: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise("building", pa.array(number).cast(pa.string()), "-")


def _images(number: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise("image", pa.array(number).cast(pa.string()), "-")


def _vectors(flat: np.ndarray, dim: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), dim)
