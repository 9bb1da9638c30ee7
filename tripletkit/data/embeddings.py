"""The vectors of parquet files as one flat file of halves, or of floats where halves lose too much."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tripletkit import log
from tripletkit.data import parquet
from tripletkit.data.flat import DTYPES
from tripletkit.data.parquet import EMBEDDING, SHOWN, Batch, Table
from tripletkit.device import as_tensor
from tripletkit.errors import DataError
from tripletkit.log import logger

HALF_MAX = 65504.0
HALF_NORMAL = 2.0**-14  # below it float16 loses precision
FLOAT_MAX = float(np.finfo(np.float32).max)
# Largest numbers of vectors whose length, a sum of squares, float32 can hold.
SHORT, LONG = 1e-12, 1e18
SYNC_BYTES = 64 * 2**20
SERIAL = 32_768  # numbers that torch converts without waking threads, which take the reader's core


def write_embeddings(
    aside: Path, table: Table, width: int, dtype: Any
) -> tuple[str, str, str | None]:
    """Write the table as float16, or float32 if that would lose more than rounding.

    Returns the suffix of the file, why it is that, and which vectors have no direction, if any.
    """
    why = "the source has it" if dtype == np.float16 else "every value fits"
    odd = _Odd()
    misfit = _stream(aside / "embeddings.f16", table, width, odd, exact=dtype == np.float16)
    if misfit is None:
        return "f16", why, odd.told()
    (aside / "embeddings.f16").unlink()
    logger.info("%s: starting again in float32: %s", table.name, misfit)
    odd = _Odd()
    _stream(aside / "embeddings.f32", table, width, odd, exact=False)
    return "f32", misfit, odd.told()


class _Odd:
    """Vectors that are zero, or whose length float32 cannot hold: to them nothing is near."""

    def __init__(self) -> None:
        self.count = 0
        self.places: list[str] = []

    def look(self, batch: Batch, peaks: NDArray[np.float64]) -> None:
        odd = (peaks < SHORT) | (peaks > LONG)
        if odd.any():
            self.count += int(np.count_nonzero(odd))
            self.places.append(f"{batch.rows(odd)} of {batch.path.name}")

    def told(self) -> str | None:
        if not self.count:
            return None
        shown = "; ".join(self.places[:SHOWN]) + ("; ..." if len(self.places) > SHOWN else "")
        return (
            f"{self.count:,} vectors are zero, or too small or large (below {SHORT:g}, above {LONG:g}) "
            f"for a length in float32, so nothing is near to them: {shown}"
        )


def _stream(path: Path, table: Table, width: int, odd: _Odd, *, exact: bool) -> str | None:
    """Copy the vectors into `path`; stop and say why when float16 (by its name) cannot hold one."""
    half = path.suffix == ".f16"
    low, high = (HALF_NORMAL, HALF_MAX) if half else (0.0, FLOAT_MAX)
    rows = max(1, parquet.BATCH_BYTES // (4 * width))
    buffer = np.empty((rows, width), DTYPES[path.suffix[1:]])
    done = 0
    with _writer(path) as write, log.progress(table.total, f"caching {table.name}") as update:
        for batch in parquet.batches(table, [EMBEDDING], rows):
            values = parquet.vectors(batch, width)
            kept = _convert(values, buffer[: len(values)])
            peaks = parquet.peaks(kept)
            near = ~((low < peaks) & (peaks < high))
            if near.any():  # rounding may have taken them over a limit
                peaks[near] = parquet.peaks(values[near])
            parquet.check_finite(batch, peaks)
            odd.look(batch, peaks)
            if half and not exact:
                for bad, what in (
                    (peaks > HALF_MAX, "leaves the range of float16 (65504)"),
                    ((peaks > 0) & (peaks < HALF_NORMAL), "is too small for float16 (6e-5)"),
                ):
                    if bad.any():
                        return f"the vector in {batch.rows(bad)} of {batch.path.name} {what}"
            elif not half and (peaks > FLOAT_MAX).any():
                raise DataError(
                    f"{batch.path}: column {EMBEDDING!r} leaves the range of float32 in "
                    f"{batch.rows(peaks > FLOAT_MAX)}"
                )
            write(kept)
            done += len(kept)
            update(done, f"caching {table.name}")
    return None


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[NDArray[Any]], None]]:
    """A function that appends an array. A thread syncs, or all would have to wait at the end."""
    with path.open("wb") as file, ThreadPoolExecutor(1, "sync") as pool:
        unsynced = 0
        syncs: list[Future[None]] = []

        def write(array: NDArray[Any]) -> None:
            nonlocal unsynced
            file.write(array.data)
            unsynced += array.nbytes
            if unsynced > SYNC_BYTES:
                unsynced = 0
                for sync in syncs:
                    sync.result()  # its error is told only once
                syncs[:] = [pool.submit(os.fsync, file.fileno())]

        yield write
        for sync in syncs:
            sync.result()


def _convert(values: NDArray[Any], buffer: NDArray[Any]) -> NDArray[Any]:
    """`values` in the type of `buffer`, which may get used for it."""
    if values.dtype == buffer.dtype:
        return values
    if values.dtype == np.float32:  # numpy rounds to halves one by one, torch many at once
        into, source = torch.from_numpy(buffer).view(-1), as_tensor(values).view(-1)
        for part, of in zip(into.split(SERIAL), source.split(SERIAL), strict=True):
            part.copy_(of)
    else:
        with np.errstate(over="ignore"):
            np.copyto(buffer, values, casting="same_kind")
    return buffer
