"""One vector per building: the mean of its images' vectors, at unit length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tripletkit.apply.projection import Vectors
from tripletkit.data import parquet
from tripletkit.data.parquet import BUILDING, Table

BATCH_BYTES = 16 * 2**20  # of vectors that are summed at once, in float64
TINY = 1e-12  # as torch's normalize: a mean of zero stays zero


class Means:
    """Sums of vectors by building, in float64; memory grows with the buildings, not the images."""

    def __init__(self, dim: int) -> None:
        self.codes: dict[str, int] = {}  # building: its place, by first appearance
        self.counts = np.zeros(0, np.int64)
        self.sums = np.zeros((0, dim), np.float64)

    def add(self, buildings: pa.Array, vectors: NDArray[Any]) -> None:
        """Count in some images: their buildings (large_string [n]) and vectors [n, d]."""
        encoded = buildings.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        codes = np.array([self.codes.setdefault(text, len(self.codes)) for text in texts])
        self._make_room()
        rows = codes[encoded.indices.to_numpy()]
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        whose = ordered[starts]
        self.sums[whose] += np.add.reduceat(vectors[order].astype(np.float64), starts)
        self.counts[whose] += np.diff(starts, append=len(rows))

    def _make_room(self) -> None:
        have, need = len(self.counts), len(self.codes)
        if need > have:
            more = max(need, 2 * have) - have
            self.counts = np.concatenate([self.counts, np.zeros(more, np.int64)])
            self.sums = np.concatenate([self.sums, np.zeros((more, self.sums.shape[1]))])

    def rows(self, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Images and unit vector of the buildings from `start` to `end`."""
        means = self.sums[start:end] / self.counts[start:end, None]
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        return self.counts[start:end], means / np.maximum(lengths, TINY)


def mean_by_building(
    table: Table, vectors: Sequence[Vectors], check_stop: Callable[[], None]
) -> Means:
    """Means of the vectors [N, d] of each file of a table, in the order of the files and rows."""
    dim = vectors[0].dim
    means = Means(dim)
    rows = max(1, min(parquet.BATCH_ROWS, BATCH_BYTES // (8 * dim)))
    of_file = dict(zip(table.files, vectors, strict=True))
    for batch in parquet.batches(table, [BUILDING], rows):
        check_stop()
        part = of_file[batch.path].part(batch.start, len(batch.data))
        means.add(parquet.text(batch, BUILDING), part)
    return means
