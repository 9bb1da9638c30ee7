"""Confidence intervals of retrieval metrics: a bootstrap over buildings.

Images of a building succeed and fail together, so buildings are drawn, not images: the cluster
bootstrap (Field & Welsh 2007, J. R. Statist. Soc. B 69, 369-390). The interval is the percentile
interval (Efron & Tibshirani 1993, chapter 13). What each query scored is known and stays: the
gallery is fixed, so a resample costs one weighted sum over the buildings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tripletkit.train.retrieval import Retrieval

LEVEL = 0.95
SALT = 0xB007  # apart from what else is drawn by the same seed
BLOCK = 2**22  # weights at once: 32 MB


@dataclass(frozen=True)
class Sums:
    """Per-query scores, added up by building; buildings without a query are left out."""

    building: NDArray[np.int64]  #: [B] codes, ascending
    queries: NDArray[np.float64]  #: [B]
    scores: dict[str, NDArray[np.float64]]  #: [B] of each metric


def by_building(result: Retrieval, codes: NDArray[np.integer], top_k: Sequence[int]) -> Sums:
    """What `summarize` takes the means of; `codes` [N] are the buildings of the embeddings."""
    building, which = np.unique(codes[result.query_rows.numpy()], return_inverse=True)
    rank = result.first_hit_rank.numpy()
    each: dict[str, NDArray[Any]] = {f"recall@{k}": rank <= k for k in top_k}
    each["map@r"] = result.average_precision_at_r.numpy()
    each["mrr"] = 1 / rank
    each["r_precision"] = result.r_precision.numpy()
    scores = {name: np.bincount(which, value).astype(np.float64) for name, value in each.items()}
    return Sums(building.astype(np.int64), np.bincount(which).astype(np.float64), scores)


def weights(
    buildings: int, resamples: int, seed: int, *, block: int = BLOCK
) -> Iterator[NDArray[np.float64]]:
    """How often each building was drawn: [r, buildings] at a time, `resamples` rows in all.

    Each row draws `buildings` times with replacement. The rows do not depend on `block`, the
    largest r * buildings.
    """
    random = np.random.default_rng([SALT, seed])
    step = max(1, block // buildings)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        # int32 is drawn four times as fast.
        drawn = random.integers(buildings, size=(rows, buildings), dtype=np.int32)
        drawn += np.arange(rows, dtype=np.int32)[:, None] * np.int32(buildings)
        times = np.bincount(drawn.ravel(), minlength=rows * buildings)
        yield times.reshape(rows, buildings).astype(np.float64)


def resample(
    queries: NDArray[np.float64],
    scores: NDArray[np.float64],
    resamples: int,
    seed: int,
    *,
    block: int = BLOCK,
) -> NDArray[np.float64]:
    """The means over the queries, `scores` [B, M] / `queries` [B], of each resample: [resamples, M].

    All columns see the same buildings, so the difference of two columns is that of a paired test.
    """
    columns = np.column_stack((queries, scores))
    sums = np.concatenate(
        [w @ columns for w in weights(len(queries), resamples, seed, block=block)]
    )
    means: NDArray[np.float64] = sums[:, 1:] / sums[:, :1]
    return means


def interval(draws: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of the resampled values [resamples]."""
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
