"""The bandit: allocation against a step-by-step reference, statistics against a slow one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tripletkit.config import Training
from tripletkit.train import rng
from tripletkit.train.bandit import TURNS, Bandit, allocate, sum_per_arm

CPU = torch.device("cpu")


def make(bands: int, **keys) -> Bandit:
    return Bandit(Training(**keys), bands, CPU)


def draws(n: int, key: int = 0):
    random = rng.bits(key, torch.arange(2 * n))
    return random[:n], random[n:]


def greedy(means, pulls, owned, bonus) -> list[int]:
    """One pull at a time: the owned arm with the largest index, counting pulls as we go."""
    pulls = list(pulls)
    chosen = []
    for mask in owned:
        index = [
            (means[a] + bonus / math.sqrt(pulls[a]) if pulls[a] else math.inf) if mask[a] else -1e9
            for a in range(len(means))
        ]
        best = max(range(len(index)), key=index.__getitem__)
        pulls[best] += 1
        chosen.append(best)
    return chosen


problems = st.integers(1, 9).flatmap(
    lambda arms: st.tuples(
        st.lists(st.floats(0, 1), min_size=arms, max_size=arms),
        st.lists(st.integers(0, 500), min_size=arms, max_size=arms),
        st.lists(
            st.lists(st.booleans(), min_size=arms - 1, max_size=arms - 1), min_size=1, max_size=60
        ),
        st.floats(0.01, 10),
    )
)


@given(problems)
def test_allocation_with_chunks_of_one_is_the_greedy_one(problem):
    means, pulls, masks, bonus = problem
    owned = [[*mask, True] for mask in masks]
    chosen = allocate(
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(pulls, dtype=torch.float64),
        torch.tensor(owned),
        bonus=torch.tensor(bonus, dtype=torch.float64),
        counted=torch.ones(len(owned), dtype=torch.bool),
        chunk=1,
    )
    assert chosen.tolist() == greedy(means, pulls, owned, bonus)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([256, 1024, 4096]))
def test_allocation_in_chunks_stays_near_the_greedy_one(seed, batch):
    random = np.random.default_rng(seed)
    means, pulls = random.uniform(size=8), random.integers(100, 5000, size=8).astype(float)
    owned = random.uniform(size=(batch, 8)) < random.uniform(0.3, 1, size=8)
    owned[:, -1] = True
    chosen = allocate(
        torch.tensor(means), torch.tensor(pulls), torch.tensor(owned),
        bonus=torch.tensor(2.0), counted=torch.ones(batch, dtype=torch.bool),
        chunk=-(-batch // TURNS),
    )  # fmt: skip
    ours = np.bincount(chosen, minlength=8)
    reference = np.bincount(greedy(means, pulls, owned, 2.0), minlength=8)
    assert abs(ours - reference).max() <= batch / TURNS


def test_one_batch_does_not_all_land_on_the_best_arm():
    """With batches answered late, plain argmax would put every pull on one arm."""
    bandit = make(3, ucb_warmup_samples=0)
    bandit.update(torch.full((4,), 50.0), torch.tensor([30.0, 28.0, 26.0, 24.0]))
    chosen = bandit.choose(torch.ones(512, 4, dtype=torch.bool), *draws(512))
    counts = np.bincount(chosen, minlength=4)
    means, bonus = [0.6, 0.56, 0.52, 0.48], 2 * math.sqrt(math.log(200))
    reference = np.bincount(greedy(means, [50] * 4, np.ones((512, 4), bool), bonus), minlength=4)
    assert abs(counts - reference).max() <= 512 / TURNS
    assert counts[0] > counts[3] > 0


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["ucb", "uniform", "random", "fixed:1"]),
    st.integers(0, 2**31),
    st.sampled_from([0, 10**6]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_choice_is_an_arm_the_anchor_owns(sampler, seed, warmup, floor):
    bandit = make(4, negative_sampler=sampler, ucb_warmup_samples=warmup, ucb_floor=floor)
    bandit.update(torch.arange(5.0), torch.arange(5.0) / 2)
    owned = rng.bits(seed, torch.arange(100 * 5)).view(100, 5) % 3 == 0
    owned[:, -1] = True
    chosen = bandit.choose(owned, *draws(100, seed))
    assert owned.gather(1, chosen[:, None]).all()


def test_fixed_band_falls_back_to_random_where_the_anchor_has_none():
    owned = torch.tensor([[True, True, True], [True, False, True]])
    assert make(2, negative_sampler="fixed:1").choose(owned, *draws(2)).tolist() == [1, 2]


def test_random_sampler_always_plays_the_last_arm():
    owned = torch.ones(9, 4, dtype=torch.bool)
    assert make(3, negative_sampler="random").choose(owned, *draws(9)).tolist() == [3] * 9


@pytest.mark.parametrize(
    "keys",
    [
        {"negative_sampler": "uniform"},
        {"ucb_warmup_samples": 10**9},
        {"ucb_floor": 1.0, "ucb_warmup_samples": 0},
    ],
)
def test_uniform_choices_are_uniform_over_the_owned_arms(keys):
    owned = torch.tensor([[True, False, True, True]]).expand(30_000, 4)
    bandit = make(3, **keys)
    bandit.update(torch.full((4,), 9.0), torch.tensor([9.0, 0, 0, 0]))
    counts = torch.bincount(bandit.choose(owned, *draws(30_000)), minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] - 10_000).abs().max() < 330  # 4 standard deviations


def test_floor_spreads_its_share_and_leaves_the_rest_to_the_bandit():
    bandit = make(3, ucb_floor=0.4, ucb_warmup_samples=0, ucb_exploration_constant=0.0)
    bandit.update(torch.full((4,), 100.0), torch.tensor([0.0, 90.0, 0.0, 0.0]))
    owned = torch.ones(20_000, 4, dtype=torch.bool)
    counts = torch.bincount(bandit.choose(owned, *draws(20_000)), minlength=4) / 20_000
    assert counts.numpy() == pytest.approx([0.1, 0.7, 0.1, 0.1], abs=0.015)


def test_explorers_count_once_in_the_allocation_of_the_others():
    """With a floor: the uniform pulls count, the arms that explorers would have played do not."""
    section = {"ucb_warmup_samples": 0, "ucb_exploration_constant": 0.5}
    bandit = make(2, ucb_floor=0.8, **section)
    bandit.update(torch.full((3,), 100.0), torch.tensor([50.0, 48.0, 46.0]))
    owned = torch.ones(512, 3, dtype=torch.bool)
    random, coin = draws(512, 3)
    chosen = bandit.choose(owned, random, coin)
    explores = rng.unit(coin) < 0.8
    uniform = make(2, negative_sampler="uniform").choose(owned, random, coin)
    assert torch.equal(chosen[explores], uniform[explores])
    pulls = 100 + np.bincount(uniform[explores], minlength=3)
    bonus = 0.5 * math.sqrt(math.log(300))
    others = owned[~explores].tolist()
    expected = np.bincount(greedy([0.5, 0.48, 0.46], pulls, others, bonus), minlength=3)
    got = np.bincount(chosen[~explores], minlength=3)
    assert abs(got - expected).max() <= 8


def test_warm_up_ends_with_the_number_of_rewards():
    bandit = make(1, ucb_warmup_samples=100, ucb_exploration_constant=0.0)
    owned = torch.ones(64, 2, dtype=torch.bool)
    bandit.update(torch.tensor([50.0, 49.0]), torch.tensor([50.0, 0.0]))
    assert len(bandit.choose(owned, *draws(64)).unique()) == 2
    bandit.update(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert bandit.choose(owned, *draws(64)).unique().tolist() == [0]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1, width=32)), max_size=20), max_size=8
    ),
    st.sampled_from([1.0, 0.9]),
)
def test_means_and_counts_add_up(steps, discount):
    bandit = make(3, ucb_discount=discount)
    pulls, earned, seen = [0.0] * 4, [0.0] * 4, 0
    for step in steps:
        pulls = [discount * x for x in pulls]
        earned = [discount * x for x in earned]
        for arm, reward in step:
            pulls[arm] += 1
            earned[arm] += reward
        seen += len(step)
        arms = torch.tensor([arm for arm, _ in step], dtype=torch.int64)
        rewards = torch.tensor([reward for _, reward in step])
        columns = torch.stack([torch.ones_like(rewards), rewards], 1)
        bandit.update(*sum_per_arm(arms, columns, 4).T)
    assert bandit.pulls.tolist() == pytest.approx(pulls)
    assert int(bandit.seen) == seen
    expected = [e / p if p else 0 for e, p in zip(earned, pulls, strict=True)]
    assert bandit.means().tolist() == pytest.approx(expected)


def test_pulls_in_flight_shrink_the_bonus_but_not_the_mean():
    bandit = make(1, ucb_warmup_samples=0)
    bandit.update(torch.tensor([50.0, 50.0]), torch.tensor([25.0, 25.0]))
    owned = torch.ones(10, 2, dtype=torch.bool)
    bandit.in_flight += torch.tensor([30.0, 0.0])
    assert bandit.choose(owned, *draws(10)).unique().tolist() == [1]
    assert bandit.means().tolist() == [0.5, 0.5]


def test_state_survives_the_round_trip():
    bandit, other = make(2), make(2)
    bandit.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 0.0]))
    bandit.in_flight += 2
    other.load_state_dict(bandit.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(bandit.state_dict().values(), other.state_dict().values(), strict=True)
    )
