"""Small parquet files for tests: noisy clusters, one per building.

The noise grows along the dimensions, the same way for all buildings, so a head that learns to
ignore the noisy ones beats the raw vectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def table(
    *,
    buildings: int = 20,
    images: int = 4,
    dim: int = 8,
    first: int = 0,
    ids: str = "streetview",
    integer_buildings: bool = False,
    lists: str = "list",
    dtype: str = "float32",
    noise: float = 0.3,
    seed: int = 0,
) -> pa.Table:
    """`buildings` times `images` rows in random order.

    Buildings are numbered from `first`: equal numbers have equal centres, whatever the seed, and
    ranges that do not overlap make disjoint splits. `ids` is "streetview", "dataset" or "hash",
    `lists` "list", "large" or "fixed", `dtype` "float16", "float32" or "float64".
    """
    numbers = np.repeat(np.arange(first, first + buildings), images)
    image = np.tile(np.arange(images), buildings)
    centres = np.stack(
        [np.random.default_rng([7, b]).normal(size=dim) for b in range(first, first + buildings)]
    )
    random = np.random.default_rng([seed, first])
    scale = noise * np.linspace(0, 2, dim)
    vectors = np.repeat(centres, images, 0) + scale * random.normal(size=(len(numbers), dim))
    order = random.permutation(len(numbers))
    numbers, image, vectors = numbers[order], image[order], vectors[order]

    columns: dict[str, Any] = {}
    names = [f"{b}-{i}" for b, i in zip(numbers, image, strict=True)]
    if ids == "streetview":
        columns["streetview_image_id"] = [f"img-{name}" for name in names]
    elif ids == "dataset":
        columns["dataset_id"] = numbers % 50
        columns["patch_id"] = [f"patch-{name}" for name in names]
    else:
        columns["target_coord_hash"] = [f"hash-{name}" for name in names]
    columns["building_id"] = numbers if integer_buildings else [f"b{b:04d}" for b in numbers]
    columns["embedding"] = as_lists(vectors.astype(dtype), lists)
    return pa.table(columns)


def as_lists(vectors: np.ndarray, lists: str = "list") -> pa.Array:
    """Vectors [n, dim] as a column: "list", "large" or "fixed"."""
    count, dim = vectors.shape
    flat = pa.array(np.ascontiguousarray(vectors).ravel())
    if lists == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, dim)
    if lists == "large":
        return pa.LargeListArray.from_arrays(pa.array(np.arange(count + 1) * dim, pa.int64()), flat)
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * dim, pa.int32()), flat)


def write_parquet(path: Path, *, row_group_size: int | None = None, **options: Any) -> pa.Table:
    """Write `table(**options)` to `path` and return it."""
    written = table(**options)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(written, path, row_group_size=row_group_size)
    return written


def vectors_of(table: pa.Table) -> np.ndarray:
    """The embeddings of a table as [n, dim], one Python list at a time."""
    return np.array(table["embedding"].to_pylist())
