"""The order of the faults: a function of the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# From what costs a few seconds to what Slurm needs half a minute to notice.
CHEAP = (
    "kill", "torn", "requeue", "preempt", "limit", "cancel", "freeze", "slurmd", "controller",
    "database", "disk",
)  # fmt: skip
KINDS = (*CHEAP, "power", "cut off")


@dataclass(frozen=True)
class Fault:
    """What happens next."""

    kind: str
    pick: float  # of those that it can happen to, by their order: in [0, 1)
    seconds: float  # how long it lasts, at least
    pause: float  # seconds before it

    def __str__(self) -> str:
        return f"{self.kind}, {self.seconds:.1f} s, {self.pause:.1f} s later, pick {self.pick:.3f}"


def faults(seed: int, kinds: Sequence[str] = KINDS) -> Iterator[Fault]:
    """Without an end; each kind once in every round, so that none is left out."""
    source = random.Random(seed)
    while True:
        for kind in source.sample(kinds, len(kinds)):
            yield Fault(kind, source.random(), source.uniform(1, 8), source.uniform(0.5, 4))
