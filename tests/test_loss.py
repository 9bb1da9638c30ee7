"""The triplet loss and the rewards."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tripletkit.train.loss import rewards, triplet_loss


def units(n: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, 5, generator=generator), dim=1) for _ in range(3)]


def test_euclidean_is_torchs_triplet_margin_loss_per_sample():
    a, p, n = units(40, 0)
    ours = triplet_loss(torch.stack([a, p, n]), margin=0.5, distance="euclidean")
    assert ours.mean().item() == pytest.approx(
        nn.TripletMarginLoss(margin=0.5, p=2)(a, p, n).item()
    )
    x, y, z = (t.double().numpy() for t in (a, p, n))
    slow = np.maximum(0, np.linalg.norm(x - y, axis=1) - np.linalg.norm(x - z, axis=1) + 0.5)
    assert ours.numpy() == pytest.approx(slow, abs=1e-5)


def test_cosine_is_one_minus_the_cosine():
    a, p, n = units(40, 1)
    ours = triplet_loss(torch.stack([a, p, n]), margin=0.2, distance="cosine")
    x, y, z = (t.double().numpy() for t in (a, p, n))
    slow = np.maximum(0, -(x * y).sum(1) + (x * z).sum(1) + 0.2)
    assert ours.numpy() == pytest.approx(slow, abs=1e-5)


LOSS = torch.tensor([0.0, 0.2, 0.49, 0.5, 0.9, 2.5])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("useful_rate", [0, 1, 1, 0, 0, 0]),
        ("violation_rate", [0, 1, 1, 1, 1, 1]),
        ("loss", [0, 0.08, 0.196, 0.2, 0.36, 1]),
        ("negative_loss", [1, 0.92, 0.804, 0.8, 0.64, 0]),
    ],
)
def test_rewards_by_hand(kind, expected):
    assert rewards(LOSS, margin=0.5, kind=kind).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["useful_rate", "violation_rate", "loss", "negative_loss"])
def test_rewards_stay_between_zero_and_one(kind):
    for distance in ("euclidean", "cosine"):
        a, p, n = units(500, 2)
        y = torch.stack([torch.cat([a, a[:1]]), torch.cat([p, -a[:1]]), torch.cat([n, a[:1]])])
        losses = triplet_loss(y, margin=0.5, distance=distance)  # the last as bad as can be
        got = rewards(losses, margin=0.5, kind=kind)
        assert got.min() >= 0
        assert got.max() <= 1 + 1e-6
