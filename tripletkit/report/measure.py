"""What a report shows of a split's embeddings, raw and trained: measured on samples, streaming.

Only the head's output is kept whole, and no more than OUTPUT_BYTES of it: of a larger split a
sample of buildings is looked at. The raw table is read in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit.apply import confusion
from tripletkit.apply.confusion import Pair, Weak
from tripletkit.data.store import Store, subsample
from tripletkit.device import as_tensor, choose_device, choose_precision, full_precision
from tripletkit.report.maps import Points
from tripletkit.train.evaluation import project
from tripletkit.train.head import Head
from tripletkit.train.retrieval import TIE, retrieve

OUTPUT_BYTES = 2**30
# Queries: as many as make PAIRS with the gallery, but never less than FEWEST, which give a share
# to within one per cent, nor more than MOST.
PAIRS, FEWEST, MOST = 1.2e9, 2_000, 20_000
BLOCK_BYTES = 32 * 2**20  # of gathered rows, in float32
PAIRS_DRAWN = 20_000  # for the histograms of distances
LISTED = 40  # confused pairs, and weakest buildings

# Row numbers of the store [n] -> unit vectors, float32 [n, d].
Units = Callable[[NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Space:
    """How one kind of embeddings treats the same queries; distances are between unit vectors."""

    first_hit_rank: NDArray[np.int64]  # [Q], from 1
    nearest_negative: NDArray[np.float32]  # [Q] distance
    positive: NDArray[np.float32]  # [P] of random pairs of one building
    negative: NDArray[np.float32]  # [P] of random pairs of two buildings


@dataclass(frozen=True)
class Look:
    """All that a report shows of a split."""

    images: int
    buildings: int
    left_out: int  # buildings of the split that are not in the sample
    queries: int
    could_ask: int  # images that could have been queries
    spaces: Mapping[str, Space]  # "raw", "trained"
    points: Points
    pairs: list[Pair]  # of the trained embeddings
    weak: list[Weak]


@torch.no_grad()
def look(
    store: Store, head: Head, *, seed: int, device: str = "auto", precision: str = "auto"
) -> Look:
    """Measure a split. The same input gives the same samples, on any device."""
    where = choose_device(device)
    kind = choose_precision(precision, where)
    head = head.to(where)
    everything = int(np.count_nonzero(np.diff(store.starts)))
    store = _bounded(store, head.output_layer.out_features, seed)
    rows = np.sort(store.by_building)
    table = as_tensor(store.embeddings)
    codes = store.building[rows].astype(np.int64)

    output = project(head, table, as_tensor(rows), kind)
    building = as_tensor(codes).to(where)
    limit = int(min(max(PAIRS / len(rows), FEWEST), MOST))
    retrieval = retrieve(output, building, max_queries=limit, seed=seed)
    missed = confusion.mistakes(output, building, retrieval)

    def raw(places: NDArray[np.int64]) -> Tensor:
        x = torch.index_select(table, 0, as_tensor(rows[places])).to(where).float()
        return torch.nn.functional.normalize(x, dim=1, eps=1e-12)

    def trained(places: NDArray[np.int64]) -> Tensor:
        x = output[as_tensor(places).to(where)].float()
        return torch.nn.functional.normalize(x, dim=1, eps=1e-12)

    queries = retrieval.query_rows.numpy()
    pairs = _draw_pairs(codes, queries, seed)
    with full_precision(where):
        spaces = {
            name: _space(units, width, codes, queries, pairs)
            for name, units, width in (
                ("raw", raw, table.shape[1]),
                ("trained", trained, output.shape[1]),
            )
        }
        points = Points.choose(store, rows, codes, seed)
        places = points.places
        points = replace(
            points, raw=raw(places).cpu().numpy(), trained=trained(places).cpu().numpy()
        )
    sizes = np.diff(store.starts)
    return Look(
        images=len(rows),
        buildings=int(np.count_nonzero(sizes)),
        left_out=everything - int(np.count_nonzero(sizes)),
        queries=len(queries),
        could_ask=int(sizes[sizes > 1].sum()),
        spaces=spaces,
        points=points,
        pairs=confusion.confused_pairs(store, rows, output, LISTED, found=missed),
        weak=confusion.weakest(store, rows, output, retrieval, LISTED, found=missed),
    )


def _bounded(store: Store, width: int, seed: int) -> Store:
    """The store, or a sample of its buildings whose output fits into OUTPUT_BYTES."""
    share = OUTPUT_BYTES / (4 * width * len(store.by_building))
    return subsample(store, fraction=share, seed=seed) if share < 1 else store


def _space(
    units: Units,
    width: int,
    codes: NDArray[np.int64],
    queries: NDArray[np.int64],
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
) -> Space:
    rank, nearest = ranks(units, width, codes, queries)
    anchor, positive, negative = pairs
    step = _rows(width)

    def apart(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float32]:
        found = [
            (units(one[lo : lo + step]) - units(other[lo : lo + step])).norm(dim=1).cpu()
            for lo in range(0, len(one), step)
        ]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    return Space(
        first_hit_rank=rank,
        nearest_negative=np.sqrt(np.maximum(2 - 2 * nearest, 0)),
        positive=apart(anchor, positive),
        negative=apart(anchor, negative),
    )


def ranks(
    units: Units, width: int, codes: NDArray[np.int64], queries: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rank of the first hit of each query, as `retrieve` has it, and its nearest negative's cosine.

    Blocks of the gallery pass by twice: the images of the queries' buildings to find the nearest
    positive, then all of them to count the negatives that are as near.
    """
    step = _rows(width)
    rank, nearest = [], []
    own = np.flatnonzero(np.isin(codes, codes[queries]))
    for part in (queries[lo : lo + step] for lo in range(0, len(queries), step)):
        x = units(part)
        code = torch.from_numpy(codes[part]).to(x.device)[:, None]
        place = torch.from_numpy(part).to(x.device)[:, None]
        positive = torch.full((len(part),), -torch.inf, device=x.device)
        for block in _blocks(own, step):
            here = torch.from_numpy(block).to(x.device)
            other = torch.from_numpy(codes[block]).to(x.device) != code
            similarity = (x @ units(block).T).masked_fill_(other | (here == place), -torch.inf)
            positive = torch.maximum(positive, similarity.amax(1))
        count = torch.ones(len(part), dtype=torch.int64, device=x.device)
        negative = torch.full_like(positive, -torch.inf)
        for block in _blocks(np.arange(len(codes)), step):
            same = torch.from_numpy(codes[block]).to(x.device) == code
            similarity = (x @ units(block).T).masked_fill_(same, -torch.inf)
            count += (similarity >= positive[:, None] - TIE).sum(1)
            negative = torch.maximum(negative, similarity.amax(1))
        rank.append(count.cpu().numpy())
        nearest.append(negative.cpu().numpy())
    return np.concatenate(rank), np.concatenate(nearest)


def _draw_pairs(
    codes: NDArray[np.int64], queries: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Anchors among the queries, another image of the building of each, and one of another."""
    random = np.random.default_rng([seed, 1])
    anchor = random.choice(queries, PAIRS_DRAWN) if len(queries) else queries
    grouped = np.argsort(codes, kind="stable")
    place = np.empty_like(grouped)
    place[grouped] = np.arange(len(grouped))
    first = np.searchsorted(codes[grouped], codes[anchor])
    size = np.searchsorted(codes[grouped], codes[anchor], side="right") - first
    shift = random.integers(1, size)  # round the building, past the anchor itself
    positive = grouped[first + (place[anchor] - first + shift) % size]
    # Any place outside the building's own, which is one stretch.
    other = len(codes) - size
    if not other.all():  # a single building
        return anchor, positive, anchor[:0]
    skip = random.integers(0, other)
    negative = grouped[np.where(skip < first, skip, skip + size)]
    return anchor, positive, negative


def _rows(width: int) -> int:
    """How many rows of `width` numbers make a block; their products are no larger."""
    return int(max(64, min(BLOCK_BYTES // (4 * width), 2048)))


def _blocks(rows: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
    return [rows[lo : lo + step] for lo in range(0, len(rows), step)]
