"""Exact retrieval over the full gallery: matrix products in tiles, and counting in place of sorting.

The rank of a positive is its place among the query's positives plus the number of negatives that
are at least as similar, so no list of neighbours is kept and every k is as cheap as k = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tripletkit.device import full_precision
from tripletkit.errors import DataError, RunError

# A negative this close below a positive counts as tied with it, and a tie goes to the negative.
# Products of differently shaped tiles round differently, by less than this for unit vectors.
TIE = 1e-6
NARROWEST = 128  # gallery columns of the first, cheap look at every query
COPY_ROWS = 8192
QUERIES = {"cpu": 1024, "cuda": 16384}  # of a tile; the same for all who share a retrieval
# On a CPU a tile costs 0.2 ms beside the product, so many threads get a wide one; a thread's part
# of it, 2 MB, stays in the cache.
GALLERY_PER_THREAD = 512


@dataclass(frozen=True)
class Retrieval:
    """How well each query finds the other images of its building; Q queries in row order."""

    query_rows: Tensor  #: int64 [Q] row among the embeddings
    first_hit_rank: Tensor  #: int64 [Q] rank, from 1, of the nearest image of the same building
    average_precision_at_r: Tensor  #: float64 [Q]
    r_precision: Tensor  #: float64 [Q]
    singletons: int  #: images alone in their building: in the gallery, never a query


def summarize(result: Retrieval, top_k: Sequence[int]) -> dict[str, float]:
    """Means over the queries: recall@k for each of `top_k`, map@r, mrr, r_precision; and queries.

    recall@k is any-hit: the share of queries with an image of their building among the k nearest.
    With k beyond the gallery it is 1, under the name asked for.
    """
    rank = result.first_hit_rank
    return {
        **{f"recall@{k}": float((rank <= k).double().mean()) for k in top_k},
        "map@r": float(result.average_precision_at_r.mean()),
        "mrr": float(rank.double().reciprocal().mean()),
        "r_precision": float(result.r_precision.mean()),
        "queries": float(len(rank)),
    }


@torch.no_grad()
def retrieve(
    embeddings: Tensor,
    building: Tensor,
    *,
    max_queries: int = 0,
    seed: int = 0,
    tile: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Retrieval:
    """Rank the whole gallery for every image that has another one of its building.

    `embeddings` [N, d] (any length, compared by cosine in float32) and `building`, codes [N], are
    on one device, the result is on the CPU. `max_queries` > 0 takes a subset of the queries drawn
    by `seed`; the gallery stays whole. Self is excluded by row. Ties are counted pessimistically:
    a negative with a similarity within TIE of a positive's ranks before it. MAP@R, R-precision
    and MRR are those of pytorch-metric-learning (Musgrave et al. 2020, arXiv 2003.08505).

    The result is exact for any `tile` (queries and gallery rows per product), save that a
    negative within rounding, about 1e-7, of the border of the tie band may fall on either side.
    Memory: one sorted copy of the embeddings, in their own type, and a few tiles.
    Processes that share the work each ask for `share` (part, parts), get about a part's queries,
    which may be none, and `merge` what they got.
    Raises RunError for embeddings that are not finite, DataError if no building has two images.
    """
    queries = tile or QUERIES[embeddings.device.type]
    width = queries
    if tile is None and embeddings.device.type == "cpu":
        width = max(width, GALLERY_PER_THREAD * torch.get_num_threads())
    part, parts = share
    gallery = _Gallery.build(embeddings, building)
    places = gallery.queries(max_queries, seed)
    bounds = gallery.building_bounds(places)
    starts, ends = (bound.cpu() for bound in bounds)
    none = places[:0]
    found = [Retrieval(none, none, none.double(), none.double(), gallery.singletons)]
    with full_precision(embeddings.device):
        for lo, hi in islice(_query_tiles(ends - starts, queries), part, None, parts):
            here = places[lo:hi]
            positives = _positives(gallery, here, bounds[:, lo:hi], queries * width)
            counts = _Counts(positives, bounds[1, lo:hi] - bounds[0, lo:hi] - 1)
            _scan(gallery, here, starts[lo:hi], ends[lo:hi], counts, width)
            found.append(Retrieval(gallery.order[here], *counts.scores(), gallery.singletons))
    return merge(found)


def merge(parts: Sequence[Retrieval]) -> Retrieval:
    """All the shares of one retrieval as one: the bits that a single process would have found."""
    rows, by_row = torch.cat([part.query_rows for part in parts]).sort()
    return Retrieval(
        rows.cpu(),
        torch.cat([part.first_hit_rank for part in parts])[by_row].cpu(),
        torch.cat([part.average_precision_at_r for part in parts])[by_row].cpu(),
        torch.cat([part.r_precision for part in parts])[by_row].cpu(),
        parts[0].singletons,
    )


@dataclass(frozen=True)
class _Gallery:
    """Unit vectors sorted by the size of their building, then building: what belongs together
    is contiguous, and the queries of one tile have about the same number of positives.
    """

    x: Tensor  # [N, d] in the type that was given
    norms: Tensor  # float32 [N, 1]
    order: Tensor  # int64 [N] row of each place
    sizes: Tensor  # int64 [B] images of each building, ascending
    singletons: int

    @staticmethod
    def build(embeddings: Tensor, building: Tensor) -> _Gallery:
        assert embeddings.ndim == 2
        assert building.shape == embeddings.shape[:1]
        _, code, sizes = torch.unique(building, return_inverse=True, return_counts=True)
        order = torch.argsort(sizes[code] * len(sizes) + code, stable=True)
        x = torch.empty_like(embeddings)
        norms = torch.empty(len(x), 1, device=x.device)
        for lo in range(0, len(x), COPY_ROWS):
            part = slice(lo, lo + COPY_ROWS)
            torch.index_select(embeddings, 0, order[part], out=x[part])
            torch.linalg.vector_norm(x[part].float(), dim=1, keepdim=True, out=norms[part])
        if not torch.isfinite(norms).all():
            bad = order[~torch.isfinite(norms)[:, 0]].sort().values
            raise RunError(
                f"{len(bad)} of {len(x)} embeddings to compare hold NaN, infinity or values too "
                f"large for float32 (first rows: {bad[:3].tolist()})",
                hint="lower training.learning_rate if the head diverged; check the data if not",
            )
        sizes = sizes.sort().values
        singletons = int((sizes == 1).sum())
        if singletons == len(sizes):
            raise DataError(
                f"none of the {len(sizes)} buildings has two images: nothing to retrieve",
                hint="take more buildings into the sample, or another split",
            )
        return _Gallery(x, norms.clamp_min_(1e-12), order, sizes, singletons)

    def units(self, places: Tensor | slice, out: Tensor | None = None) -> Tensor:
        """Unit vectors in float32; widened as needed, so a float16 table is never held twice."""
        return torch.div(self.x[places].float(), self.norms[places], out=out)

    def queries(self, limit: int, seed: int) -> Tensor:
        """Places of the queries, ascending. A larger limit keeps the queries of a smaller one."""
        rows = self.order[self.singletons :].sort().values
        if 0 < limit < len(rows):
            # One number per row, whatever the device and the limit.
            lots = np.random.default_rng(seed).random(len(rows))
            drawn = np.argsort(lots, kind="stable")[:limit]
            rows = rows[torch.from_numpy(drawn).to(rows.device)]
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=self.order.device)
        return place[rows].sort().values

    def building_bounds(self, places: Tensor) -> Tensor:
        """First place of each query's building and the place after its last, int64 [2, Q]."""
        ends = self.sizes.cumsum(0)
        own = torch.searchsorted(ends, places, right=True)
        return torch.stack((ends[own] - self.sizes[own], ends[own]))


class _Counts:
    """Negatives at or above each positive's threshold, exact for as long as it matters.

    The nearest positive is counted to the end. Positive i (from 0) only matters to MAP@R and
    R-precision while its rank is within R, and ranks rise with i, so the ones that still matter
    are a prefix: most queries soon need one comparison per gallery row, and the negatives above
    the lowest threshold that matters number R plus what comes before the next `_prune`.
    """

    def __init__(self, positives: Tensor, relevant: Tensor) -> None:
        """`positives` [q, P] similarities, descending, then -inf; `relevant` [q] is R."""
        self.relevant = relevant
        self.matter = relevant.clone()
        self.width = positives.shape[1]
        stride = 2 ** (self.width - 1).bit_length()  # so that a binary search stays in its row
        self.thresholds = F.pad(positives - TIE, (0, stride - self.width), value=-torch.inf)
        # Negatives between threshold i and threshold i - 1.
        self.between = torch.zeros_like(self.thresholds, dtype=torch.int64)
        self.place = torch.arange(1, stride + 1, device=positives.device)
        self.fresh = 0
        self._prune()

    def add(self, similarity: Tensor, above: Tensor) -> None:
        """Count a tile of negatives [q, g]; `above` is room for its comparison."""
        torch.ge(similarity, self.lowest[:, None], out=above)
        counted = above.sum(1, dtype=torch.float32).long()  # exact: a tile has few rows
        several = self.matter > 1
        self.between[:, 0] += counted.masked_fill(several, 0)
        rows = (several & (counted > 0)).nonzero().squeeze(1)
        if len(rows):
            line, column = above.index_select(0, rows).nonzero(as_tuple=True)
            line = rows[line]
            self._sort_in(line, similarity[line, column])

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """First hit's rank, average precision at R and R-precision of each query."""
        rank, hit = self._ranks()
        precision = torch.where(hit, self.place[: self.width] / rank.double(), 0.0).sum(1)
        relevant = self.relevant.double()
        first = rank[:, 0].clone()  # a view would keep all the ranks
        return first, precision / relevant, hit.sum(1) / relevant

    def _sort_in(self, line: Tensor, value: Tensor) -> None:
        """Put each value, above the lowest threshold of its line, between its two thresholds."""
        stride = self.thresholds.shape[1]
        flat = self.thresholds.view(-1)
        at = line * stride
        for bit in reversed(range((self.width - 1).bit_length())):
            at.add_(flat[at + (2**bit - 1)] > value, alpha=2**bit)
        self.between.view(-1).index_add_(0, at, torch.ones_like(at))
        self.fresh += len(at)
        if 4 * self.fresh > len(self.between) * self.width:
            self._prune()

    def _prune(self) -> None:
        """Raise the lowest threshold of each query to that of its last positive that matters."""
        self.matter = self._ranks()[1].sum(1).clamp_min_(1)
        self.lowest = self.thresholds.gather(1, self.matter[:, None] - 1).squeeze(1)
        self.width = int(self.matter.max())
        self.fresh = 0

    def _ranks(self) -> tuple[Tensor, Tensor]:
        """Ranks so far, and which of them are within R."""
        place = self.place[: self.width]
        rank = self.between[:, : self.width].cumsum(1).add_(place)
        relevant = self.relevant[:, None]
        return rank, (place <= relevant) & (rank <= relevant)


def _query_tiles(sizes: Tensor, side: int) -> Iterator[tuple[int, int]]:
    """Cut queries with ascending building sizes so that [queries, size] stays within a tile."""
    lo = 0
    while lo < len(sizes):
        largest = int(sizes[min(lo + side, len(sizes)) - 1])
        hi = min(lo + max(1, min(side, side * side // largest)), len(sizes))
        yield lo, hi
        lo = hi


def _positives(gallery: _Gallery, places: Tensor, bounds: Tensor, room: int) -> Tensor:
    """Similarities of each query to the rest of its building, descending, then -inf: [q, P].

    One small product per building, so many at a time that it and its operands fit into `room`.
    """
    x = gallery.x
    starts, ends = bounds
    first, owner, queries = torch.unique_consecutive(
        starts, return_inverse=True, return_counts=True
    )
    offset = queries.cumsum(0) - queries
    slot = torch.arange(len(places), device=x.device) - offset[owner]
    width = int((ends - starts).max())
    height = int(queries.max())
    column = torch.arange(width, device=x.device)
    line = torch.arange(height, device=x.device)
    cuts = torch.cat((offset.cpu(), torch.tensor([len(places)]))).tolist()
    step = max(1, room // (width * max(height, x.shape[1])))
    found = torch.empty(len(places), width, device=x.device)
    for b in range(0, len(first), step):
        of_building = slice(b, b + step)
        asked = (offset[of_building, None] + line).clamp_(max=len(places) - 1)
        given = (first[of_building, None] + column).clamp_(max=len(x) - 1)
        block = torch.bmm(gallery.units(places[asked]), gallery.units(given).transpose(1, 2))
        here = slice(cuts[b], cuts[min(b + step, len(first))])
        found[here] = block[owner[here] - b, slot[here]]
    place = starts[:, None] + column
    found.masked_fill_((place >= ends[:, None]) | (place == places[:, None]), -torch.inf)
    return found.sort(dim=1, descending=True).values


def _scan(
    gallery: _Gallery, places: Tensor, starts: Tensor, ends: Tensor, counts: _Counts, width: int
) -> None:
    """Show all negatives of the queries at `places` to `counts`, one gallery tile at a time.

    `starts` and `ends` (on the CPU) are the bounds of the queries' buildings, ascending.
    """
    x = gallery.x
    queries = gallery.units(places)
    edges = _gallery_edges(len(x), width)
    # The queries whose building reaches into a tile are a range, as bounds ascend.
    own_from = torch.searchsorted(ends, torch.tensor(edges[:-1]), right=True).tolist()
    own_to = torch.searchsorted(starts, torch.tensor(edges[1:])).tolist()
    own_start, own_end = (bound[:, None].to(x.device) for bound in (starts, ends))
    column = torch.arange(len(x), device=x.device)
    width = min(width, len(x))
    units = queries.new_empty(width, x.shape[1])
    room = queries.new_empty(len(queries) * width)
    # Torch would copy bytes into int64 to sum them; on a GPU it sums float16 as it is.
    marks = torch.empty_like(room, dtype=torch.float32 if x.device.type == "cpu" else torch.float16)
    for (lo, hi), top, bottom in zip(pairwise(edges), own_from, own_to, strict=True):
        shape = (len(queries), hi - lo)
        similarity = room[: shape[0] * shape[1]].view(shape)
        torch.mm(queries, gallery.units(slice(lo, hi), units[: hi - lo]).T, out=similarity)
        if top < bottom:
            here, own = column[lo:hi], slice(top, bottom)
            similarity[own].masked_fill_(
                (here >= own_start[own]) & (here < own_end[own]), -torch.inf
            )
        counts.add(similarity, marks[: similarity.numel()].view(shape))


def _gallery_edges(rows: int, widest: int) -> list[int]:
    """Borders of the gallery tiles: narrow at first, while few thresholds can be ruled out."""
    edges = [0]
    width = min(NARROWEST, widest)
    while edges[-1] < rows:
        edges.append(min(edges[-1] + width, rows))
        width = min(edges[-1], widest)
    return edges
