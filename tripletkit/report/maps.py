"""Two-dimensional maps of the same images before and after training."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tripletkit.data.store import Store

BUILDINGS = 16  # in colour
IMAGES = 40  # of each, at most
CONTEXT = 1_500  # images of other buildings, in grey

# Coordinates [n, 2] of all points in "raw" and "trained", within -1 to 1.
Coordinates = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Points:
    """The images on the maps: those of some buildings, then others as a background."""

    places: NDArray[np.int64]  # [n] among the rows of the split
    shown: NDArray[np.int64]  # [n] which of `names` it belongs to; -1 in the background
    names: list[str]  # of the buildings in colour
    buildings: list[str]  # [n]
    images: list[str]  # [n] ids
    raw: NDArray[np.float32]  # [n, D] unit vectors
    trained: NDArray[np.float32]  # [n, d]

    @staticmethod
    def choose(
        store: Store, rows: NDArray[np.int64], codes: NDArray[np.int64], seed: int
    ) -> Points:
        """Draw them; the buildings in colour come from the quarter with the most images."""
        random = np.random.default_rng([seed, 2])
        sizes = np.bincount(codes)
        able = np.flatnonzero(sizes > 1)
        by_size = able[np.argsort(-sizes[able], kind="stable")]
        # All that are as large as the last of the quarter: the file's order has no say.
        pool = max(BUILDINGS, len(able) // 4)
        large = by_size[sizes[by_size] >= sizes[by_size[min(pool, len(able)) - 1]]]
        chosen = np.sort(random.choice(large, min(BUILDINGS, len(large)), replace=False))
        own = [
            random.permutation(np.flatnonzero(codes == building))[:IMAGES] for building in chosen
        ]
        rest = np.flatnonzero(~np.isin(codes, chosen))
        rest = random.choice(rest, min(CONTEXT, len(rest)), replace=False)
        places = np.concatenate([*own, np.sort(rest)])
        shown = np.repeat(np.arange(len(chosen)), [len(each) for each in own])
        shown = np.concatenate([shown, np.full(len(rest), -1)])
        none = np.empty((0, 0), np.float32)
        return Points(
            places,
            shown,
            store.building_ids.take(pa.array(chosen)).to_pylist(),
            store.building_ids.take(pa.array(codes[places])).to_pylist(),
            store.ids.take(pa.array(rows[places])).to_pylist(),
            none,
            none,
        )


def pca(points: Points) -> Coordinates:
    """The plane in which the buildings in colour spread most; the background is projected on it."""
    in_color = points.shown >= 0
    flat = {}
    for name, x in (("raw", points.raw), ("trained", points.trained)):
        x = x.astype(np.float64)
        centred = x - x[in_color].mean(0)
        _, _, axes = np.linalg.svd(centred[in_color], full_matrices=False)
        flat[name] = np.pad(centred @ axes[:2].T, ((0, 0), (0, max(0, 2 - len(axes[:2])))))
    return _aligned(flat, in_color)


def umap_installed() -> bool:
    """Whether the extra is there."""
    return importlib.util.find_spec("umap") is not None


def umap(points: Points, seed: int) -> Coordinates:
    """UMAP (McInnes et al. 2018) of all points, with its defaults; takes half a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numba and of seeds that cost threads
        from umap import UMAP

        neighbors = min(15, len(points.places) - 1)
        flat = {
            name: UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1)
            .fit_transform(x)
            .astype(np.float64)
            for name, x in (("raw", points.raw), ("trained", points.trained))
        }
    return _aligned(flat, points.shown >= 0)


def _aligned(
    flat: dict[str, NDArray[np.float64]], in_color: NDArray[np.bool_]
) -> dict[str, NDArray[np.float64]]:
    """Turn and mirror, which mean nothing in a map, so that raw lies as trained does; rescale."""
    middle = {name: x - (x.min(0) + x.max(0)) / 2 for name, x in flat.items()}
    left, _, right = np.linalg.svd(middle["raw"][in_color].T @ middle["trained"][in_color])
    middle["raw"] = middle["raw"] @ (left @ right)
    return {name: x / max(float(np.abs(x).max()), 1e-12) for name, x in middle.items()}
