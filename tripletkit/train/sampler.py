"""Triplets as row numbers, drawn on the trainer's device without a Python step per sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit.data.bands import Bands
from tripletkit.data.store import Store
from tripletkit.device import as_tensor
from tripletkit.errors import DataError
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit

# One stream of random bits for each decision.
POSITIVE, COIN, ARM, NEIGHBOR, IMAGE = range(5)
STREAMS = 5

SAMPLE = "check the file, and the sample_* and val_sample_* keys"


class Triplets(NamedTuple):
    """One batch: row numbers and the arm that each negative came from, int64 [B] each."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    arm: Tensor


class TripletIndex:
    """Who can be whose positive and negative, as flat arrays on the device.

    Rows are grouped by building (`by_building`, `starts`); the neighbours of row i in band b are
    `neighbors[offsets[i * bands + b] : offsets[i * bands + b + 1]]`.
    """

    def __init__(self, store: Store, bands: Bands | None, device: torch.device) -> None:
        sizes = np.diff(store.starts)
        if np.count_nonzero(sizes) < 2:
            raise DataError(f"{store.source}: triplets need two buildings or more", hint=SAMPLE)
        if sizes.max() < 2:
            raise DataError(
                f"{store.source}: no building has two images, so nothing is positive", hint=SAMPLE
            )
        self.bands = bands.count if bands else 0
        # Rows left out by subsampling keep slot 0; nothing ever points at them.
        slot = np.zeros(len(store.building), dtype=np.int32)
        slot[store.by_building] = np.arange(len(store.by_building)) - np.repeat(
            store.starts[:-1], sizes
        )
        twins = np.where(store.building >= 0, sizes[store.building], 0) >= 2

        def put(array: NDArray[Any]) -> Tensor:
            return as_tensor(array).to(device)

        self.anchors = put(np.flatnonzero(twins))
        self.building = put(store.building)
        self.by_building = put(store.by_building)
        self.starts = put(store.starts)
        self.slot = put(slot)
        some = bands is not None and len(bands.neighbors) > 0
        self.neighbors = put(bands.neighbors) if bands and some else self.slot[:1]
        self.offsets = put(bands.offsets) if bands else self.starts[:1]
        self._steps = torch.arange(self.bands + 1, device=device)
        self._streams = torch.arange(STREAMS, device=device)[:, None] << 40

    def order(self, key: int) -> Tensor:
        """The anchors of one epoch, each once, in the random order that `key` gives; int64 [A]."""
        # The generator is a bijection for one key, so no two anchors tie.
        counter = torch.arange(len(self.anchors), device=self.anchors.device)
        return self.anchors[rng.bits(key, counter).argsort()]

    def draw(self, anchor: Tensor, counter: Tensor, key: Tensor | int, bandit: Bandit) -> Triplets:
        """A triplet for each anchor [B]. `counter` [B] is its place in the epoch, below 2**40."""
        random = rng.bits(key, counter + self._streams)
        arm = bandit.choose(self.owned(anchor), random[ARM], random[COIN])
        positive = self.positive(anchor, random[POSITIVE])
        negative = self.negative(anchor, arm, random[NEIGHBOR], random[IMAGE])
        return Triplets(anchor, positive, negative, arm)

    def owned(self, anchor: Tensor) -> Tensor:
        """Which arms each anchor can play, bool [B, bands + 1]; the last, random, always."""
        edges = self.offsets[anchor[:, None] * self.bands + self._steps]
        always = torch.ones_like(anchor, dtype=torch.bool)[:, None]
        return torch.cat([edges[:, 1:] > edges[:, :-1], always], 1)

    def positive(self, anchor: Tensor, random: Tensor) -> Tensor:
        """Another image of the anchor's building, uniformly."""
        start, size = self._range(self.building[anchor])
        place = rng.below(random, size - 1)
        place = place + (place >= self.slot[anchor])  # step over the anchor itself
        return self.by_building[start + place]

    def negative(self, anchor: Tensor, arm: Tensor, random: Tensor, again: Tensor) -> Tensor:
        """An image of another building: from the band `arm`, or any for the last arm.

        In a band: a neighbour building uniformly, then one of its images uniformly. The random
        arm draws uniformly over all images outside the anchor's building.
        """
        start, size = self._range(self.building[anchor])
        anywhere = rng.below(random, len(self.by_building) - size)
        anywhere = anywhere + torch.where(anywhere >= start, size, 0)  # step over the building
        if self.bands == 0:
            return self.by_building[anywhere]
        cell = anchor * self.bands + arm.clamp(max=self.bands - 1)
        first = self.offsets[cell]
        # An anchor that plays the last arm may have an empty cell, at the very end even.
        place = first + rng.below(random, self.offsets[cell + 1] - first)
        start, size = self._range(self.neighbors[place.clamp(max=len(self.neighbors) - 1)])
        near = start + rng.below(again, size)
        return self.by_building[torch.where(arm == self.bands, anywhere, near)]

    def _range(self, building: Tensor) -> tuple[Tensor, Tensor]:
        """First place in `by_building` and number of images of each building; int64 [B]."""
        building = building.long()
        start = self.starts[building]
        return start, self.starts[building + 1] - start
