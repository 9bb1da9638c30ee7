"""What only a GPU can show: the captured step, placements, bf16, exact resume."""

import numpy as np
import pytest
import torch

from tests.test_group import together, train_all
from tests.test_loop import data, make_config, paths  # noqa: F401 - fixtures
from tests.worlds import clustered, make_bands, near_and_far
from tripletkit.config import Training, TrainingModel
from tripletkit.device import make_deterministic, put
from tripletkit.paths import run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train import rng
from tripletkit.train.bandit import Bandit
from tripletkit.train.group import ALONE
from tripletkit.train.head import Head
from tripletkit.train.loop import train
from tripletkit.train.retrieval import retrieve, summarize
from tripletkit.train.sampler import TripletIndex
from tripletkit.train.step import DeviceStep, Learner, _Buffer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def never() -> bool:
    return False


def steps(device: str, count: int, *, graph: bool = True, dropout: float = 0.0) -> Learner:
    """`count` steps from the same start on `device`."""
    home = torch.device(device)
    make_deterministic(home)
    store = clustered(buildings=200)
    index = TripletIndex(store, near_and_far(store), home)
    section = Training(batch_size=32, learning_rate=1e-2, ucb_warmup_samples=60)
    torch.manual_seed(0)
    head = Head(TrainingModel(hidden_dim=32, output_dim=8, dropout=dropout), 16).to(home)
    learner = Learner(head, section, Bandit(section, index.bands, home), torch.float32)
    step = DeviceStep(learner, index, put(store.embeddings, home))
    step._replay.allowed = graph and home.type == "cuda"
    step.begin(0, 1, 0)
    for _ in range(count):
        step()
    assert (step._replay.graph is not None) == (graph and home.type == "cuda")
    return learner


def test_the_captured_step_is_the_eager_step():
    captured = steps("cuda", 20, dropout=0.2)
    eager = steps("cuda", 20, dropout=0.2, graph=False)
    assert torch.equal(captured.bandit.pulls, eager.bandit.pulls)
    for a, b in zip(captured.head.parameters(), eager.head.parameters(), strict=True):
        assert torch.equal(a, b)


def sparse(store):
    """Three bands for each image, of 0 to 3 neighbours."""
    random = np.random.default_rng(0)
    buildings = len(store.starts) - 1
    return make_bands(
        [
            [random.integers(buildings, size=random.integers(4)).tolist() for _ in range(3)]
            for _ in store.building
        ],
        3,
    )


@pytest.mark.parametrize("bands", [near_and_far, sparse])
@pytest.mark.parametrize("size", [5, 32, 257, 3000])
def test_one_kernel_draws_what_many_draw(bands, size):
    """For a bandit at its beginning, one that explores, one that never does, and one that knows."""
    from tripletkit.train.draw_kernel import draw

    store, home = clustered(buildings=900), torch.device("cuda")
    index = TripletIndex(store, bands(store), home)
    chosen = set()
    for options in (
        {"ucb_warmup_samples": 10**9},
        {"ucb_warmup_samples": 0, "ucb_floor": 0.5},
        {"ucb_warmup_samples": 0, "ucb_floor": 0.0, "ucb_discount": 0.9},
        {"ucb_warmup_samples": 2 * size, "ucb_discount": 1.0},
    ):
        bandit = Bandit(Training(**options), index.bands, home)
        for step in range(8):
            order = index.order(step)
            place = torch.tensor(step, device=home)
            key = torch.tensor(rng.key(0, rng.DRAW, step), device=home)
            counter = place + torch.arange(size, device=home)
            many = torch.stack(index.draw(order[counter], counter, key, bandit))
            assert torch.equal(draw(index, order, place, key, bandit, size), many)
            pulls = torch.bincount(many[3], minlength=bandit.arms).double()
            bandit.update(pulls, pulls * torch.linspace(0.9, 0.1, bandit.arms, device=home))
            bandit.in_flight.copy_(pulls)
            chosen |= set(many[3].tolist())
    assert chosen == set(range(index.bands + 1))


def test_placements_agree_to_the_last_bit(tmp_path, data):  # noqa: F811
    runs = {name: run_paths(tmp_path / name) for name in ("device", "host")}
    for name, each in runs.items():
        train(make_config(each, device="cuda", placement=name), data, each)
    ours, theirs = (checkpoints.load(each.final) for each in runs.values())
    for part in ("model_state_dict", "bandit", "step"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


def test_a_table_larger_than_the_buffers_streams_through_them():
    """Batches in several pieces, the last of them short: what arrives is what was asked for."""
    table = torch.randn(1000, 24).half()
    buffer = _Buffer(37, table, torch.device("cuda"))
    for count in (37, 5, 37, 0, 12):
        rows = torch.randint(0, 1000, (3 * count,))
        arm = torch.randint(0, 8, (count,))
        buffer.fill(table, rows, arm)
        buffer.await_copies()
        x, numbers, arms = buffer.take()
        assert torch.equal(x.cpu(), table[rows])
        assert torch.equal(numbers.cpu(), rows.view(3, count))
        assert torch.equal(arms.cpu(), arm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_two_gpus_agree_with_one(tmp_path):
    (alone,) = train_all(ALONE, tmp_path / "one", [{"device": "cuda", "precision": "fp32"}], never)
    both = together(
        tmp_path, 2, train_all, tmp_path / "two", [{"device": "cuda", "precision": "fp32"}]
    )
    assert both[0][0].metrics == both[1][0].metrics
    assert both[0][0].metrics == pytest.approx(dict(alone.metrics), abs=2e-3)


def test_gpu_and_cpu_draw_the_same_and_agree_within_rounding():
    gpu, cpu = steps("cuda", 12), steps("cpu", 12)
    torch.testing.assert_close(gpu.tally.cpu(), cpu.tally, rtol=1e-3, atol=1e-3)
    for a, b in zip(gpu.head.parameters(), cpu.head.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, data, placement, precision):  # noqa: F811
    training = {"device": "cuda", "placement": placement, "precision": precision, "num_epochs": 2}
    whole, stopped = run_paths(tmp_path / "whole"), run_paths(tmp_path / "stopped")
    train(make_config(whole, **training), data, whole)
    while not stopped.final.exists():
        asked = iter([False] * 3)
        train(
            make_config(stopped, **training), data, stopped,
            should_stop=lambda asked=asked: next(asked, True),
        )  # fmt: skip
    assert stopped.metrics.read_bytes() == whole.metrics.read_bytes()
    ours, theirs = (checkpoints.load(p.final)["model_state_dict"] for p in (stopped, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_run_moves_from_cpu_to_gpu(paths, data):  # noqa: F811
    train(make_config(paths, num_epochs=1, device="cpu"), data, paths)
    result = train(make_config(paths, num_epochs=3, device="cuda"), data, paths)
    assert result.epochs == 3
    assert result.best_metrics["map@r"] > result.raw["map@r"]


def test_retrieval_agrees_with_the_cpu():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 64, generator=generator)
    building = torch.randint(0, 1000, (5000,), generator=generator)
    on_cpu = summarize(retrieve(x, building), [1, 10, 100])
    on_gpu = summarize(retrieve(x.cuda(), building.cuda()), [1, 10, 100])
    assert on_gpu == pytest.approx(on_cpu, abs=1e-3)
