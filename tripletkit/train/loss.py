"""The triplet loss, one value per triplet, and what the bandit earns for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tripletkit.config import Reward


def triplet_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float, distance: str
) -> Tensor:
    """max(0, d(a, p) - d(a, n) + margin) for unit vectors [B, d]; returns float32 [B].

    `distance` is "euclidean" (`nn.TripletMarginLoss`, p=2) or "cosine" (one minus the cosine,
    through `nn.TripletMarginWithDistanceLoss`).
    """
    if distance == "euclidean":
        return F.triplet_margin_loss(anchor, positive, negative, margin=margin, reduction="none")
    return F.triplet_margin_with_distance_loss(
        anchor, positive, negative, distance_function=_cosine, margin=margin, reduction="none"
    )


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - (x * y).sum(-1)


def rewards(loss: Tensor, *, margin: float, kind: Reward) -> Tensor:
    """What each triplet earns its band, float32 in [0, 1], from its loss [B].

    - "useful_rate": the triplet teaches (loss > 0) and its negative is not nearer than its
      positive (loss < margin): semi-hard in the sense of Schroff et al., FaceNet, CVPR 2015.
    - "violation_rate": the triplet has a loss at all.
    - "loss": the loss, over its largest value on the unit sphere, margin + 2.
    - "negative_loss": one minus that, which leans to the easier bands; the default (docs/ablation.md).
    """
    if kind == "useful_rate":
        return ((loss > 0) & (loss < margin)).to(torch.float32)
    if kind == "violation_rate":
        return (loss > 0).to(torch.float32)
    share = loss / (margin + 2)
    return share if kind == "loss" else 1 - share
