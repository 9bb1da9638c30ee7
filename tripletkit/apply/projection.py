"""The head over a whole parquet file, in constant memory; killed, it goes on where it was.

The output goes into a work folder, in segments. The borders of these, and of the blocks of rows
that reach the head, depend on nothing but the file, so the bytes are the same however often the work
was interrupted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit import fsio
from tripletkit.data import parquet
from tripletkit.data.embeddings import FLOAT_MAX
from tripletkit.data.parquet import EMBEDDING, Batch, Table
from tripletkit.device import autocast
from tripletkit.errors import DataError, Interrupted
from tripletkit.train.head import Head

BLOCK_BYTES = 4 * 2**20  # of the rows that the head gets at once, in float32
AHEAD = 2  # blocks that are read ahead
IN_FLIGHT = 1  # blocks whose output is on its way back from a GPU while the next one is computed
SEGMENT_BYTES = 128 * 2**20  # of the rows that are kept at once, in float32; a kill costs so many

# Told how many rows more are done.
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Projector:
    """A head on its device, how it computes, and in which type its output is kept."""

    head: Head
    device: torch.device
    precision: torch.dtype
    dtype: np.dtype[Any]
    origin: str  # its checkpoint, for messages

    @property
    def width(self) -> int:
        """Numbers in a vector that it takes."""
        return self.head.input_layer.in_features

    @property
    def dim(self) -> int:
        """Numbers in a vector that it gives."""
        return self.head.output_layer.out_features

    def check(self, table: Table) -> np.dtype[Any]:
        """The dtype of the table's vectors. Raises DataError if the head does not take them."""
        width, dtype = parquet.embedding_width(table)
        if width != self.width:
            raise DataError(
                f"{table.name}: column {EMBEDDING!r} has vectors of {width} numbers, the head of "
                f"{self.origin} takes {self.width}",
                hint="give it the embeddings of the model that it was trained on",
            )
        kind: np.dtype[Any] = dtype
        return kind


@dataclass(frozen=True)
class Vectors:
    """N vectors of d numbers in a folder of flat files, the segments, each of which is whole.

    Not mapped: that would count as our memory.
    """

    folder: Path
    dtype: np.dtype[Any]
    dim: int
    total: int  # N
    step: int  # rows of a segment; the last one may have fewer

    def part(self, start: int, rows: int) -> NDArray[Any]:
        """Rows from `start` on, [rows, d]."""
        row = self.dim * self.dtype.itemsize
        parts = [np.empty(0, self.dtype)]
        for first in range(start - start % self.step, start + rows, self.step):
            skipped = max(0, start - first)
            count = min(self.step, start + rows - first) - skipped
            path = self._segment(first)
            parts.append(np.fromfile(path, self.dtype, count * self.dim, offset=skipped * row))
        return np.concatenate(parts).reshape(rows, self.dim)

    def there(self) -> int:
        """How many rows are there, from the first one on."""
        for first in range(0, self.total, self.step):
            rows = min(self.step, self.total - first)
            try:
                size = self._segment(first).stat().st_size
            except FileNotFoundError:
                return first
            if size != rows * self.dim * self.dtype.itemsize:
                return first
        return self.total

    def write(self, first: int, blocks: list[NDArray[Any]]) -> int:
        """Keep a segment, which begins with row `first`; returns its rows."""
        with fsio.atomic_write(self._segment(first)) as file:
            for block in blocks:
                file.write(block.data)
        return sum(map(len, blocks))

    def _segment(self, first: int) -> Path:
        return self.folder / f"{first:012}"


def vectors_in(folder: Path, table: Table, projector: Projector) -> Vectors:
    """Those of a table, as far as `folder` has them."""
    row = 4 * max(projector.width, projector.dim)
    block = _block_rows(projector)
    step = block * max(1, SEGMENT_BYTES // (block * row))
    return Vectors(folder, projector.dtype, projector.dim, table.total, step)


def project(
    vectors: Vectors,
    table: Table,
    projector: Projector,
    *,
    check: Callable[[], None],
    should_stop: Callable[[], bool],
    advance: Advance,
) -> None:
    """Make those of the head's output for a table that are not there yet.

    A segment appears whole, by a rename, and what is in it depends on nothing but the file: so
    neither an end of any kind nor another process that is at the same can spoil it. `check` is
    called before. Raises Interrupted when asked to stop, with all but the segment in hand saved,
    and DataError naming rows that cannot be used.
    """
    done = vectors.there()
    held: list[NDArray[Any]] = []
    writing: Future[int] | None = None
    with ThreadPoolExecutor(1, "writer") as writer:
        for values in _outputs(table, projector, done) if done < table.total else ():
            held.append(values)
            rows = sum(map(len, held))
            if rows == vectors.step or done + rows == table.total:
                if writing:
                    advance(writing.result())
                check()
                writing = writer.submit(vectors.write, done, held)
                done, held = done + rows, []
            if should_stop():
                break
        if writing:
            advance(writing.result())
    if done < table.total:
        raise Interrupted(
            f"{table.name}: stopped after {done:,} of {table.total:,} rows",
            hint="the same command goes on from there",
        )


# --- the head --------------------------------------------------------------------------------


def _outputs(table: Table, projector: Projector, first: int) -> Iterator[NDArray[Any]]:
    """The head's output for the rows from `first` on, block by block.

    On a GPU the copies to and fro and the products of different blocks overlap.
    """
    half = projector.check(table) == np.float16
    rows = _block_rows(projector)
    on_gpu = projector.device.type == "cuda"
    buffers = [
        torch.empty(
            (min(rows, table.total), projector.width),
            dtype=torch.float16 if half else torch.float32,
            pin_memory=on_gpu,
        )
        for _ in range(AHEAD + 1 + IN_FLIGHT)
    ]
    sent: deque[_Output] = deque()
    start = first
    for block in _ahead(_blocks(table, projector.width, buffers, first)):
        sent.append(_Output(projector, block, table.files[0], start))
        start += len(block)
        if len(sent) > (IN_FLIGHT if on_gpu else 0):
            yield sent.popleft().values()
    for output in sent:
        yield output.values()


class _Output:
    """The head's output for a block, which may still be on its way from the device."""

    def __init__(self, projector: Projector, block: Tensor, path: Path, start: int) -> None:
        self.path, self.start = path, start
        with torch.inference_mode():
            x = block.to(projector.device, non_blocking=True)
            with autocast(projector.device, projector.precision):
                y = projector.head(x.to(projector.precision))
            kept = y.to(torch.from_numpy(np.empty(0, projector.dtype)).dtype)
            finite = torch.isfinite(y).all(1)
            self.kept, self.finite = (each.to("cpu", non_blocking=True) for each in (kept, finite))
        self.arrived = None
        if projector.device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def values(self) -> NDArray[Any]:
        """[n, d]; waits for it. Raises DataError where it is not finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if not self.finite.all():
            rows = Batch(self.path, self.start, None).rows(~self.finite.numpy())
            raise DataError(
                f"{self.path}: the head makes NaN or infinite numbers of {rows}",
                hint="the vectors there are far larger than those it was trained on",
            )
        values: NDArray[Any] = self.kept.numpy()
        return values


# --- blocks ----------------------------------------------------------------------------------


def _block_rows(projector: Projector) -> int:
    """How many rows the head gets at once."""
    return max(1, BLOCK_BYTES // (4 * projector.width))


def _blocks(
    table: Table, width: int, buffers: list[Tensor], first: int
) -> Generator[Tensor, None, None]:
    """The vectors from row `first` on, checked, in blocks of as many rows as a buffer has.

    Each block lies in the next of the `buffers`, in turn.
    """
    ring = itertools.cycle(buffers)
    buffer, filled = next(ring), 0
    rows = max(1, parquet.BATCH_BYTES // (4 * width))
    for batch in parquet.batches(table, [EMBEDDING], rows, first):
        values = _checked(batch, width)
        while len(values):
            part, values = np.split(values, [len(buffer) - filled])
            np.copyto(buffer[filled : filled + len(part)].numpy(), part, casting="same_kind")
            filled += len(part)
            if filled == len(buffer):
                yield buffer
                buffer, filled = next(ring), 0
    if filled:
        yield buffer[:filled]


def _checked(batch: Batch, width: int) -> NDArray[Any]:
    values = parquet.vectors(batch, width)
    peaks = parquet.peaks(values)
    parquet.check_finite(batch, peaks)
    if (peaks > FLOAT_MAX).any():
        raise DataError(
            f"{batch.path}: column {EMBEDDING!r} leaves the range of float32 in "
            f"{batch.rows(peaks > FLOAT_MAX)}"
        )
    return values


def _ahead(items: Generator[Tensor, None, None]) -> Iterator[Tensor]:
    """`items`, of which a thread makes the next ones meanwhile."""
    try:
        with ThreadPoolExecutor(1, "blocks") as pool:
            coming = deque(pool.submit(next, items, None) for _ in range(AHEAD))
            while (item := coming.popleft().result()) is not None:
                coming.append(pool.submit(next, items, None))
                yield item
    finally:
        items.close()
