"""The baseline: a per-item triplet trainer as it is usually written, with Dataset and DataLoader."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WARM_UP = 5  # steps before the clock starts: workers begin, caches fill


class Bandit:
    """UCB over bands. The sums are shared memory, so that workers see what the trainer learns."""

    def __init__(self, bands: int, exploration: float = 2.0) -> None:
        self.pulls = torch.zeros(bands, dtype=torch.float64).share_memory_()
        self.earned = torch.zeros(bands, dtype=torch.float64).share_memory_()
        self.exploration = exploration

    def choose(self, available: list[int]) -> int:
        pulls = self.pulls.numpy()
        earned = self.earned.numpy()
        spread = math.log(max(pulls.sum(), 1.0))
        scores = [
            earned[b] / pulls[b] + self.exploration * math.sqrt(spread / pulls[b])
            if pulls[b]
            else math.inf
            for b in available
        ]
        return available[int(np.argmax(scores))]

    def reward(self, band: int, value: float) -> None:
        self.pulls.numpy()[band] += 1
        self.earned.numpy()[band] += value


class Triplets(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """One (anchor, positive, negative, band) per image that has another one of its building."""

    def __init__(
        self,
        embeddings: np.ndarray,
        building: np.ndarray,
        neighbors: Sequence[Sequence[Sequence[int]]],
        bandit: Bandit,
    ) -> None:
        self.embeddings = embeddings
        self.building = building
        self.neighbors = neighbors
        self.bandit = bandit
        self.images = defaultdict(list)
        for row, code in enumerate(building.tolist()):
            self.images[code].append(row)
        self.anchors = [
            row for row, code in enumerate(building.tolist()) if len(self.images[code]) > 1
        ]
        self.rng: np.random.Generator | None = None

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        if self.rng is None:  # differs between workers
            self.rng = np.random.default_rng(torch.initial_seed())
        anchor = self.anchors[index]
        own = self.building[anchor]
        positive = anchor
        while positive == anchor:
            positive = self._any(self.images[own])
        bands = [b for b, found in enumerate(self.neighbors[anchor]) if len(found)]
        if bands:
            band = self.bandit.choose(bands)
            negative = self._any(self.images[self._any(self.neighbors[anchor][band])])
        else:
            band = -1
            negative = anchor
            while self.building[negative] == own:
                negative = int(self.rng.integers(len(self.building)))
        return self._row(anchor), self._row(positive), self._row(negative), band

    def _any(self, items: Sequence[int]) -> int:
        return items[self.rng.integers(len(items))]

    def _row(self, row: int) -> Tensor:
        return torch.from_numpy(self.embeddings[row].astype(np.float32))


def run(
    head: nn.Module,
    embeddings: np.ndarray,
    building: np.ndarray,
    neighbors_by_anchor_band: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    steps: int,
    workers: int,
) -> float:
    """Train `head` for `steps` after a warm-up; triplets per second over those steps.

    `embeddings` [N, D] is an array or memory map, `building` [N] codes, and
    `neighbors_by_anchor_band[row][band]` lists the buildings of a band.
    """
    bandit = Bandit(max((len(bands) for bands in neighbors_by_anchor_band), default=0))
    data = Triplets(embeddings, building, neighbors_by_anchor_band, bandit)
    loader = DataLoader(
        data,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    assert len(loader), "fewer anchors than a batch holds"
    triplet_loss = nn.TripletMarginLoss(margin=0.5, reduction="none")
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4)
    device = next(head.parameters()).device
    head.train()
    began = 0.0
    for step, (anchor, positive, negative, bands) in enumerate(
        itertools.islice(_forever(loader), WARM_UP + steps)
    ):
        if step == WARM_UP:
            began = time.perf_counter()
        losses = triplet_loss(
            head(anchor.to(device)), head(positive.to(device)), head(negative.to(device))
        )
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        for band, loss in zip(bands, losses, strict=True):
            if band.item() >= 0:
                bandit.reward(band.item(), loss.item())
    return steps * batch_size / (time.perf_counter() - began)


def _forever(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    while True:
        yield from loader
