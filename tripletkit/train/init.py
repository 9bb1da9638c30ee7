"""Start of the head from the data: the linear map that tells buildings apart best, or PCA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit import fsio, log
from tripletkit.data.flat import map_array, write_array
from tripletkit.data.store import Store, cached
from tripletkit.errors import DataError
from tripletkit.log import logger

FORMAT = 2  # part of the key: files of another layout are not found
IMAGES_PER_DIM = 64  # images looked at per dimension; more hardly move a covariance
SHRINKAGE = 0.1  # of the mean eigenvalue of the within-building covariance
BLOCK_BYTES = 64 * 2**20  # of one block of images in float64
ROUNDING = 1e-20  # a variance this small, beside what it is compared with, is rounding in float64


@dataclass(frozen=True)
class LinearStart:
    """y = weight @ x + bias for a raw embedding x; over the sample y has mean 0 and mean norm 1."""

    weight: Tensor  # float32 [output_dim, input_dim]
    bias: Tensor  # float32 [output_dim]


def linear_start(
    store: Store,
    kind: Literal["lda", "pca"],
    output_dim: int,
    cache_dir: Path,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> LinearStart:
    """The leading `output_dim` components of the embeddings, centred, of mean length 1.

    "lda" whitens by the within-building covariance, shrunk towards a sphere (Friedman 1989), and
    projects on the leading components of what is left: directions in which images of one building
    agree and buildings differ. "pca" projects on the leading components of the total covariance.
    Both use whole buildings, drawn by `seed`, until IMAGES_PER_DIM images per dimension; the
    covariances are exact in float64. Components beyond the rank of the data are zero.

    The whole basis is kept in `cache_dir`, so a second call, for any `output_dim`, only reads it.
    Raises DataError if all the images have the same embedding.
    """
    chosen = _choose_buildings(store, seed)
    parts: list[bytes | str] = [f"init {FORMAT}", store.fingerprint, kind]
    parts.append(chosen.astype("<i8").tobytes())
    folder = cache_dir / f"init-{fsio.digest(parts)}"
    dim = store.embeddings.shape[1]
    build = partial(_build, store, chosen, kind, torch.device(device))
    cached(folder, build, partial(_check, dim))

    kept = min(output_dim, dim)
    scale = 1 / map_array(folder / "norms.f32")[kept - 1]
    weight = np.zeros((output_dim, dim), np.float32)
    weight[:kept] = map_array(folder / "basis.f32").reshape(dim, dim)[:kept] * scale
    bias = np.zeros(output_dim, np.float32)
    bias[:kept] = map_array(folder / "center.f32")[:kept] * -scale
    return LinearStart(torch.from_numpy(weight), torch.from_numpy(bias))


def _check(dim: int, folder: Path, _facts: dict[str, Any]) -> None:
    """Raise ValueError when the files cannot be what was written."""
    for name, size in (("norms.f32", dim), ("basis.f32", dim * dim), ("center.f32", dim)):
        if len(array := map_array(folder / name)) != size or not np.isfinite(array).all():
            raise ValueError(f"{name} is not what was written")


def _choose_buildings(store: Store, seed: int) -> NDArray[np.int64]:
    """Codes, ascending, of the buildings to look at: all, or random ones until there is enough."""
    sizes = np.diff(store.starts)
    codes = np.flatnonzero(sizes)
    enough = IMAGES_PER_DIM * store.embeddings.shape[1]
    if len(store.by_building) > enough:
        codes = np.random.default_rng(seed).permutation(codes)
        codes = codes[: 1 + np.searchsorted(sizes[codes].cumsum(), enough)]
    return np.sort(codes)


def _build(
    store: Store,
    chosen: NDArray[np.int64],
    kind: Literal["lda", "pca"],
    device: torch.device,
    aside: Path,
) -> dict[str, Any]:
    """Write all components, their values at the mean, and the mean norm of each prefix."""
    mean, within, total, images = _covariances(store, chosen, device)
    if total.trace() <= ROUNDING * (mean @ mean):
        raise DataError(
            f"{store.source}: the {images:,} embeddings looked at are all the same",
            hint="check the embeddings",
        )
    basis = _lda(within, total) if kind == "lda" else _principal(total)
    # The same on every machine: a component and its negative are equally good.
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis *= torch.where(largest < 0, -1.0, 1.0)
    norms = _prefix_norms(store, chosen, mean, basis)
    write_array(aside / "basis.f32", basis.cpu().numpy())
    write_array(aside / "center.f32", (basis @ mean).cpu().numpy())
    write_array(aside / "norms.f32", norms.numpy())
    logger.info("%s start from %s images of %s buildings", kind, f"{images:,}", f"{len(chosen):,}")
    return {"format": FORMAT, "kind": kind, "images": images, "buildings": len(chosen)}


def _lda(within: Tensor, total: Tensor) -> Tensor:
    """Components [D, D], one per row, that are white within buildings, leading ones first."""
    dim = len(within)
    level = within.trace() / dim
    apart = (total - within).trace()
    if min(dim * level, apart) <= ROUNDING * total.trace():
        return _principal(total)  # nothing to whiten by, or nothing that tells buildings apart
    shrinkage = SHRINKAGE * level * torch.eye(dim, dtype=within.dtype, device=within.device)
    root = torch.linalg.cholesky(within + shrinkage)  # inv(root) @ x is white within buildings
    # What is left is what lies between buildings. The total, whitened, would rank first what
    # varies most within them, since shrinkage leaves that whiter than the rest.
    left = torch.linalg.solve_triangular(root, total - within, upper=False)
    white = torch.linalg.solve_triangular(root, left.T, upper=False)
    basis: Tensor = torch.linalg.solve_triangular(root.T, _principal(white).T, upper=True).T
    return basis


def _principal(covariance: Tensor) -> Tensor:
    """Eigenvectors [D, D], one per row, the largest eigenvalue first; zero beyond the rank."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    basis: Tensor = (vectors * (values > rounding)).flip(1).T
    return basis


def _covariances(
    store: Store, chosen: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Mean [D], within-building and total covariance [D, D] in float64, number of images.

    One pass: the total is the scatter within buildings plus that of their means. Images are
    centred on their building's mean before the product, and the means near the global one (by the
    first block's mean), so that nothing cancels.
    """
    dim = store.embeddings.shape[1]
    within = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    between = torch.zeros_like(within)
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    near: Tensor | None = None
    images = 0
    for x, sizes in _blocks(store, chosen, device):
        if near is None:
            near = x.mean(0)
        x -= near
        owner = torch.repeat_interleave(sizes)
        sums = x.new_zeros(len(sizes), dim).index_add_(0, owner, x)
        means = sums / sizes[:, None]
        x -= means[owner]
        within.addmm_(x.T, x)
        between.addmm_(sums.T, means)
        total += sums.sum(0)
        images += len(x)
    assert near is not None
    center = total / images
    within /= images
    between = between / images - torch.outer(center, center)
    return near + center, within, within + between, images


def _prefix_norms(store: Store, chosen: NDArray[np.int64], mean: Tensor, basis: Tensor) -> Tensor:
    """Mean length over the images of the first k components, float64 [D] for k = 1 to D."""
    total = torch.zeros(len(basis), dtype=torch.float64)
    projection = basis.T.float()
    images = 0
    for x, _ in _blocks(store, chosen, mean.device):
        y = ((x - mean).float() @ projection).square()
        # On the CPU: a cumulative sum of floats on a GPU has no fixed order.
        total += y.cpu().cumsum(1).sqrt().sum(0, dtype=torch.float64)
        images += len(x)
    return total / images


def _blocks(
    store: Store, chosen: NDArray[np.int64], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of whole buildings, float64 [n, D], and how many belong to each building, int64 [b].

    A building with more images than a block counts as several, each with its own mean: that moves
    the within-building covariance by less than one part in the rows of a block.
    """
    rows = max(2, BLOCK_BYTES // (8 * store.embeddings.shape[1]))
    sizes = np.diff(store.starts)[chosen]
    starts = store.starts[chosen]
    ends = sizes.cumsum()
    with log.progress(int(ends[-1]), "start of the head") as update:
        lo = 0
        while lo < ends[-1]:
            fits = np.searchsorted(ends, lo + rows, side="right")  # buildings that end in here
            whole = fits > 0 and ends[fits - 1] > lo
            hi = int(ends[fits - 1]) if whole else lo + rows
            place = np.arange(lo, hi)
            owner = np.searchsorted(ends, place, side="right")
            take = store.by_building[starts[owner] + place - (ends - sizes)[owner]]
            counts = np.unique(owner, return_counts=True)[1]
            x = torch.from_numpy(store.embeddings[take]).to(device).double()
            yield x, torch.from_numpy(counts).to(device)
            lo = hi
            update(lo, "start of the head")
