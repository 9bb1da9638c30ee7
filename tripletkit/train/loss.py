"""The triplet loss, one value per triplet, and what the bandit earns for it."""

from __future__ import annotations

import torch
from torch import Tensor

from tripletkit.config import Reward

EPSILON = 1e-6  # as torch has it: the distance of equal vectors has a gradient


def triplet_loss(y: Tensor, *, margin: float, distance: str) -> Tensor:
    """max(0, d(a, p) - d(a, n) + margin) for unit vectors; returns float32 [B].

    `y` [3, B, d] are anchors, positives and negatives. `distance` is "euclidean" (as
    `nn.TripletMarginLoss`, p=2) or "cosine" (one minus the cosine).
    """
    anchor, others = y[0], y[1:]  # both distances at once: a GPU has half as many kernels to start
    if distance == "euclidean":
        apart: Tensor = torch.linalg.vector_norm(anchor - others + EPSILON, dim=-1)
    else:
        apart = 1 - (anchor * others).sum(-1)
    loss: Tensor = (margin + apart[0] - apart[1]).clamp_min(0)
    return loss


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
