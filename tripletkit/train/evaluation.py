"""A head's numbers on one split: projection, fixed validation triplets, retrieval metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from tripletkit.config import Training
from tripletkit.data.bands import Bands
from tripletkit.data.store import Store
from tripletkit.device import as_tensor, autocast
from tripletkit.errors import DivergedError
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit
from tripletkit.train.collapse import NO_METRICS, SPREAD
from tripletkit.train.group import ALONE, Group
from tripletkit.train.head import Head
from tripletkit.train.loss import triplet_loss
from tripletkit.train.retrieval import Retrieval, merge, retrieve, summarize
from tripletkit.train.sampler import TripletIndex

BATCH_BYTES = 16 * 2**20  # of gathered rows, in float32


@torch.no_grad()
def project(head: Head, table: Tensor, rows: Tensor, precision: torch.dtype) -> Tensor:
    """The head's output for `rows` [n] of `table`, float32 [n, d] on the head's device."""
    device = next(head.parameters()).device
    trained = head.training
    head.eval()
    projected = torch.empty(len(rows), head.output_layer.out_features, device=device)
    done = 0
    for part in _row_batches(rows, table.shape[1]):
        x = torch.index_select(table, 0, part.to(table.device)).to(device)
        with autocast(device, precision):
            projected[done : done + len(part)] = head(x.to(precision))
        done += len(part)
    head.train(trained)
    return projected


def _row_batches(rows: Tensor, width: int) -> Iterator[Tensor]:
    """Split row numbers so that one gathered batch stays near 16 MB in float32."""
    yield from rows.split(max(1, BATCH_BYTES // (4 * width)))


class Evaluation:
    """One split, ready to be asked again and again: its triplets and queries stay the same.

    The processes of a `group` share the work, and all get the same result.
    """

    def __init__(
        self,
        store: Store,
        bands: Bands | None,
        section: Training,
        *,
        seed: int,
        device: torch.device,
        precision: torch.dtype,
        group: Group = ALONE,
    ) -> None:
        self.store = store
        self.section = section
        self.group = group
        self.seed = seed
        self.device = device
        self.precision = precision
        self.table = as_tensor(store.embeddings)
        rows = np.sort(store.by_building)
        self.rows = as_tensor(rows)
        self.building = as_tensor(store.building[rows]).long()

        index = TripletIndex(store, bands, torch.device("cpu"))
        uniform = section.model_copy(update={"negative_sampler": "uniform"})
        draw = index.draw(
            index.anchors,
            torch.arange(len(index.anchors)),
            rng.key(seed, rng.VALIDATION),
            Bandit(uniform, index.bands, torch.device("cpu")),
        )
        place = np.zeros(len(store.building), dtype=np.int64)
        place[rows] = np.arange(len(rows))
        self.triplets = as_tensor(place)[torch.stack(draw[:3])]

    def raw(self) -> dict[str, float]:
        """Retrieval metrics of the embeddings as they are: the baseline."""
        return self.summary(self.retrieval(self.embeddings()))

    def of(self, head: Head) -> dict[str, float]:
        """val_loss on the fixed triplets and the retrieval metrics of the head's output."""
        projected = self.projected(head)
        spread = 1 - float(projected.mean(0).square().sum())
        if not math.isfinite(spread):
            raise DivergedError(
                "the head makes vectors that are no numbers of validation images",
                hint="lower training.learning_rate; `tripletkit data check` looks at the images",
            )
        loss = self.loss(projected)
        metrics = self.summary(self.retrieval(projected))
        return self.group.first({"val_loss": loss, SPREAD: spread, **metrics})

    def embeddings(self) -> Tensor:
        """The embeddings of `rows` as they are, in their own type, on the device."""
        whole = len(self.rows) == len(self.table)  # no copy of a table that is used as it is
        table = self.table if whole else torch.index_select(self.table, 0, self.rows)
        return table.to(self.device)

    def projected(self, head: Head) -> Tensor:
        """The head's output for `rows`, float32, on the device."""
        rows = self.rows[self.group.share(len(self.rows))]
        part = project(head, self.table, rows, self.precision)
        return self.group.whole(part, len(self.rows))

    def loss(self, projected: Tensor) -> float:
        """The mean loss of the fixed triplets."""
        total = 0.0
        for part in self.triplets.split(2**16, dim=1):
            loss = triplet_loss(
                projected[part.to(self.device)],
                margin=self.section.margin,
                distance=self.section.loss_distance,
            )
            total += float(loss.sum(dtype=torch.float64))
        return total / self.triplets.shape[1]

    def retrieval(self, embeddings: Tensor) -> Retrieval:
        """How well each query finds its building among the embeddings of `rows`, on the CPU."""
        result = retrieve(
            embeddings,
            self.building.to(self.device),
            max_queries=self.section.retrieval_metric_max_queries,
            seed=self.seed,
            share=(self.group.rank, self.group.size),
        )
        return merge(self.group.all(result))

    def summary(self, result: Retrieval) -> dict[str, float]:
        """The means over the queries, by name."""
        return summarize(result, self.section.retrieval_metric_top_k)


def better(metric: str, value: float, than: float | None) -> bool:
    """Whether `value` of `metric` improves on the best so far; losses fall, the rest rises."""
    return than is None or (value < than if metric == "val_loss" else value > than)


def metric_names(metrics: Mapping[str, float]) -> list[str]:
    """The retrieval metrics in a result, in order, without counts and losses."""
    return [name for name in metrics if name not in ("val_loss", *NO_METRICS)]
