"""One training step: draw, gather, forward, loss, backward, optimiser, bandit.

`DeviceStep` keeps all of it on the device, on CUDA as one captured graph. `HostStep` draws and
gathers on the host, one batch ahead, into two buffers. Neither waits for the device on its own
account, except that `HostStep` needs the rewards of the step before the last.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tripletkit.config import Training
from tripletkit.device import autocast, seed_dropout
from tripletkit.log import logger
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit, sum_per_arm
from tripletkit.train.head import Head
from tripletkit.train.loss import rewards, triplet_loss
from tripletkit.train.sampler import TripletIndex, Triplets

# Columns of the tally.
PULLS, REWARD, LOSS, VIOLATIONS = range(4)

# PyTorch wants a few eager steps on a side stream before it captures a graph.
EAGER_STEPS = 3


class Learner:
    """The head and its optimiser; learns from one gathered batch."""

    def __init__(
        self, head: Head, section: Training, bandit: Bandit, precision: torch.dtype
    ) -> None:
        device = next(head.parameters()).device
        self.head = head
        self.section = section
        self.bandit = bandit
        self.precision = precision
        self.optimizer = torch.optim.AdamW(
            head.parameters(),
            lr=section.learning_rate,
            weight_decay=section.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        # Per arm: pulls, summed reward, summed loss, losses above zero; of the epoch so far.
        self.tally = torch.zeros(bandit.arms, 4, dtype=torch.float64, device=device)

    def learn(self, x: Tensor, arm: Tensor) -> Tensor:
        """Take one optimiser step on x [3B, D], anchors first; returns the step's [arms, 4] tally."""
        with autocast(x.device, self.precision):
            y = self.head(x)
        anchor, positive, negative = y.chunk(3)
        loss = triplet_loss(
            anchor,
            positive,
            negative,
            margin=self.section.margin,
            distance=self.section.loss_distance,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        self.optimizer.step()
        loss = loss.detach()
        reward = rewards(loss, margin=self.section.margin, kind=self.section.ucb_reward)
        columns = torch.stack([torch.ones_like(loss), reward, loss, (loss > 0).float()], 1)
        tally = sum_per_arm(arm, columns, self.bandit.arms)
        self.tally += tally
        return tally


class DeviceStep:
    """Steps through an epoch with the table and the triplet index on the device."""

    def __init__(self, learner: Learner, index: TripletIndex, table: Tensor) -> None:
        self.learner = learner
        self.index = index
        self.table = table
        self.device = table.device
        self.batch = min(learner.section.batch_size, len(index.anchors))
        # Static addresses for the graph; the epoch's values are copied into them.
        self._order = torch.empty_like(index.anchors)
        self._place = torch.zeros((), dtype=torch.int64, device=self.device)
        self._key = torch.zeros((), dtype=torch.int64, device=self.device)
        self._lanes = torch.arange(self.batch, device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_allowed = self.device.type == "cuda"
        self._eager_steps = 0

    def begin(self, seed: int, epoch: int, place: int) -> None:
        """Go to anchor number `place` of `epoch`."""
        self._order.copy_(self.index.order(rng.key(seed, rng.ORDER, epoch)))
        self._place.fill_(place)
        self._key.fill_(rng.key(seed, rng.DRAW, epoch))
        self._dropout_key = rng.key(seed, rng.DROPOUT, epoch)
        self.place = place

    def __call__(self) -> None:
        """Learn from the next batch; the last one of an epoch may be smaller."""
        size = min(self.batch, len(self._order) - self.place)
        seed_dropout(self.device, (self._dropout_key + self.place) % 2**63)
        if size < self.batch or not self._graph_allowed:
            self._step(size)
        elif self._graph is not None:
            self._graph.replay()
        elif self._eager_steps < EAGER_STEPS:
            self._on_side_stream(lambda: self._step(size))
            self._eager_steps += 1
        else:
            self._capture()
        self.place += size

    def finish(self) -> None:
        """Nothing is in flight here."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is in flight here."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Credit at once what a `HostStep` left in flight."""
        bandit = self.learner.bandit
        bandit.in_flight.zero_()
        if "unsettled" in state:
            tally = state["unsettled"].to(self.device)
            bandit.update(tally[:, PULLS], tally[:, REWARD])

    def _step(self, size: int) -> None:
        lanes = self._place + self._lanes[:size]
        triplets = self.index.draw(self._order[lanes], lanes, self._key, self.learner.bandit)
        x = torch.index_select(self.table, 0, torch.cat(triplets[:3]))
        tally = self.learner.learn(x.to(self.learner.precision), triplets.arm)
        self.learner.bandit.update(tally[:, PULLS], tally[:, REWARD])
        self._place += size

    def _on_side_stream(self, work: Callable[[], None]) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _capture(self) -> None:
        """Capture the step and run it; a driver that refuses leaves us with eager steps."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step(self.batch)
        except RuntimeError as error:
            logger.warning("no CUDA graph (%s): going on step by step", str(error).splitlines()[0])
            self._graph_allowed = False
            self._step(self.batch)
            return
        self._graph = graph
        graph.replay()


class HostStep:
    """Steps through an epoch with the table on the host.

    While the device learns from batch t, a thread draws and gathers batch t+1. So batch t+1 is
    drawn knowing the rewards up to t-1, with the pulls of t in flight, on every machine alike.
    """

    def __init__(self, learner: Learner, index: TripletIndex, table: Tensor) -> None:
        self.learner = learner
        self.index = index
        self.table = table
        self.bandit = learner.bandit
        self.device = learner.tally.device
        self.batch = min(learner.section.batch_size, len(index.anchors))
        on_gpu = self.device.type == "cuda"
        self._buffers = [
            torch.empty(3 * self.batch, table.shape[1], dtype=table.dtype, pin_memory=on_gpu)
            for _ in range(2)
        ]
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._ahead: Future[tuple[Triplets, Tensor]] | None = None
        self._unsettled: Tensor | None = None  # the last step's tally, on the CPU, once it is there
        self._answered = torch.cuda.Event() if on_gpu else None

    def begin(self, seed: int, epoch: int, place: int) -> None:
        """Go to anchor number `place` of `epoch`."""
        self._order = self.index.order(rng.key(seed, rng.ORDER, epoch))
        self._key = rng.key(seed, rng.DRAW, epoch)
        self._dropout_key = rng.key(seed, rng.DROPOUT, epoch)
        self.place = place
        self._turn = 0
        self._prefetch(place)

    def __call__(self) -> None:
        """Learn from the next batch; the last one of an epoch may be smaller."""
        assert self._ahead is not None
        triplets, x = self._ahead.result()
        following = self.place + len(triplets.arm)
        seed_dropout(self.device, (self._dropout_key + self.place) % 2**63)
        if self.device.type == "cpu":  # learning blocks, so let the thread start first
            self._settle(triplets)
            self._prefetch(following)
            tally = self._learn(triplets, x)
        else:
            tally = self._learn(triplets, x)
            self._settle(triplets)
            self._prefetch(following)
        self._answer(tally)
        self.place = following

    def finish(self) -> None:
        """Credit the last step of the epoch."""
        self._settle(None)

    def state_dict(self) -> dict[str, Tensor]:
        """The tally of the last step, which the bandit has not been credited with yet."""
        if self._unsettled is None:
            return {}
        self._wait()
        return {"unsettled": self._unsettled}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Call it before `begin`, which draws ahead."""
        self._unsettled = state.get("unsettled")

    def _learn(self, triplets: Triplets, x: Tensor) -> Tensor:
        x = x.to(self.device, non_blocking=True).to(self.learner.precision)
        return self.learner.learn(x, triplets.arm.to(self.device, non_blocking=True))

    def _prefetch(self, place: int) -> None:
        if place >= len(self._order):
            self._ahead = None
            return
        self._turn += 1
        self._ahead = self._thread.submit(self._draw, place, self._buffers[self._turn % 2])

    @torch.no_grad()
    def _draw(self, place: int, buffer: Tensor) -> tuple[Triplets, Tensor]:
        anchor = self._order[place : place + self.batch]
        counter = torch.arange(place, place + len(anchor))
        triplets = self.index.draw(anchor, counter, self._key, self.bandit)
        x = buffer[: 3 * len(anchor)]
        torch.index_select(self.table, 0, torch.cat(triplets[:3]), out=x)
        return triplets, x

    def _answer(self, tally: Tensor) -> None:
        """Keep a step's tally for `_settle`; on a GPU it is copied behind the step, not awaited."""
        if self._answered is None:
            self._unsettled = tally
            return
        # A new buffer each time: the one before may still be asked for.
        self._unsettled = torch.empty(tally.shape, dtype=tally.dtype, pin_memory=True)
        self._unsettled.copy_(tally, non_blocking=True)
        self._answered.record()

    def _wait(self) -> None:
        """Wait until the last step's tally, and so its copy of the batch, is through."""
        if self._answered is not None:
            self._answered.synchronize()

    def _settle(self, drawn: Triplets | None) -> None:
        """Credit the step before; what was `drawn` since is in flight now."""
        if self._unsettled is not None:
            self._wait()
            self.bandit.update(self._unsettled[:, PULLS], self._unsettled[:, REWARD])
            self._unsettled = None
        self.bandit.in_flight.zero_()
        if drawn is not None:
            ones = torch.ones(len(drawn.arm), 1)
            self.bandit.in_flight.add_(sum_per_arm(drawn.arm, ones, self.bandit.arms)[:, 0])
