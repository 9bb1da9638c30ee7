"""Tables of any size made from one random block: what a row says does not change a step's cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit.data.bands import Bands
from tripletkit.data.store import Store
from tripletkit.device import choose_precision, type_on

IMAGES = 5  # per building
BANDS = 7
NEIGHBORS = 21  # of each row in each band, as `tripletkit data bands` finds them
BLOCK = 10_000  # rows


def block(rows: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    """Whole buildings: a random centre each, and its images around it."""
    random = np.random.default_rng(seed)
    centers = np.repeat(random.standard_normal((rows // IMAGES + 1, dim), np.float32), IMAGES, 0)
    return centers[:rows] + random.standard_normal((rows, dim), np.float32)


def mapped(path: Path, rows: int, dim: int) -> NDArray[np.float16]:
    """A table [rows, dim] in a file, as a store maps it: the block over and over."""
    if not path.exists():
        content = block(min(rows, BLOCK), dim).astype(np.float16)
        with path.open("wb") as file:
            for start in range(0, rows, BLOCK):
                file.write(content[: rows - start].data)
    return np.memmap(path, np.float16, mode="r", shape=(rows, dim))


def resident(rows: int, dim: int, device: torch.device) -> Tensor:
    """The same on a device, made there, in the type that a table has on it."""
    dtype = type_on(device, np.empty((0, dim), np.float16), choose_precision("auto", device))
    content = torch.from_numpy(block(min(rows, BLOCK), dim)).to(device, dtype)
    table = torch.empty(rows, dim, dtype=dtype, device=device)
    for part in table.split(BLOCK):
        part.copy_(content[: len(part)])
    return table


def store(rows: int, embeddings: NDArray[np.float16]) -> Store:
    """A store of buildings with `IMAGES` rows each; its parts without files, ids left out."""
    building = np.arange(rows, dtype=np.int32) // IMAGES
    return Store(
        source=Path("synthetic"),
        folder=Path("synthetic"),
        fingerprint="synthetic",
        embeddings=embeddings,
        ids=pa.chunked_array([], pa.large_string()),
        building_ids=pa.chunked_array([], pa.large_string()),
        building=building,
        by_building=np.arange(rows, dtype=np.int64),
        starts=np.append(np.arange(0, rows, IMAGES), rows).astype(np.int64),
    )


def shape_only(rows: int, dim: int) -> NDArray[np.float16]:
    """Stands for a table that is only on the device; takes no memory."""
    return np.broadcast_to(np.float16(0), (rows, dim))


def bands(path: Path, rows: int) -> Bands:
    """Bands of the usual size, in a file, with random neighbours: who they are costs nothing."""
    buildings, width = -(-rows // IMAGES), BANDS * NEIGHBORS
    if not path.exists():
        random = np.random.default_rng(0)
        away = random.integers(1, buildings, (BLOCK, width), dtype=np.int32)  # 0 is the own one
        with path.open("wb") as file:
            for start in range(0, rows, BLOCK):
                own = np.arange(start, min(rows, start + BLOCK), dtype=np.int32)[:, None] // IMAGES
                file.write(((own + away[: len(own)]) % buildings).data)
    offsets = np.arange(rows * BANDS + 1, dtype=np.int64) * NEIGHBORS
    neighbors = np.memmap(path, np.int32, mode="r", shape=(rows * width,))
    return Bands(count=BANDS, neighbors=neighbors, offsets=offsets)


def write_parquet(path: Path, rows: int, dim: int, *, prefix: str = "b", seed: int = 0) -> Path:
    """Embeddings in the input schema, random throughout, in small row groups."""
    schema = pa.schema(
        [
            ("building_id", pa.string()),
            ("streetview_image_id", pa.string()),
            ("embedding", pa.list_(pa.float32(), dim)),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, BLOCK):
            number = np.arange(start, min(rows, start + BLOCK))
            x = block(len(number), dim, seed + start)
            columns = [
                pa.array([f"{prefix}{n // IMAGES}" for n in number]),
                pa.array([f"{prefix}{n}" for n in number]),
                pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dim),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    return path
