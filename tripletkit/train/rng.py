"""Counter-based random draws: each one is a pure function of (key, counter), on any device.

The generator is SplitMix64's output function (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) in wrapping int64 arithmetic. Nothing is stored, so
resuming needs no replay and a CUDA graph needs no registered generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a key derived from the seed is for; the first part after the seed.
ORDER, DRAW, DROPOUT, VALIDATION, INIT = range(5)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return (value & (2**64 - 1)) - (value >> 63 & 1) * 2**64


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST = _signed(0xBF58476D1CE4E5B9)
SECOND = _signed(0x94D049BB133111EB)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical right shift; int64's own is arithmetic."""
    shifted: Tensor = (z >> by) & (2 ** (64 - by) - 1)
    return shifted


def bits(key: Tensor | int, counter: Tensor) -> Tensor:
    """64 random bits for each int64 `counter` under `key`, as int64; the two broadcast."""
    z = counter * GOLDEN + key
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def key(*parts: int) -> int:
    """A 64-bit key (as a signed integer) from small non-negative integers, whose order counts."""
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        state = bits(state, torch.tensor(part + 1, dtype=torch.int64))
    return int(state)


def below(random: Tensor, bound: Tensor | int) -> Tensor:
    """Integers in [0, bound) from random bits; `bound` < 2**31, bias under bound / 2**32."""
    return (_shifted(random, 32) * bound) >> 32


def unit(random: Tensor) -> Tensor:
    """float32 in [0, 1) from random bits."""
    return _shifted(random, 40).to(torch.float32) * 2.0**-24
