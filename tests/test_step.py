"""The training step: what it learns from, and the host pipeline against a sequential reference."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.worlds import clustered, near_and_far
from tripletkit.config import Training, TrainingModel
from tripletkit.device import put
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit
from tripletkit.train.head import Head
from tripletkit.train.sampler import TripletIndex
from tripletkit.train.step import LOSS, PULLS, REWARD, DeviceStep, HostStep, Learner, _Buffer

CPU = torch.device("cpu")
SECTION = Training(batch_size=24, learning_rate=1e-2, ucb_warmup_samples=30, ucb_discount=0.9)


@pytest.fixture
def parts():
    store = clustered()
    index = TripletIndex(store, near_and_far(store), CPU)
    torch.manual_seed(0)
    head = Head(TrainingModel(hidden_dim=8, output_dim=4, dropout=0.2), 16)
    bandit = Bandit(SECTION, index.bands, CPU)
    return Learner(head, SECTION, bandit, torch.float32), index, put(store.embeddings, CPU)


def weights(learner: Learner) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in learner.head.parameters())


def test_a_step_is_torchs_loss_and_adamw_on_the_drawn_triplets(parts):
    learner, index, table = parts
    reference = Head(TrainingModel(hidden_dim=8, output_dim=4, dropout=0.2), 16)
    reference.load_state_dict(learner.head.state_dict())
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-5)
    other = Bandit(SECTION, index.bands, CPU)
    order = index.order(rng.key(7, rng.ORDER, 1))
    step = DeviceStep(learner, index, table)
    step.begin(7, 1, 0)

    def draw(place: int):
        lanes = torch.arange(place, place + 24)
        return index.draw(order[lanes], lanes, rng.key(7, rng.DRAW, 1), other)

    following = draw(0)
    for place in (0, 24, 48):
        drawn = following
        step()
        other.load_state_dict(learner.bandit.state_dict())
        following = draw(place + 24)
        torch.default_generator.manual_seed((rng.key(7, rng.DROPOUT, 1, 0) + place) % 2**63)
        y = reference(table[torch.cat(drawn[:3])].float())
        loss = nn.TripletMarginLoss(margin=0.5)(*y.chunk(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(learner.head.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_bandit_is_credited_with_what_the_tally_says_one_step_late(parts):
    learner, index, table = parts
    step = DeviceStep(learner, index, table)
    step.begin(0, 1, 0)
    pulls = earned = torch.zeros(3, dtype=torch.float64)
    before, part = learner.tally.clone(), None
    for _ in range(4):
        if part is not None:
            pulls = 0.9 * pulls + part[:, PULLS]
            earned = 0.9 * earned + part[:, REWARD]
        step()
        part = learner.tally - before
        before = learner.tally.clone()
        torch.testing.assert_close(learner.bandit.pulls, pulls)
        torch.testing.assert_close(learner.bandit.earned, earned)
        torch.testing.assert_close(learner.bandit.in_flight, part[:, PULLS])
        torch.testing.assert_close(step.state_dict()["unsettled"], part)
    assert float(learner.tally[:, PULLS].sum()) == 4 * 24
    assert float(learner.tally[:, LOSS].sum()) > 0


@pytest.mark.parametrize("kind", [DeviceStep, HostStep])
def test_an_epoch_uses_every_anchor_once_with_a_last_partial_batch(parts, kind):
    learner, index, table = parts
    step = kind(learner, index, table)
    sizes = []
    for epoch in (1, 2):
        step.begin(0, epoch, 0)
        while step.place < len(index.anchors):
            before = step.place
            step()
            sizes.append(step.place - before)
    assert sizes == 2 * [*[24] * 6, 16]
    assert float(learner.tally[:, PULLS].sum()) == 2 * len(index.anchors)
    assert int(learner.bandit.seen) == 2 * len(index.anchors) - 16
    assert float(learner.bandit.in_flight.sum()) == 16


@pytest.mark.parametrize("kind", [DeviceStep, HostStep])
def test_batches_are_drawn_one_ahead_with_the_pulls_in_flight(parts, kind):
    """One thing after the other: draw t + 1 knowing the rewards up to t - 1, then learn from t."""
    learner, index, table = parts
    start = {k: v.clone() for k, v in learner.head.state_dict().items()}
    step = kind(learner, index, table)
    for epoch in (1, 2):
        step.begin(3, epoch, 0)
        while step.place < len(index.anchors):
            step()

    head = Head(TrainingModel(hidden_dim=8, output_dim=4, dropout=0.2), 16)
    head.load_state_dict(start)
    bandit = Bandit(SECTION, index.bands, CPU)
    sequential = Learner(head, SECTION, bandit, torch.float32)
    answered = None
    for epoch in (1, 2):
        order = index.order(rng.key(3, rng.ORDER, epoch))
        lanes = torch.arange(len(order)).split(24)

        def draw(t: int, epoch=epoch, order=order, lanes=lanes):
            return index.draw(order[lanes[t]], lanes[t], rng.key(3, rng.DRAW, epoch), bandit)

        following = draw(0)
        for t in range(len(lanes)):
            drawn = following
            if answered is not None:
                bandit.update(answered[:, PULLS], answered[:, REWARD])
            bandit.in_flight = torch.bincount(drawn.arm, minlength=3).double()
            if t + 1 < len(lanes):
                following = draw(t + 1)
            seed = (rng.key(3, rng.DROPOUT, epoch, 0) + int(lanes[t][0])) % 2**63
            torch.default_generator.manual_seed(seed)
            x = table[torch.cat(drawn[:3])].float()
            answered = sequential.learn(x, torch.stack(drawn[:3]), drawn.arm, len(drawn.arm))
    assert weights(sequential) == weights(learner)
    assert torch.equal(bandit.pulls, learner.bandit.pulls)
    assert torch.equal(bandit.earned, learner.bandit.earned)
    assert torch.equal(step.state_dict()["unsettled"], answered)


def test_a_table_in_the_type_of_the_products_gives_the_same_result():
    """On a GPU bf16 tables are kept as such: rounding before gathering is rounding after it."""
    store = clustered()
    index = TripletIndex(store, near_and_far(store), CPU)
    found = []
    for table in (put(store.embeddings, CPU), put(store.embeddings, CPU).to(torch.bfloat16)):
        torch.manual_seed(0)
        head = Head(TrainingModel(hidden_dim=8, output_dim=4), 16)
        learner = Learner(head, SECTION, Bandit(SECTION, index.bands, CPU), torch.bfloat16)
        step = DeviceStep(learner, index, table)
        step.begin(0, 1, 0)
        for _ in range(4):
            step()
        found.append(weights(learner))
    assert found[0] == found[1]


def test_a_buffer_gives_back_what_it_was_filled_with():
    table = torch.randn(1000, 24).half()
    buffer = _Buffer(37, table, CPU)
    for count in (37, 5, 0, 12):
        rows, arm = torch.randint(0, 1000, (3 * count,)), torch.randint(0, 8, (count,))
        buffer.fill(table, rows, arm)
        x, numbers, arms = buffer.take()
        assert torch.equal(x, table[rows])
        assert torch.equal(numbers, rows.view(3, count))
        assert torch.equal(arms, arm)


class Kernels(TorchDispatchMode):
    """Counts the operations that compute, as opposed to those that look at memory otherwise."""

    VIEWS = (
        "view", "slice", "select", "unsqueeze", "expand", "transpose", "t", "detach", "split",
        "alias", "empty", "empty_like",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name not in self.VIEWS and "profiler" not in str(function)
        return function(*args, **(kwargs or {}))


def test_a_step_is_few_kernels(parts):
    """On a GPU a kernel takes a microsecond or more, and a small batch nothing but kernels."""
    learner, index, table = parts
    step = DeviceStep(learner, index, table)
    step.begin(0, 1, 0)
    step()
    with Kernels() as kernels:
        step()
    assert kernels.count <= 320
