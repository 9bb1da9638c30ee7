"""Which buildings are taken for which others: nearest images, confused pairs, weakest buildings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit.data.store import Store
from tripletkit.device import full_precision
from tripletkit.train.retrieval import COPY_ROWS, GALLERY_PER_THREAD, QUERIES, TIE, Retrieval


class Nearest(NamedTuple):
    """The nearest image of each query, on the CPU; row -1 and -inf where there is none."""

    row: Tensor  # int64 [Q] row among the embeddings
    similarity: Tensor  # float32 [Q] cosine


class Mistakes(NamedTuple):
    """Images whose nearest image shows another building, in row order, on the CPU.

    An image alone in its building is never one of them: it had no right answer to find.
    """

    query: Tensor  # int64 [M] row among the embeddings
    taken_for: Tensor  # int64 [M] row of the nearest image of another building
    similarity: Tensor  # float32 [M] cosine of the two


@dataclass(frozen=True)
class Pair:
    """Two buildings whose images are taken for each other."""

    building: str  # the one that comes first in the file
    other: str
    mistakes: int  # images of either whose nearest image is one of the other
    similarity: float  # cosine of the nearest such pair
    images: tuple[str, str]  # the ids of that pair: of `building`, of `other`


@dataclass(frozen=True)
class Weak:
    """A building whose images do not find each other."""

    building: str
    images: int  # in the gallery
    queries: int  # of them that were asked
    recall_at_1: float
    map_at_r: float
    taken_for: str  # the building most often nearest instead


@torch.no_grad()
def nearest(
    embeddings: Tensor,
    building: Tensor,
    *,
    queries: Tensor | None = None,
    other: bool = False,
    tile: int | None = None,
) -> Nearest:
    """The nearest image by cosine of each of the rows `queries` (default: all), self excluded.

    `embeddings` [N, d] (finite, any length and type, never copied) and `building`, codes [N], are
    on one device. `other` looks at images of other buildings only. Ties are those of `retrieve`:
    an image of another building within TIE of the nearest of the own one comes before it. Of
    images of the same sort within TIE of the nearest the first row is taken, so the result does
    not depend on `tile`, save for what is within rounding of the border of the tie band.
    Memory: a few tiles, and a number per query of a tile and tile of the gallery.
    """
    device = embeddings.device
    asked = torch.arange(len(embeddings)) if queries is None else queries
    units = _Units(embeddings)
    side = tile or QUERIES[device.type]
    width = side
    if tile is None and device.type == "cpu":
        width = max(width, GALLERY_PER_THREAD * torch.get_num_threads())
    with full_precision(device):
        found = [
            _nearest(units, building, part, width, other=other)
            for part in asked.to(device).split(side)
            if len(part)
        ]
    found.append(Nearest(asked[:0].cpu(), torch.empty(0)))
    return Nearest(*(torch.cat(each) for each in zip(*found, strict=True)))


class _Units:
    """Rows of a table as unit vectors in float32, widened as needed."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.norms = torch.empty(len(table), 1, device=table.device)
        for x, out in zip(table.split(COPY_ROWS), self.norms.split(COPY_ROWS), strict=True):
            torch.linalg.vector_norm(x.float(), dim=1, keepdim=True, out=out)
        self.norms.clamp_min_(1e-12)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self.table[rows].float() / self.norms[rows]


def _nearest(units: _Units, building: Tensor, asked: Tensor, width: int, *, other: bool) -> Nearest:
    """One tile of queries: the highest similarity in each tile of the gallery, then the row."""
    x, own = units[asked], building[asked, None]
    edges = range(0, len(building), width)
    nothing = torch.full((len(asked), len(edges)), -torch.inf, device=x.device)
    wrong, right = nothing, nothing.clone()
    for t, lo in enumerate(edges):
        similarity = x @ units[lo : lo + width].T
        same = building[None, lo : lo + width] == own
        if not other:
            line, column = same.nonzero(as_tuple=True)
            value = similarity[line, column]
            value.masked_fill_(asked[line] == column + lo, -torch.inf)
            right[:, t].scatter_reduce_(0, line, value, "amax")
        wrong[:, t] = similarity.masked_fill_(same, -torch.inf).amax(1)
    best_wrong, best_right = wrong.amax(1), right.amax(1)
    astray = (best_wrong >= best_right - TIE) & (best_wrong > -torch.inf)
    if other:
        astray.fill_(value=True)
    threshold = torch.where(astray, best_wrong, best_right) - TIE
    # The first row above the threshold is in the first tile that has one.
    at_least = torch.where(astray[:, None], wrong, right) >= threshold[:, None]
    tile = at_least.to(torch.uint8).argmax(1)
    row = torch.full_like(asked, -1)
    for t in tile.unique().tolist():
        lo = t * width
        here = ((tile == t) & (threshold > -torch.inf)).nonzero().squeeze(1)
        similarity = x[here] @ units[lo : lo + width].T
        place = torch.arange(lo, min(lo + width, len(building)), device=x.device)
        out = (building[place] == own[here]) == astray[here, None]
        similarity.masked_fill_(out | (place == asked[here, None]), -torch.inf)
        # A product of another shape rounds differently: there is one in any case.
        limit = torch.minimum(threshold[here], similarity.amax(1))
        row[here] = lo + (similarity >= limit[:, None]).to(torch.uint8).argmax(1)
    cosine = torch.full(asked.shape, -torch.inf, device=x.device)
    # In one order and in double precision, so that the tiles leave no trace.
    for part in (row >= 0).nonzero().squeeze(1).split(COPY_ROWS):
        cosine[part] = (x[part].double() * units[row[part]].double()).sum(1).float()
    return Nearest(row.cpu(), cosine.cpu())


def mistakes(embeddings: Tensor, building: Tensor, retrieval: Retrieval | None = None) -> Mistakes:
    """The images whose nearest is of another building, and which it is.

    With the `retrieval` of the same embeddings only its queries count, and only those that missed
    are searched again: their share is 1 - recall@1.
    """
    if retrieval is not None:
        query = retrieval.query_rows[retrieval.first_hit_rank > 1]
        found = nearest(embeddings, building, queries=query, other=True)
        return Mistakes(query, found.row, found.similarity)
    codes = building.cpu()
    _, which, sizes = codes.unique(return_inverse=True, return_counts=True)
    query = (sizes[which] > 1).nonzero().squeeze(1)
    found = nearest(embeddings, building, queries=query)
    missed = codes[found.row] != codes[query]
    return Mistakes(query[missed], found.row[missed], found.similarity[missed])


def confused_pairs(
    store: Store,
    rows: Tensor | NDArray[np.int64],
    embeddings: Tensor,
    count: int,
    *,
    found: Mistakes | None = None,
) -> list[Pair]:
    """The `count` pairs of buildings most often taken for each other; most mistakes first.

    `embeddings` [n, d] are those of `rows` [n] of the store; `found`, their mistakes, if they are
    known already. Equal numbers: the more similar pair first, then the one first in the file.
    """
    rows = np.asarray(rows)
    found = found or mistakes(embeddings, _codes(store, rows, embeddings))
    query, taken_for, similarity = (each.numpy() for each in found)
    codes = np.stack((store.building[rows[query]], store.building[rows[taken_for]]), axis=1)
    first = np.where(codes[:, 0] < codes[:, 1], query, taken_for)
    second = np.where(codes[:, 0] < codes[:, 1], taken_for, query)
    codes = np.sort(codes, axis=1)
    # Of each pair the most similar images come first, then those first in the file.
    order = np.lexsort((second, first, -similarity, codes[:, 1], codes[:, 0]))
    pairs, best, number = np.unique(codes[order], axis=0, return_index=True, return_counts=True)
    best = order[best]
    ranked = np.lexsort((pairs[:, 1], pairs[:, 0], -similarity[best], -number))[:count]
    return [
        Pair(
            building=store.building_ids[int(pairs[i, 0])].as_py(),
            other=store.building_ids[int(pairs[i, 1])].as_py(),
            mistakes=int(number[i]),
            similarity=float(similarity[best[i]]),
            images=(
                store.ids[int(rows[first[best[i]]])].as_py(),
                store.ids[int(rows[second[best[i]]])].as_py(),
            ),
        )
        for i in ranked
    ]


def weakest(
    store: Store,
    rows: Tensor | NDArray[np.int64],
    embeddings: Tensor,
    retrieval: Retrieval,
    count: int,
    *,
    found: Mistakes | None = None,
) -> list[Weak]:
    """The `count` buildings with the lowest recall@1, then MAP@R; fewer if fewer make mistakes.

    Both are means over the building's queries in `retrieval`; `found`, the mistakes that go with
    it, if they are known already. Of equal buildings the one with more queries comes first, then
    the one first in the file.
    """
    rows = np.asarray(rows)
    codes = store.building[rows]
    found = found or mistakes(embeddings, _codes(store, rows, embeddings), retrieval)
    asked, which, queries = np.unique(
        codes[retrieval.query_rows.numpy()], return_inverse=True, return_counts=True
    )
    hits = np.bincount(which, weights=retrieval.first_hit_rank.numpy() == 1)
    precision = np.bincount(which, weights=retrieval.average_precision_at_r.numpy())
    images = np.bincount(codes, minlength=int(asked.max()) + 1)[asked]
    ranked = np.lexsort((asked, -queries, precision / queries, hits / queries))
    ranked = ranked[(hits < queries)[ranked]][:count]
    ours = np.isin(codes[found.query.numpy()], asked[ranked])
    instead = _most_often(codes[found.query.numpy()[ours]], codes[found.taken_for.numpy()[ours]])
    return [
        Weak(
            building=store.building_ids[int(asked[i])].as_py(),
            images=int(images[i]),
            queries=int(queries[i]),
            recall_at_1=float(hits[i] / queries[i]),
            map_at_r=float(precision[i] / queries[i]),
            taken_for=store.building_ids[instead[int(asked[i])]].as_py(),
        )
        for i in ranked
    ]


def _most_often(building: NDArray[np.int32], other: NDArray[np.int32]) -> dict[int, int]:
    """Of each building the most frequent `other`; of equally frequent ones the lowest code."""
    pairs, number = np.unique(np.stack((building, other), axis=1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -number, pairs[:, 0]))
    owner, first = np.unique(pairs[order, 0], return_index=True)
    return dict(zip(owner.tolist(), pairs[order[first], 1].tolist(), strict=True))


def _codes(store: Store, rows: NDArray[np.int64], embeddings: Tensor) -> Tensor:
    return torch.from_numpy(store.building[rows].astype(np.int64)).to(embeddings.device)
