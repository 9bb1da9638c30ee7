"""The first batch whose loss is no number, remembered on the device so that nobody waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tripletkit.data.store import Store
from tripletkit.log import logger

SHOWN = 5  # images


class Suspects(NamedTuple):
    """What is known of the batch where the loss went wrong, on the CPU."""

    batch: int  # the how-manieth of this process, from 1
    triplets: Tensor  # rows [3, b] of the table: anchors, positives, negatives
    bad: Tensor  # bool [b]: whose loss is no number


class Watch:
    """Keeps the newest batch, until one's loss is no number: then that one."""

    def __init__(self, most: int, device: torch.device) -> None:
        """`most` triplets are in a batch."""
        # Static addresses, for CUDA graphs.
        self._batches = torch.zeros((), dtype=torch.int64, device=device)
        self._triplets = torch.zeros(3, most, dtype=torch.int64, device=device)
        self._loss = torch.zeros(most, device=device)
        self._size = torch.zeros((), dtype=torch.int64, device=device)

    def look(self, so_far: Tensor, triplets: Tensor, loss: Tensor) -> None:
        """Look at a batch, `triplets` [3, b] and `loss` [b]; `so_far` sums the losses before it."""
        fine = so_far.sum() < torch.inf  # NaN is not, and it stays
        size = len(loss)
        for kept, new in ((self._triplets[:, :size], triplets), (self._loss[:size], loss)):
            torch.where(fine, new, kept, out=kept)
        self._size.masked_fill_(fine, size)
        self._batches += fine

    def suspects(self) -> Suspects:
        """The batch that is kept. Waits for the device."""
        size = int(self._size)
        bad = ~torch.isfinite(self._loss[:size].cpu())
        return Suspects(int(self._batches), self._triplets[:, :size].cpu(), bad)

    def told(self, store: Store, began_at: int) -> tuple[str, str | None]:
        """For people: where the loss went wrong, and what to do if the images are to blame.

        `began_at` is the step that this process began at. Whole triplets go to the log.
        """
        found = self.suspects()
        step, bad, size = began_at + found.batch, int(found.bad.sum()), len(found.bad)
        if bad == 0:
            return f"at step {step}, in another process's part of the batch", None
        triplets = found.triplets[:, found.bad].T
        logger.info(
            "triplets without a loss at step %d, as rows of %s: %s",
            step, store.source, triplets.tolist(),
        )  # fmt: skip
        rows = triplets.unique().tolist()
        shown = ", ".join(f"{store.ids[row].as_py()!r} (row {row})" for row in rows[:SHOWN])
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        where = f"at step {step}, in {bad} of {size} triplets, of the images {shown}{more}"
        few = "the other triplets of the batch are well: look at the embeddings of these images"
        return where, few if 2 * bad < size else None
