"""A head that makes the same vector of all images: how to tell, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

from tripletkit.log import logger

SPREAD = "spread"  # one minus the mean cosine of two images: 0 when all are one point
# Of an evaluation, what is neither a loss nor a metric of retrieval.
NO_METRICS = ("queries", SPREAD)
SMALL = 1e-3  # of the spread, and of the distance from the margin beside it


def by_spread(metrics: Mapping[str, float], raw: Mapping[str, float]) -> bool:
    """Whether nearly all images are one point, and less is found than in the raw embeddings."""
    return metrics.get(SPREAD, 1.0) < SMALL and metrics["map@r"] < raw.get("map@r", 0.0)


def by_losses(pulls: float, loss: float, violations: float, margin: float) -> bool:
    """Whether all distances were alike, by the sums of an epoch: each triplet lost the margin."""
    return violations == pulls and abs(loss / pulls - margin) < SMALL * margin


def warn(sign: str) -> None:
    """Say it, and what to do."""
    logger.warning(
        "the head has collapsed, it makes nearly one vector of all images (%s): lower "
        'training.learning_rate, start from the data (training.init = "lda") or with easier '
        'negatives (training.negative_sampler = "random")',
        sign,
    )
