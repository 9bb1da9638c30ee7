"""Which difficulty band each negative comes from: a UCB bandit over bands, batch by batch.

Arms 0..K-1 are the difficulty bands (0 the hardest), arm K is a random negative. An anchor can
play only the arms that it owns: the bands in which it has neighbours, and always arm K.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tripletkit.config import Training
from tripletkit.train import rng

# A batch's anchors choose in so many turns, one after the other. More come nearer to choosing one by
# one: with 16, one anchor in fifty chooses otherwise. Each turn costs a GPU half a dozen kernels.
TURNS = 16
# For an arm that was never pulled: a bonus beyond all others, without infinities.
NEVER, LEAST = 1e-200, 1e-50


class Bandit:
    """Counts and rewards per arm, and the choice that follows from them.

    UCB1 (Auer, Cesa-Bianchi and Fischer 2002): mean + c * sqrt(ln n / n_arm). A batch is many
    pulls at once, so while it is allocated the means stay and the counts grow as if the pulls had
    been answered by the mean (hallucinated feedback: Desautels, Krause and Burdick, JMLR 2014);
    else a whole batch would fall on one arm. With `ucb_discount` < 1 the sums forget geometrically
    (discounted UCB: Garivier and Moulines 2011). All state lives on the device.
    """

    _STATE = ("pulls", "earned", "seen", "in_flight")

    def __init__(self, section: Training, bands: int, device: torch.device) -> None:
        self.policy, _, fixed = section.negative_sampler.partition(":")
        self.fixed = int(fixed or 0)
        self.bands = bands
        self.arms = bands + 1
        self.exploration = section.ucb_exploration_constant
        self.warmup = section.ucb_warmup_samples
        self.discount = section.ucb_discount
        self.floor = section.ucb_floor
        self.pulls = torch.zeros(self.arms, dtype=torch.float64, device=device)
        self.earned = torch.zeros(self.arms, dtype=torch.float64, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        # Pulls that are drawn but not answered yet: they count in the bonus, never in the mean.
        self.in_flight = torch.zeros_like(self.pulls)

    def choose(self, owned: Tensor, random: Tensor, coin: Tensor) -> Tensor:
        """Arms, int64 [B], for anchors that own `owned`, bool [B, arms].

        `random` and `coin` are int64 [B] random bits: which arm in a uniform choice, and whether
        a bandit's choice is a uniform one (`ucb_floor`).
        """
        if self.policy == "random" or self.bands == 0:
            return torch.full_like(random, self.bands)
        if self.policy == "fixed":
            return torch.where(owned[:, self.fixed], self.fixed, self.bands)
        uniform = _uniform(owned, random)
        if self.policy == "uniform":
            return uniform
        explores = (rng.unit(coin) < self.floor) | (self.seen < self.warmup)
        virtual = self.pulls + self.in_flight
        virtual += sum_per_arm(uniform, explores[:, None], self.arms)[:, 0]
        greedy = allocate(
            self.means(),
            virtual,
            owned,
            bonus=self.bonus(),
            counted=~explores,
            chunk=-(-len(owned) // TURNS),
        )
        return torch.where(explores, uniform, greedy)

    def update(self, pulls: Tensor, earned: Tensor) -> None:
        """Credit one step's pulls and summed rewards per arm, both float64 [arms]."""
        self.pulls.mul_(self.discount).add_(pulls)
        self.earned.mul_(self.discount).add_(earned)
        self.seen.add_(pulls.sum().to(torch.int64))

    def means(self) -> Tensor:
        """Mean reward per arm, float64; 0 where nothing was earned yet."""
        return self.earned / self.pulls.clamp(min=torch.finfo(torch.float64).tiny)

    def bonus(self) -> Tensor:
        """c * sqrt(ln n), the numerator of the exploration bonus; 0-dim float64."""
        return self.exploration * self.pulls.sum().clamp(min=1).log().sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that an exact resume needs."""
        return {name: getattr(self, name).cpu().clone() for name in self._STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore in place, so that captured graphs keep their addresses."""
        for name in self._STATE:
            getattr(self, name).copy_(state[name])


def allocate(
    means: Tensor, pulls: Tensor, owned: Tensor, *, bonus: Tensor, counted: Tensor, chunk: int
) -> Tensor:
    """Give each anchor the owned arm with the largest mean + bonus / sqrt(pulls); int64 [B].

    Anchors come in chunks; the pulls of a chunk count for the next one, save those of anchors
    that are not `counted`, bool [B]. With `chunk` 1 this is the greedy allocation, pull by pull.
    """
    bonus = bonus.clamp(min=LEAST)
    pulls = pulls.clamp(min=NEVER)
    barred = torch.where(owned, 0.0, -math.inf).to(pulls.dtype)
    weight = counted.to(pulls.dtype)
    one_hot = torch.eye(len(means), dtype=pulls.dtype, device=means.device)
    chosen = []
    for part, count in zip(barred.split(chunk), weight.split(chunk), strict=True):
        index = torch.addcdiv(means, bonus, pulls.sqrt())
        arms = (part + index).argmax(1)
        pulls = torch.addmv(pulls, one_hot[arms].T, count)
        chosen.append(arms)
    return torch.cat(chosen)


def sum_per_arm(arm: Tensor, columns: Tensor, arms: int) -> Tensor:
    """Sums of `columns` [B, m] over the pulls of each arm, float64 [arms, m]; no atomics."""
    hits = (arm[:, None] == torch.arange(arms, device=arm.device)).to(torch.float64)
    return hits.T @ columns.to(torch.float64)


def _uniform(owned: Tensor, random: Tensor) -> Tensor:
    """One of the owned arms of each anchor, all with the same chance."""
    rank = owned.cumsum(1)
    wanted = rng.below(random, rank[:, -1])
    return (rank > wanted[:, None]).to(torch.int8).argmax(1)
