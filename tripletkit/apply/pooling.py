"""One vector per building: the mean of its images' vectors, at unit length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tripletkit.apply.projection import Vectors
from tripletkit.data import parquet
from tripletkit.data.parquet import BUILDING, Table

BATCH_BYTES = 16 * 2**20  # of vectors that are summed at once, in float64
CHUNK_BYTES = 64 * 2**20  # of sums that lie together
TINY = 1e-12  # as torch's normalize: a mean of zero stays zero


class Means:
    """Sums of vectors by building, in float64; memory grows with the buildings, not the images."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.codes: dict[str, int] = {}  # building: its place, by first appearance
        # In chunks of as many buildings, since to enlarge an array takes it twice.
        self.step = max(1, CHUNK_BYTES // (8 * dim))
        self.counts: list[NDArray[np.int64]] = []
        self.sums: list[NDArray[np.float64]] = []

    def add(self, buildings: pa.Array, vectors: NDArray[Any]) -> None:
        """Count in some images: their buildings (large_string [n]) and vectors [n, d]."""
        encoded = buildings.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        codes = np.array([self.codes.setdefault(text, len(self.codes)) for text in texts])
        while len(self.counts) * self.step < len(self.codes):
            self.counts.append(np.zeros(self.step, np.int64))
            self.sums.append(np.zeros((self.step, self.dim), np.float64))
        rows = codes[encoded.indices.to_numpy()]
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        chunks, places = np.divmod(ordered[starts], self.step)
        sums = np.add.reduceat(vectors[order].astype(np.float64), starts)
        counts = np.diff(starts, append=len(rows))
        for chunk in np.unique(chunks):
            here = chunks == chunk
            self.sums[chunk][places[here]] += sums[here]
            self.counts[chunk][places[here]] += counts[here]

    def groups(self, most: int) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float64]]]:
        """At most so many buildings at a time: the first one, their images, their unit vectors."""
        for chunk, (counts, sums) in enumerate(zip(self.counts, self.sums, strict=True)):
            used = min(self.step, len(self.codes) - chunk * self.step)
            for start in range(0, used, most):
                end = min(start + most, used)
                means = sums[start:end] / counts[start:end, None]
                lengths = np.linalg.norm(means, axis=1, keepdims=True)
                units = means / np.maximum(lengths, TINY)
                yield chunk * self.step + start, counts[start:end], units


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
