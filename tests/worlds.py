"""Small stores and bands made in memory, for tests that need no files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tripletkit.data.bands import Bands
from tripletkit.data.store import Store


def make_store(
    building: list[int] | np.ndarray, embeddings: np.ndarray | None = None, name: str = "toy"
) -> Store:
    """A store whose row i shows building building[i]; -1 is a row left out."""
    codes = np.asarray(building, dtype=np.int32)
    kept = np.flatnonzero(codes >= 0)
    by_building = kept[np.argsort(codes[kept], kind="stable")].astype(np.int64)
    count = int(codes.max()) + 1
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes[kept], minlength=count))])
    if embeddings is None:
        embeddings = np.zeros((len(codes), 2), np.float32)
    return Store(
        source=Path(name),
        folder=Path(name),
        fingerprint=name,
        embeddings=embeddings,  # type: ignore[arg-type]
        ids=pa.chunked_array([[f"{name}{i}" for i in range(len(codes))]]),
        building_ids=pa.chunked_array([[f"{name}-b{i}" for i in range(count)]]),
        building=codes,
        by_building=by_building,
        starts=starts.astype(np.int64),
    )


def make_bands(cells: list[list[list[int]]], count: int) -> Bands:
    """cells[row][band] lists neighbour buildings."""
    flat = [cell for row in cells for cell in row]
    offsets = np.concatenate([[0], np.cumsum([len(c) for c in flat])]).astype(np.int64)
    neighbors = np.array([b for cell in flat for b in cell], dtype=np.int32)
    return Bands(count=count, neighbors=neighbors, offsets=offsets)


def clustered(
    buildings: int = 40, images: int = 4, dim: int = 16, seed: int = 0, name: str = "toy"
) -> Store:
    """Buildings whose images differ most along directions that say nothing about the building."""
    random = np.random.default_rng(seed)
    nuisance = np.random.default_rng(1).standard_normal((3, dim))  # the same in every split
    centers = random.standard_normal((buildings, dim))
    building = random.permutation(np.repeat(np.arange(buildings), images))
    views = random.standard_normal((len(building), 3)) @ nuisance
    x = centers[building] + views + 0.3 * random.standard_normal((len(building), dim))
    return make_store(building, x.astype(np.float16), name)


def near_and_far(store: Store, near: int = 5) -> Bands:
    """Two bands: the `near` nearest building centres, and the next twice as many."""
    x = np.asarray(store.embeddings, dtype=np.float64)
    codes = store.building
    centers = np.stack([x[codes == b].mean(0) for b in range(codes.max() + 1)])
    distance = np.linalg.norm(x[:, None] - centers, axis=2)
    distance[np.arange(len(x)), codes] = np.inf
    order = distance.argsort(1)[:, : 3 * near]
    return make_bands([[row[:near].tolist(), row[near:].tolist()] for row in order], 2)
