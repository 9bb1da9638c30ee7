"""Triplets: who may be drawn, how often, and the same again on resume."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import make_bands, make_store
from tripletkit.config import Training
from tripletkit.errors import DataError
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit
from tripletkit.train.sampler import TripletIndex

CPU = torch.device("cpu")


@st.composite
def worlds(draw):
    """Buildings of random sizes in random row order, some rows left out; random neighbours."""
    sizes = [2, *draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))]
    rows = [b for b, size in enumerate(sizes) for _ in range(size)]
    rows += [-1] * draw(st.integers(0, 3))
    rows = draw(st.permutations(rows))
    bands = draw(st.integers(1, 3))
    cells = []
    for building in rows:
        others = [b for b in range(len(sizes)) if b != building] if building >= 0 else []
        band_of = [draw(st.integers(-1, bands - 1)) for _ in others]
        cells.append(
            [[o for o, b in zip(others, band_of, strict=True) if b == k] for k in range(bands)]
        )
    return rows, cells, bands


def draw_epoch(index: TripletIndex, sampler: str = "uniform", seed: int = 0):
    order = index.order(rng.key(seed, 1))
    bandit = Bandit(Training(negative_sampler=sampler), index.bands, CPU)
    return index.draw(order, torch.arange(len(order)), rng.key(seed, 2), bandit)


@settings(max_examples=150, deadline=None)
@given(worlds(), st.integers(0, 2**31), st.sampled_from(["ucb", "uniform", "random", "fixed:0"]))
def test_triplets_keep_the_rules(world, seed, sampler):
    building, cells, bands = world
    twins = {i for i, b in enumerate(building) if b >= 0 and building.count(b) >= 2}
    index = TripletIndex(make_store(building), make_bands(cells, bands), CPU)
    drawn = draw_epoch(index, sampler, seed)
    assert sorted(drawn.anchor.tolist()) == sorted(twins)  # each anchor once
    for anchor, positive, negative, arm in zip(*(t.tolist() for t in drawn), strict=True):
        assert building[positive] == building[anchor]
        assert positive != anchor
        assert building[negative] not in (building[anchor], -1)
        if arm < bands:
            assert building[negative] in cells[anchor][arm]


@settings(max_examples=50, deadline=None)
@given(worlds())
def test_owned_arms_are_the_bands_with_neighbours_and_always_the_random_one(world):
    building, cells, bands = world
    index = TripletIndex(make_store(building), make_bands(cells, bands), CPU)
    owned = index.owned(index.anchors).tolist()
    assert owned == [[*(bool(cell) for cell in cells[a]), True] for a in index.anchors.tolist()]


def repeated(index: TripletIndex, anchor: int, sampler: str, times: int):
    bandit = Bandit(Training(negative_sampler=sampler), index.bands, CPU)
    anchors = torch.full((times,), anchor)
    return index.draw(anchors, torch.arange(times), rng.key(5), bandit)


def shares(rows: torch.Tensor) -> dict[int, float]:
    return {row: n / len(rows) for row, n in Counter(rows.tolist()).items()}


WORLD = [0, 1, 0, 2, 1, 0, 2, 2, 2, 3]  # rows -> buildings


def test_positive_is_uniform_over_the_other_images():
    index = TripletIndex(make_store(WORLD), None, CPU)
    got = shares(repeated(index, 6, "random", 30_000).positive)
    assert got == pytest.approx({3: 1 / 3, 7: 1 / 3, 8: 1 / 3}, abs=0.012)


def test_band_negative_is_a_uniform_building_then_a_uniform_image():
    cells = [[[2, 3]] if b == 0 else [[]] for b in WORLD]
    index = TripletIndex(make_store(WORLD), make_bands(cells, 1), CPU)
    got = shares(repeated(index, 0, "fixed:0", 30_000).negative)
    assert got == pytest.approx({3: 1 / 8, 6: 1 / 8, 7: 1 / 8, 8: 1 / 8, 9: 1 / 2}, abs=0.012)


def test_random_negative_is_uniform_over_all_images_of_other_buildings():
    index = TripletIndex(make_store(WORLD), None, CPU)
    got = shares(repeated(index, 1, "random", 30_000).negative)
    assert got == pytest.approx(dict.fromkeys((0, 2, 3, 5, 6, 7, 8, 9), 1 / 8), abs=0.012)


def test_positive_negative_and_arm_are_drawn_independently():
    cells = [[[1, 2], [3]] for _ in WORLD]
    index = TripletIndex(make_store(WORLD), make_bands(cells, 2), CPU)
    drawn = repeated(index, 0, "uniform", 40_000)
    joint = Counter(zip(drawn.positive.tolist(), drawn.arm.tolist(), strict=True))
    assert len(joint) == 6
    assert all(abs(n / 40_000 - 1 / 6) < 0.01 for n in joint.values())


def test_orders_differ_between_epochs_and_every_order_is_possible():
    index = TripletIndex(make_store([0, 0, 1, 1]), None, CPU)
    orders = Counter(tuple(index.order(rng.key(0, epoch)).tolist()) for epoch in range(2400))
    assert len(orders) == 24
    assert max(orders.values()) < 160  # 100 expected


@settings(max_examples=30, deadline=None)
@given(worlds(), st.integers(1, 7))
def test_a_draw_depends_on_its_place_alone(world, batch):
    """Batches of any size, started anywhere, give the triplets of the whole epoch."""
    building, cells, bands = world
    index = TripletIndex(make_store(building), make_bands(cells, bands), CPU)
    whole = draw_epoch(index)
    order = index.order(rng.key(0, 1))
    bandit = Bandit(Training(negative_sampler="uniform"), bands, CPU)
    lanes = torch.arange(len(order))
    parts = [index.draw(order[part], part, rng.key(0, 2), bandit) for part in lanes.split(batch)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(column, torch.cat(pieces))


@pytest.mark.parametrize(
    ("building", "what"), [([0, 0, 0], "two buildings"), ([0, 1, 2], "no building has two images")]
)
def test_data_without_triplets_is_refused(building, what):
    with pytest.raises(DataError, match=what):
        TripletIndex(make_store(building), None, CPU)
