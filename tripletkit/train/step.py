"""One training step: draw, gather, forward, loss, backward, optimiser, bandit.

Batch t + 1 is drawn beside the learning of batch t, so knowing the rewards up to t - 1, with the
pulls of t in flight. `DeviceStep` has the table on the device, on CUDA with the whole step as one
captured graph; `HostStep` has it on the host, from where a thread draws and gathers. Both give the
same result. Neither waits for the device on its own account, except that `HostStep` needs the
rewards of the step before the last.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from tripletkit.config import Training
from tripletkit.device import autocast, seed_dropout
from tripletkit.log import logger
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit, sum_per_arm
from tripletkit.train.group import ALONE, Group
from tripletkit.train.head import Head
from tripletkit.train.loss import rewards, triplet_loss
from tripletkit.train.replay import Replay
from tripletkit.train.sampler import TripletIndex
from tripletkit.train.watch import Watch

# Columns of the tally.
PULLS, REWARD, LOSS, VIOLATIONS = range(4)

# Triplets of a batch that one kernel draws at most: it is one thread block.
AT_ONCE = 8192
# Pieces of a gathered batch: while one travels to the GPU, the next is gathered.
PIECES = 8

Draw = Callable[[TripletIndex, Tensor, Tensor, Tensor, Bandit, int], Tensor]


def draw_kernel(bandit: Bandit) -> Draw | None:
    """The draw as one kernel, where there is one: on CUDA, for a bandit that chooses by its state."""
    if bandit.pulls.device.type != "cuda" or bandit.policy != "ucb" or bandit.bands == 0:
        return None
    try:
        from tripletkit.train.draw_kernel import draw
    except Exception as error:  # noqa: BLE001 - Triton is missing, or does not fit
        logger.info("batches are drawn by many small kernels (%s)", error)
        return None
    return draw


class _AdamW(torch.optim.AdamW):
    """AdamW without its guards for torch.compile, which import the compiler: a second or two."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients."""
        inspect.unwrap(torch.optim.AdamW.step)(self, closure)


class Learner:
    """The head and its optimiser; learns from one gathered batch, of which each process has a part."""

    def __init__(
        self,
        head: Head,
        section: Training,
        bandit: Bandit,
        precision: torch.dtype,
        group: Group = ALONE,
    ) -> None:
        self.device = next(head.parameters()).device
        self.head = head
        self.section = section
        self.bandit = bandit
        self.precision = precision
        self.group = group
        self.optimizer = _AdamW(
            head.parameters(),
            lr=section.learning_rate,
            weight_decay=section.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        # Per arm: pulls, summed reward, summed loss, losses above zero; of the epoch so far.
        self.tally = torch.zeros(bandit.arms, 4, dtype=torch.float64, device=self.device)
        self.watch: Watch | None = None  # a step's

    def learn(self, x: Tensor, rows: Tensor, arm: Tensor, batch: int) -> Tensor:
        """Take one optimiser step on a batch of `batch` triplets; returns its [arms, 4] tally.

        `x` [3b, D], anchors first, its `rows` [3, b] in the table and `arm` [b] are the part of this
        process.
        """
        with autocast(x.device, self.precision):
            y = self.head(x)
        loss = triplet_loss(
            y.view(3, len(arm), y.shape[1]),
            margin=self.section.margin,
            distance=self.section.loss_distance,
        )
        self.optimizer.zero_grad(set_to_none=True)
        (loss.sum() / batch).backward()
        self.group.add(*(p.grad for p in self.head.parameters() if p.grad is not None))
        self.optimizer.step()
        loss = loss.detach()
        reward = rewards(loss, margin=self.section.margin, kind=self.section.ucb_reward)
        columns = torch.stack([torch.ones_like(loss), reward, loss, (loss > 0).float()], 1)
        tally = sum_per_arm(arm, columns, self.bandit.arms)
        self.group.add(tally)
        if self.watch is not None:
            self.watch.look(self.tally, rows, loss)
        self.tally += tally
        return tally

    def is_sound(self) -> bool:
        """Whether head and optimiser hold numbers only. Waits for the device."""
        states = (state.values() for state in self.optimizer.state.values())
        tensors = [*self.head.parameters(), *itertools.chain.from_iterable(states)]
        return all(torch.stack([x.isfinite().all().to(self.device) for x in tensors]).tolist())


class _Step:
    """What both kinds of step have in common: where in the epoch we are, and what is unsettled."""

    def __init__(self, learner: Learner, index: TripletIndex, table: Tensor) -> None:
        self.learner = learner
        self.bandit = learner.bandit
        self.group = learner.group
        self.index = index
        self.table = table
        self.batch = min(learner.section.batch_size, len(index.anchors))
        self.watch = Watch(-(-self.batch // self.group.size), learner.device)
        learner.watch = self.watch
        self.place = 0  # anchors of the epoch that are done
        # The tally of the last step, with which the bandit has not been credited yet.
        self._unsettled: Tensor | None = None
        self._order = torch.empty_like(index.anchors)

    def begin(self, seed: int, epoch: int, place: int) -> None:
        """Go to anchor number `place` of `epoch`."""
        self.place = place
        self._order.copy_(self.index.order(rng.key(seed, rng.ORDER, epoch)))
        self._draw_key = rng.key(seed, rng.DRAW, epoch)
        self._dropout_key = rng.key(seed, rng.DROPOUT, epoch, self.group.rank)

    def state_dict(self) -> dict[str, Tensor]:
        """What is unsettled."""
        return {} if self._unsettled is None else {"unsettled": self._unsettled.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Call it before `begin`, which draws ahead."""
        home = self.bandit.pulls.device
        self._unsettled = state["unsettled"].to(home) if "unsettled" in state else None

    def _size(self, place: int) -> int:
        """Triplets of the batch at `place`; the last one of an epoch may be smaller."""
        return min(self.batch, len(self._order) - place)

    def _seed_dropout(self) -> None:
        seed_dropout(self.learner.device, (self._dropout_key + self.place) % 2**63)

    def _settle(self, arm: Tensor) -> None:
        """Credit the bandit with the step before; the pulls in `arm` are in flight from now on."""
        if self._unsettled is not None:
            self.bandit.update(self._unsettled[:, PULLS], self._unsettled[:, REWARD])
        ones = torch.ones(len(arm), 1, device=arm.device)
        self.bandit.in_flight.copy_(sum_per_arm(arm, ones, self.bandit.arms)[:, 0])


class DeviceStep(_Step):
    """Steps through an epoch with the table and the triplet index on the device."""

    def __init__(self, learner: Learner, index: TripletIndex, table: Tensor) -> None:
        super().__init__(learner, index, table)
        device = table.device
        # Static addresses for the graph: the batch to learn from, and where the next one begins.
        self._drawn = torch.zeros(4, self.batch, dtype=torch.int64, device=device)
        self._next = torch.zeros((), dtype=torch.int64, device=device)
        self._key = torch.zeros((), dtype=torch.int64, device=device)
        self._lanes = torch.arange(self.batch, device=device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._replay = Replay(device, partial(self._step, self.batch, self.batch))
        self._kernel = draw_kernel(self.bandit) if self.batch <= AT_ONCE else None

    def begin(self, seed: int, epoch: int, place: int) -> None:
        """Go to anchor number `place` of `epoch`."""
        super().begin(seed, epoch, place)
        self._key.fill_(self._draw_key)
        self._next.fill_(place)
        drawn = self._draw(self._size(place))
        self._drawn[:, : drawn.shape[1]] = drawn

    def __call__(self) -> None:
        """Learn from the next batch."""
        size = self._size(self.place)
        following = self._size(self.place + size)
        self._seed_dropout()
        if following < self.batch:
            self._step(size, following)
        else:
            self._replay()
        self.place += size

    def _step(self, size: int, following: int) -> Tensor:
        """Learn from the batch at hand, of `size`, and draw one of `following` triplets."""
        drawn = None
        rows, arm = self._drawn[:3, :size], self._drawn[3, :size]
        with self._beside():
            self._settle(arm)
            if following:
                drawn = self._draw(following)
        part = self.group.share(size)
        mine = rows[:, part]
        x = torch.index_select(self.table, 0, mine.flatten())
        tally = self.learner.learn(x.to(self.learner.precision), mine, arm[part], size)
        if self._unsettled is None:
            self._unsettled = torch.empty_like(tally)
        self._meet()
        self._unsettled.copy_(tally)
        if drawn is not None:
            self._drawn[:, :following] = drawn
        return tally

    def _draw(self, size: int) -> Tensor:
        """Triplets for the anchors from `_next` on, which moves: int64 [4, size]."""
        drawn = self._draw_at_once(size) if self._kernel and size == self.batch else None
        if drawn is None:
            counter = self._next + self._lanes[:size]
            anchor = self._order[counter]
            drawn = torch.stack(self.index.draw(anchor, counter, self._key, self.bandit))
        self._next += size
        return drawn

    def _draw_at_once(self, size: int) -> Tensor | None:
        """By the kernel, if it can be built here: Triton wants a C compiler."""
        assert self._kernel is not None
        try:
            return self._kernel(self.index, self._order, self._next, self._key, self.bandit, size)
        except Exception as error:  # noqa: BLE001 - of any kind: there is another way
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            logger.info("batches are drawn by many small kernels (%s)", cause)
            self._kernel = None
            return None

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Work that may run at the same time as what follows, until `_meet`."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.table.device))
        with torch.cuda.stream(self._side):
            yield

    def _meet(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.table.device).wait_stream(self._side)


class HostStep(_Step):
    """Steps through an epoch with the table on the host, where a thread draws and gathers."""

    def __init__(self, learner: Learner, index: TripletIndex, table: Tensor) -> None:
        super().__init__(learner, index, table)
        most = -(-self.batch // self.group.size)
        # One to learn from while the other is filled.
        buffers = [_Buffer(most, table, learner.device) for _ in range(2)]
        self._buffers = itertools.cycle(buffers)
        self._replays = {b: Replay(learner.device, partial(self._learn, b)) for b in buffers}
        self._ahead: Future[tuple[Tensor, _Buffer]] | None = None
        gpu = learner.device.type == "cuda"
        # A thread begins on GPU 0, and would leave a context there.
        place = partial(torch.cuda.set_device, learner.device) if gpu else None
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=place)
        self._answered = torch.cuda.Event(blocking=True) if gpu else None

    def begin(self, seed: int, epoch: int, place: int) -> None:
        """Go to anchor number `place` of `epoch`."""
        super().begin(seed, epoch, place)
        self._prefetch(place)

    def __call__(self) -> None:
        """Learn from the next batch."""
        assert self._ahead is not None
        arm, buffer = self._ahead.result()
        following = self.place + len(arm)
        self._seed_dropout()
        if self._answered is None:  # learning blocks, so let the thread start first
            self._look_ahead(arm, following)
            self._unsettled = self._learn(buffer)
        else:
            buffer.await_copies()
            whole = len(arm) == self.batch
            tally = self._replays[buffer]() if whole else self._learn(buffer)
            self._look_ahead(arm, following)
            # A new one each time: the one before may still be asked for.
            self._unsettled = torch.empty(tally.shape, dtype=tally.dtype, pin_memory=True)
            self._unsettled.copy_(tally, non_blocking=True)
            self._answered.record()
        self.place = following

    def state_dict(self) -> dict[str, Tensor]:
        """What is unsettled; waits for it."""
        self._wait()
        return super().state_dict()

    def _learn(self, buffer: _Buffer) -> Tensor:
        x, rows, arm = buffer.take()
        return self.learner.learn(x.to(self.learner.precision), rows, arm, buffer.batch)

    def _look_ahead(self, arm: Tensor, place: int) -> None:
        """Settle the last step and have the batch at `place` drawn; `arm` is in flight."""
        self._wait()
        self._settle(arm)
        self._prefetch(place)

    def _wait(self) -> None:
        """Until the last step is through: its tally is here, and nothing reads its buffer."""
        if self._answered is not None:
            self._answered.synchronize()

    def _prefetch(self, place: int) -> None:
        self._ahead = None
        if place < len(self._order):
            self._ahead = self._thread.submit(self._draw, place, next(self._buffers))

    @torch.no_grad()
    def _draw(self, place: int, buffer: _Buffer) -> tuple[Tensor, _Buffer]:
        counter = torch.arange(place, place + self._size(place))
        drawn = self.index.draw(self._order[counter], counter, self._draw_key, self.bandit)
        part = self.group.share(len(counter))
        rows = torch.cat([column[part] for column in drawn[:3]])
        buffer.batch = len(counter)
        buffer.fill(self.table, rows, drawn.arm[part])
        return drawn.arm, buffer


class _Buffer:
    """Room for a gathered batch on the host and, where the device is a GPU, on it."""

    def __init__(self, triplets: int, table: Tensor, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.x = torch.empty(3 * triplets, table.shape[1], dtype=table.dtype, pin_memory=gpu)
        # What each row of x is, and the arm of each triplet.
        self.numbers = torch.empty(4 * triplets, dtype=torch.int64, pin_memory=gpu)
        self.there = self.x.to(device), self.numbers.to(device)  # on a CPU the same memory
        self.stream = torch.cuda.Stream(device) if gpu else None
        if self.stream is not None:
            for tensor in self.there:  # a copy may be under way when nobody wants it any more
                tensor.record_stream(self.stream)
        self.rows = 0
        self.batch = 0  # triplets of the whole batch, of which this is a part

    def fill(self, table: Tensor, rows: Tensor, arm: Tensor) -> None:
        """Gather `rows` [3b] of the table and keep their `arm` [b]."""
        self.rows = len(rows)
        numbers = self.numbers[: len(rows) + len(arm)]
        torch.cat([rows, arm], out=numbers)
        self._send(self.there[1][: len(numbers)], numbers)
        x, there = self.x[: len(rows)], self.there[0][: len(rows)]
        piece = max(1, -(-len(rows) // (PIECES if self.stream else 1)))
        for wanted, here, away in zip(*(t.split(piece) for t in (rows, x, there)), strict=True):
            torch.index_select(table, 0, wanted, out=here)
            self._send(away, here)

    def await_copies(self) -> None:
        """Have the device's work wait for what was sent."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """The batch on the device, once it is there: [3b, D], its row numbers [3, b], its arms [b]."""
        x, numbers = self.there
        rows, arm = numbers[: self.rows // 3 * 4].split([self.rows, self.rows // 3])
        return x[: self.rows], rows.view(3, -1), arm

    def _send(self, away: Tensor, here: Tensor) -> None:
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                away.copy_(here, non_blocking=True)
