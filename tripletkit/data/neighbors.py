"""Exact nearest buildings by blocked matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit.data.store import Store
from tripletkit.device import full_precision, put

# Queries and gallery rows of one matrix product. Larger ones gain nothing, smaller ones lose rate,
# and so do rows of the result that do not start at multiples of 64 bytes.
TILES = {"cpu": (4_096, 4_096), "cuda": (8_192, 32_768)}
PADDING = 1.25  # a tile repeats images until all its buildings have as many, up to this factor
ROUNDING = 1e-6  # squared distances that float32 products cannot tell from 0: doubles
RESIDENT_SHARE = 0.6  # of free GPU memory that the table may take


def nearest_buildings(
    store: Store,
    rows: NDArray[np.int64],
    k: int,
    device: torch.device,
    tiles: tuple[int, int] | None = None,
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """The `k` nearest other buildings of each row, nearest first, for one block of rows at a time.

    Yields building codes and distances, [n, k] each; equal distances are in the order of codes.
    `tiles` are the queries and gallery rows of one matrix product.
    """
    queries, tile = tiles or TILES[device.type]
    fetch = _fetcher(store, device)
    product = torch.empty(min(queries, len(rows)), tile, device=device)
    sizes = np.diff(store.starts)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    place = np.empty(len(sizes), np.int64)
    place[order] = np.arange(len(order))
    for start in range(0, len(rows), queries):
        block = rows[start : start + queries]
        keys = _pack(torch.full((len(block), k), -2.0, device=device), 0)
        with full_precision(device):
            Q = fetch(block)
            own = torch.from_numpy(place[store.building[block]]).to(device)[:, None]
            first = 0
            for slots in _tiles(store, order, sizes, tile):
                best = _best_images(Q, slots, fetch, product)
                width = best.shape[1]
                column = (own - first).clamp(0, width - 1)
                inside = (own >= first) & (own < first + width)
                best.scatter_(1, column, torch.where(inside, -torch.inf, best.gather(1, column)))
                codes = torch.from_numpy(order[first : first + width]).to(device)
                _merge(keys, best, codes)
                first += width
        similarity, codes = _unpack(keys)
        squares = 2 - 2 * similarity
        distances = squares.where(squares > ROUNDING, 0).sqrt()
        yield codes.int().cpu().numpy(), distances.cpu().numpy()


def _tiles(
    store: Store, order: NDArray[np.int64], sizes: NDArray[np.int64], tile: int
) -> Iterator[NDArray[np.int64]]:
    """Row numbers [images, buildings] of consecutive buildings of `order`, most images first.

    Buildings with fewer images repeat theirs, which changes no maximum.
    """
    falling = -sizes[order]
    first = 0
    while first < len(order):
        images = -falling[first]
        alike = int(np.searchsorted(falling, -images / PADDING, "right")) - first
        inside = order[first : first + min(alike, max(1, tile // images))]
        slot = np.arange(images)[:, None] % sizes[inside]
        yield store.by_building[store.starts[inside] + slot]
        first += len(inside)


def _best_images(
    Q: Tensor,
    slots: NDArray[np.int64],
    fetch: Callable[[NDArray[np.int64]], Tensor],
    product: Tensor,
) -> Tensor:
    """Similarity of each query to the nearest image of each building, [queries, buildings].

    `product` [at least queries, tile] is room for one matrix product: new memory costs time.
    """
    best = None
    step = max(1, product.shape[1] // slots.shape[1])
    for part in np.split(slots, range(step, len(slots), step)):
        out = product[: len(Q), : part.size]
        torch.mm(Q, fetch(part.ravel()).T, out=out)
        similarity = out.view(len(Q), *part.shape).amax(1)
        best = similarity if best is None else torch.maximum(best, similarity)
    assert best is not None
    return best


def _merge(keys: Tensor, best: Tensor, codes: Tensor) -> None:
    """Update each query's sorted `keys` [q, k] with the buildings of a tile, `best` [q, n]."""
    k = keys.shape[1]
    hit = best >= _unpack(keys[:, -1:])[0]
    many = best.shape[1] > k and torch.count_nonzero(hit) > 2 * keys.numel()
    if many:  # the first tiles: raise the bar
        hit &= best >= best.topk(k, 1).values[:, -1:]
    row, column = torch.nonzero(hit, as_tuple=True)
    if len(row) == 0:
        return
    rows, slot, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[slot]
    merged = keys.new_full((len(rows), int(counts.max())), torch.iinfo(torch.int64).min)
    merged[slot, place] = _pack(best[row, column], codes[column])
    keys[rows] = torch.cat([keys[rows], merged], 1).topk(k, 1).values


_LOW = 2**32 - 1


def _pack(similarity: Tensor, codes: Tensor | int) -> Tensor:
    """Integers in the order of (similarity, -code): no ties, so the result has one order only."""
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long() * 2**32 + (_LOW - codes)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW - (keys & _LOW)


def _fetcher(store: Store, device: torch.device) -> Callable[[NDArray[np.int64]], Tensor]:
    """A function from row numbers to unit vectors in float32 on `device`."""
    table = store.embeddings
    fits = (
        device.type == "cuda" and table.nbytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    )
    resident = put(table, device) if fits else None

    def fetch(rows: NDArray[np.int64]) -> Tensor:
        if resident is None:
            x = torch.from_numpy(table[rows]).to(device)
        else:
            x = resident[torch.from_numpy(rows).to(device)]
        if x.dtype == torch.float32:  # its extremes have squares that are not finite, or zero
            x = x / x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        return torch.nn.functional.normalize(x.float(), dim=1)

    return fetch
