"""Counter-based draws against an independent SplitMix64, and their distribution."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tripletkit.train import rng

GOLDEN = 0x9E3779B97F4A7C15
int64 = st.integers(-(2**63), 2**63 - 1)


def splitmix64(z: int) -> int:
    """The reference output function, in Python's unbounded integers."""
    mask = 2**64 - 1
    z &= mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def test_first_outputs_are_those_of_the_published_generator():
    """SplitMix64 seeded with 1234567, as listed by its test vectors."""
    first = rng.bits(1234567, torch.arange(1, 4))
    assert [int(x) % 2**64 for x in first] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423
    ]  # fmt: skip


@given(int64, st.integers(0, 2**50))
def test_bits_equal_the_reference(key, counter):
    assert int(rng.bits(key, torch.tensor(counter))) % 2**64 == splitmix64(key + counter * GOLDEN)


@given(int64, st.integers(1, 2**31 - 1))
def test_below_equals_the_exact_product(key, bound):
    random = rng.bits(key, torch.arange(50))
    expected = [(int(x) % 2**64 >> 32) * bound >> 32 for x in random]
    assert rng.below(random, bound).tolist() == expected
    assert all(0 <= x < bound for x in expected)


def test_draws_are_uniform():
    random = rng.bits(rng.key(1, 2), torch.arange(70_000))
    counts = torch.bincount(rng.below(random, 7), minlength=7).numpy()
    chi2 = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi2 < 22.5  # 99.9 % of chi2 with 6 degrees of freedom
    unit = rng.unit(random).numpy()
    assert unit.min() >= 0
    assert unit.max() < 1
    assert abs(np.sort(unit) - (np.arange(70_000) + 0.5) / 70_000).max() < 0.0075  # KS, 99.9 %


def test_keys_differ_in_value_and_order():
    keys = {rng.key(*parts) for parts in [(0,), (0, 0), (1, 0), (0, 1), (1,), (2,)]}
    assert len(keys) == 6
