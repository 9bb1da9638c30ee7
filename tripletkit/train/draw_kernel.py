"""The draw of a batch as one GPU kernel, bit for bit what `TripletIndex.draw` gives.

The choice of arms takes 16 turns one after the other, and the draw some 250 kernels of two
microseconds: at small batches longer than all the learning. Here one thread block does it all.
Triton comes with CUDA builds of PyTorch; where it does not work, the many kernels do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tripletkit.train.bandit import LEAST, NEVER, TURNS, Bandit
from tripletkit.train.rng import FIRST, GOLDEN, SECOND
from tripletkit.train.sampler import ARM, COIN, IMAGE, NEIGHBOR, POSITIVE, TripletIndex

# Elements of a [lanes, arms] block that a warp works on at a time.
PER_WARP = 256


def draw(
    index: TripletIndex, order: Tensor, place: Tensor, key: Tensor, bandit: Bandit, size: int
) -> Tensor:
    """`size` triplets for the anchors of `order` from `place` on; int64 [4, size], as Triplets.

    `place` and `key` are int64 scalars on the device. For a bandit with the policy "ucb" only.
    """
    drawn = torch.empty(4, size, dtype=torch.int64, device=order.device)
    chunk = -(-size // TURNS)
    lanes, arms = triton.next_power_of_2(chunk), triton.next_power_of_2(bandit.arms)
    _draw[(1,)](
        drawn, order, place, key,
        index.offsets, index.building, index.by_building, index.starts, index.slot, index.neighbors,
        bandit.means(), bandit.bonus(), bandit.pulls + bandit.in_flight, bandit.seen,
        bandit.floor, bandit.warmup, size, chunk, len(index.by_building), len(index.neighbors),
        bandit.bands, lanes, arms, POSITIVE, COIN, ARM, NEIGHBOR, IMAGE, NEVER, LEAST,
        num_warps=min(16, max(1, lanes * arms // PER_WARP)),
    )  # fmt: skip
    return drawn


_GOLDEN, _FIRST, _SECOND = (tl.constexpr(number) for number in (GOLDEN, FIRST, SECOND))


@triton.jit
def _bits(key, counter):
    """`rng.bits`."""
    z = counter * _GOLDEN + key
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _below(random, bound):
    """`rng.below`."""
    return (((random >> 32) & 0xFFFFFFFF) * bound) >> 32


@triton.jit
def _uniform(key, counter, owned, floor, arm_stream, coin_stream):
    """One of the owned arms, all with the same chance, and whether it is the choice."""
    rank = tl.cumsum(owned.to(tl.int32), 1)
    wanted = _below(_bits(key, counter + (arm_stream << 40)), tl.sum(owned.to(tl.int64), 1))
    arm = tl.sum((rank <= wanted[:, None]).to(tl.int32), 1)
    coin = ((_bits(key, counter + (coin_stream << 40)) >> 40) & 0xFFFFFF).to(tl.float32)
    return arm, coin * 5.9604644775390625e-08 < floor  # 2**-24


@triton.jit
def _owned(offsets, anchor, here, arms, BANDS: tl.constexpr):
    """`TripletIndex.owned`."""
    edge = offsets + anchor[:, None] * BANDS + arms[None, :]
    inside = here[:, None] & (arms < BANDS)[None, :]
    some = tl.load(edge + 1, mask=inside, other=0) > tl.load(edge, mask=inside, other=0)
    return some | (arms == BANDS)[None, :]


@triton.jit(do_not_specialize=["warmup", "size", "chunk", "images", "places"])
def _draw(  # noqa: PLR0913
    drawn, order, place, key,
    offsets, building, by_building, starts, slot, neighbors,
    means, bonus, pulls, seen,
    floor, warmup, size, chunk, images, places,
    BANDS: tl.constexpr, LANES: tl.constexpr, ARMS: tl.constexpr,
    POSITIVE: tl.constexpr, COIN: tl.constexpr, ARM: tl.constexpr, NEIGHBOR: tl.constexpr,
    IMAGE: tl.constexpr, NEVER: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    arms = tl.arange(0, ARMS)
    first_place = tl.load(place)
    key = tl.load(key)
    floor = tl.where(tl.load(seen) < warmup, 2.0, floor)  # above every coin
    mean = tl.load(means + arms, mask=arms <= BANDS, other=0.0)
    bonus = tl.maximum(tl.load(bonus), LEAST)
    virtual = tl.load(pulls + arms, mask=arms <= BANDS, other=0.0)

    # Uniform choices of the whole batch count from the first turn on.
    explored = tl.zeros([ARMS], dtype=tl.int32)
    for begin in range(0, size, chunk):
        here = (lane < chunk) & (begin + lane < size)
        counter = first_place + begin + lane
        anchor = tl.load(order + counter, mask=here, other=0)
        owned = _owned(offsets, anchor, here, arms, BANDS)
        arm, explores = _uniform(key, counter, owned, floor, ARM, COIN)
        counts = (arm[:, None] == arms[None, :]) & (explores & here)[:, None]
        explored += tl.sum(counts.to(tl.int32), 0)

    virtual = tl.maximum(virtual + explored.to(tl.float64), NEVER)
    for begin in range(0, size, chunk):
        here = (lane < chunk) & (begin + lane < size)
        counter = first_place + begin + lane
        anchor = tl.load(order + counter, mask=here, other=0)
        owned = _owned(offsets, anchor, here, arms, BANDS)
        arm, explores = _uniform(key, counter, owned, floor, ARM, COIN)
        score = mean + bonus / tl.sqrt(virtual)
        best = tl.argmax(tl.where(owned, score[None, :], float("-inf")), 1)
        counts = (best[:, None] == arms[None, :]) & (here & (explores == 0))[:, None]
        virtual += tl.sum(counts.to(tl.int32), 0).to(tl.float64)
        arm = tl.where(explores, arm, best).to(tl.int64)

        home = tl.load(building + anchor, mask=here, other=0).to(tl.int64)
        start = tl.load(starts + home, mask=here, other=0)
        count = tl.load(starts + home + 1, mask=here, other=2) - start
        twin = _below(_bits(key, counter + (POSITIVE << 40)), count - 1)
        twin += (twin >= tl.load(slot + anchor, mask=here, other=0)).to(tl.int64)
        positive = tl.load(by_building + start + twin, mask=here, other=0)

        random = _bits(key, counter + (NEIGHBOR << 40))
        anywhere = _below(random, images - count)
        anywhere += tl.where(anywhere >= start, count, 0)
        cell = offsets + anchor * BANDS + tl.minimum(arm, BANDS - 1)
        first = tl.load(cell, mask=here, other=0)
        spot = first + _below(random, tl.load(cell + 1, mask=here, other=0) - first)
        spot = tl.minimum(spot, places - 1)
        away = tl.load(neighbors + spot, mask=here, other=0).to(tl.int64)
        start = tl.load(starts + away, mask=here, other=0)
        count = tl.load(starts + away + 1, mask=here, other=0) - start
        near = start + _below(_bits(key, counter + (IMAGE << 40)), count)
        negative = tl.load(by_building + tl.where(arm == BANDS, anywhere, near), mask=here, other=0)

        out = drawn + begin + lane
        tl.store(out, anchor, mask=here)
        tl.store(out + size, positive, mask=here)
        tl.store(out + 2 * size, negative, mask=here)
        tl.store(out + 3 * size, arm, mask=here)
