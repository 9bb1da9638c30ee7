"""Whether the arrays of a cache can be what we wrote. Nothing may be read beyond an array's end.

Sizes alone do not tell a file that a broken disk or another program changed. What points into other
arrays is looked at as a whole; the numbers of the vectors are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BLOCK = 2**22  # numbers that are looked at together: they stay in the caches of a core


def check_groups(
    building: NDArray[np.int32], by_building: NDArray[np.int64], starts: NDArray[np.int64]
) -> None:
    """That rows are grouped by building as a store has them. Raises ValueError."""
    rows = len(building)
    sizes = np.diff(starts)
    if starts[0] != 0 or starts[-1] != rows or (sizes < 0).any() or len(by_building) != rows:
        raise ValueError("the borders of the buildings are not in order")
    _check_range(by_building, rows)
    owner = np.repeat(np.arange(len(sizes), dtype=building.dtype), sizes)
    if (building[by_building] != owner).any():
        raise ValueError("the rows of a building are not its own")
    if ((np.diff(by_building) <= 0) & (owner[1:] == owner[:-1])).any():
        raise ValueError("the rows of a building are not in order")


def check_texts(texts: pa.ChunkedArray, count: int) -> None:
    """That these are so many texts. Raises ValueError: ArrowInvalid is one."""
    if len(texts) != count or texts.null_count or texts.type != pa.large_string():
        raise ValueError("not the texts that were written")
    texts.validate(full=True)


def check_cells(
    offsets: NDArray[np.int64], neighbors: NDArray[np.int32], cells: int, buildings: int
) -> None:
    """That each of `cells` is a range of `neighbors`, and these are buildings. Raises ValueError."""
    if len(offsets) != cells + 1 or offsets[0] != 0 or offsets[-1] != len(neighbors):
        raise ValueError("the borders of the bands are not where they belong")
    for start in range(0, len(offsets), BLOCK):
        if (np.diff(offsets[start : start + BLOCK + 1]) < 0).any():
            raise ValueError("the borders of the bands are not in order")
    _check_range(neighbors, buildings)


def _check_range(places: NDArray[Any], end: int) -> None:
    """That all are in [0, end)."""
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        unsigned = block.view(np.uint32 if block.dtype == np.int32 else np.uint64)
        if unsigned.max() >= end:  # a negative one is large
            raise ValueError("a place is beyond the end")
