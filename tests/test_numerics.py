"""Losses that are no numbers, heads that collapse, embeddings without a length: seen, and said."""

import contextlib
import dataclasses
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests import toy
from tests.test_loop import make_config
from tests.test_tune_worker import config, files, prepare, trials_of, work  # noqa: F401
from tests.worlds import clustered, make_store, near_and_far
from tripletkit import cli
from tripletkit import config as configuration
from tripletkit.data.store import open_store
from tripletkit.errors import DataError, DivergedError, RunError
from tripletkit.paths import run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train import collapse
from tripletkit.train.assembly import Data
from tripletkit.train.loop import train
from tripletkit.train.step import Learner
from tripletkit.train.watch import Watch
from tripletkit.tune import claims

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Data:
    store, val = clustered(seed=0), clustered(seed=1, name="val")
    return Data(store, near_and_far(store), val, near_and_far(val))


@pytest.fixture
def paths(tmp_path):
    return run_paths(tmp_path / "run")


def run(paths, data: Data, **training):
    """Ten steps are an epoch."""
    return train(make_config(paths, **{"batch_size": 16, **training}), data, paths)


def records(paths) -> list[dict]:
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


def finite(path) -> bool:
    """Weights and moments in a checkpoint."""
    state = checkpoints.load(path)
    moments = [x for each in state["optimizer_state_dict"]["state"].values() for x in each.values()]
    return all(bool(x.isfinite().all()) for x in [*state["model_state_dict"].values(), *moments])


# --- a loss that is no number ----------------------------------------------------------------


def poisoned(data: Data, rows: list[int], value: float = math.nan) -> Data:
    """As a disk or a memory may do it after the cache was checked."""
    embeddings = np.array(data.train.embeddings, np.float32)
    embeddings[rows] = value
    return dataclasses.replace(data, train=dataclasses.replace(data.train, embeddings=embeddings))


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_and_the_images_are_named(paths, data, placement, value, monkeypatch):
    """By a slow reference: the same run with a look at every loss, on the host."""
    seen = []
    learn = Learner.learn

    def look(self, x, rows, arm, batch):
        bad = ~x.view(3, len(arm), -1).isfinite().all(2).all(0)
        seen.append(sorted(set(rows[:, bad].flatten().tolist())))
        return learn(self, x, rows, arm, batch)

    monkeypatch.setattr(Learner, "learn", look)
    with pytest.raises(DivergedError) as caught:
        run(paths, poisoned(data, [7], value), placement=placement, init="random", num_epochs=1)
    step = next(i for i, rows in enumerate(seen, 1) if rows)
    said = caught.value.message
    assert f"epoch 1, at step {step}, in " in said
    assert " of 16 triplets, of the images " in said
    for row in seen[step - 1][:5]:
        assert f"'toy{row}' (row {row})" in said
    assert "7" in [str(row) for row in seen[step - 1]]
    assert "look at the embeddings of these images" in caught.value.hint
    assert f"the last good checkpoint is {paths.best}" in caught.value.hint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_gpu_names_the_same_step_and_images(tmp_path, data, placement):
    """Also when the step is a captured graph, as it is after the first three."""
    said, late = {}, None
    for row in range(160):
        with pytest.raises(DivergedError) as caught:
            run(
                run_paths(tmp_path / f"cpu{row}"), poisoned(data, [row]), init="random",
                negative_sampler="random", num_epochs=1,
            )  # fmt: skip
        said["cpu"] = caught.value.message
        if int(said["cpu"].partition("at step ")[2].partition(",")[0]) > 5:
            late = row
            break
    assert late is not None
    with pytest.raises(DivergedError) as caught:
        run(
            run_paths(tmp_path / "cuda"), poisoned(data, [late]), init="random", device="cuda",
            negative_sampler="random", num_epochs=1, placement=placement,
        )  # fmt: skip
    assert caught.value.message == said["cpu"]


def test_where_all_triplets_are_without_a_loss_the_head_is_to_blame(paths, data):
    with pytest.raises(DivergedError) as caught:
        run(paths, data, learning_rate=1e38, precision="fp32", num_epochs=1)
    assert "at step 2, in 16 of 16 triplets" in caught.value.message
    assert "lower training.learning_rate" in caught.value.hint


def test_the_step_counts_from_the_start_of_the_run_not_of_the_process(paths, data):
    run(paths, data, num_epochs=1)
    assert records(paths)[-1]["step"] == 10
    with pytest.raises(DivergedError, match=r"in epoch 2, at step 1\d, "):
        run(paths, poisoned(data, [7]), num_epochs=2)


@pytest.mark.parametrize("step", [3, 10, 1000])
def test_weights_that_went_wrong_in_the_last_step_are_not_saved(paths, data, step, monkeypatch):
    """A loss is from before its step: it does not tell."""
    taken, learn = 0, Learner.learn

    def spoil(self, *batch):
        nonlocal taken
        tally = learn(self, *batch)
        taken += 1
        if taken == min(step, 10):
            with torch.no_grad():
                self.head.output_layer.bias[0] = math.inf
        return tally

    monkeypatch.setattr(Learner, "learn", spoil)
    often = {"checkpoint_every_minutes": 1e-9 if step < 1000 else 1e6}
    with pytest.raises(DivergedError, match="a weight, or a moment of one, is no number") as caught:
        run(paths, data, num_epochs=3, **often)  # ten steps are an epoch
    newest = paths.last if step in (3, 10) else paths.best
    assert f"the last good checkpoint is {newest}" in caught.value.hint
    assert all(map(finite, paths.saved()))
    assert [r["epoch"] for r in records(paths)] == [0]


def test_what_is_watched_is_the_first_bad_batch_and_of_any_size():
    watch, so_far = Watch(4, CPU), torch.zeros(2, 4, dtype=torch.float64)
    batches = [
        (torch.arange(12).view(3, 4), torch.tensor([1.0, 0, 2, 0])),
        (torch.arange(20, 29).view(3, 3), torch.tensor([0.5, math.nan, 1])),
        (torch.arange(50, 62).view(3, 4), torch.full((4,), math.nan)),
    ]
    for rows, loss in batches:
        watch.look(so_far, rows, loss)
        so_far[0, 2] += loss.double().sum()
    found = watch.suspects()
    assert found.batch == 2
    assert found.bad.tolist() == [False, True, False], (
        "as many as the batch has, though it is short"
    )
    assert found.triplets[:, found.bad].T.tolist() == [[21, 24, 27]]


def test_a_worker_goes_on_after_trials_that_diverged(config):  # noqa: F811
    rates = {"learning_rate": {"type": "categorical", "choices": [1e38, 1e-3]}}
    wide = configuration.with_values(
        config,
        tuning={"space": rates, "n_trials": 3},
        training={"precision": "fp32", "checkpoint_every_minutes": 1e6},
    )
    shared = prepare(wide)
    for rate in (1e38, 1e-3, 1e38):
        shared.study.enqueue_trial({"learning_rate": rate})
    assert work(wide).ended == ["failed", "complete", "failed"]
    for trial in (trials_of(shared)[0], trials_of(shared)[2]):
        cause = trial.user_attrs[claims.CAUSE]
        assert cause["kind"] == "nan"
        assert "at step 2, in 16 of 16 triplets, of the images 'img-" in cause["message"]
    assert shared.study.best_trial.number == 1


def test_vectors_of_validation_images_that_are_no_numbers_are_the_fault_of_the_trial(
    config,  # noqa: F811
    monkeypatch,
):
    """Weights may be finite and their products not."""
    shared = prepare(config)
    monkeypatch.setattr(
        "tripletkit.train.evaluation.project",
        lambda head, table, rows, precision: torch.full((len(rows), 8), math.nan),
    )
    assert work(config).ended == ["failed", "failed"]
    assert {t.user_attrs[claims.CAUSE]["kind"] for t in trials_of(shared)} == {"nan"}


# --- collapse --------------------------------------------------------------------------------


@pytest.fixture
def collapsing(monkeypatch):
    """From the first step on every image becomes the same vector."""
    learn = Learner.learn

    def spoil(self, *batch):
        tally = learn(self, *batch)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.zero_()
            self.head.output_norm.bias.fill_(1.0)
        return tally

    monkeypatch.setattr(Learner, "learn", spoil)


@pytest.mark.usefixtures("collapsing")
def test_a_collapse_is_said_once_and_is_never_the_best(paths, data, caplog):
    """Though its loss, the margin, may be smaller than that of the start."""
    result = run(
        paths, data, num_epochs=3, monitor="val_loss", margin=0.01, init="random",
        early_stopping_patience=2,
    )  # fmt: skip
    start, *after = records(paths)
    assert [r["val_loss"] for r in after] == pytest.approx([0.01] * 2, rel=1e-3)
    assert start["val_loss"] > 0.02
    assert all(r["spread"] < 1e-5 for r in after)
    assert caplog.text.count("the head has collapsed") == 1
    assert "lower training.learning_rate" in caplog.text
    assert (result.best_epoch, result.epochs) == (0, 2)


def test_spread_is_one_minus_the_mean_cosine_of_two_images(paths, data):
    run(paths, data, num_epochs=0, precision="fp32")
    from tripletkit.train.evaluation import project
    from tripletkit.train.head import Head, load_weights

    state = checkpoints.load(paths.best)
    section = configuration.TrainingModel(**state["config"]["training_model"])
    head = Head(section, section.input_dim)
    load_weights(head, state["model_state_dict"], paths.best)
    table = torch.tensor(np.asarray(data.val.embeddings))
    unit = project(head, table, torch.arange(len(table)), torch.float32).double()
    cosines = [float(a @ b) for a in unit for b in unit]
    assert records(paths)[0]["spread"] == pytest.approx(1 - np.mean(cosines), abs=1e-5)


def test_a_collapsed_head_in_small_numbers():
    raw = {"map@r": 0.5}
    assert collapse.by_spread({"spread": 1e-5, "map@r": 0.1}, raw)
    assert not collapse.by_spread({"spread": 0.2, "map@r": 0.1}, raw)
    assert not collapse.by_spread({"spread": 1e-5, "map@r": 0.9}, raw), "close, yet told apart"
    assert not collapse.by_spread({"val_loss": 0.1, "map@r": 0.1}, raw), "of an earlier version"
    assert collapse.by_losses(100, 50.0, 100, 0.5)
    assert not collapse.by_losses(100, 50.0, 99, 0.5), "a mean of easy and hard ones"
    assert not collapse.by_losses(100, 60.0, 100, 0.5)


@pytest.mark.usefixtures("collapsing")
def test_without_validation_the_losses_tell(paths, data, caplog):
    steady = configuration.with_values(
        make_config(paths, num_epochs=3, monitor="val_loss"), training_model={"dropout": 0.0}
    )
    train(steady, Data(data.train, data.bands), paths)
    assert caplog.text.count("the head has collapsed") == 1
    assert "every triplet has the margin as its loss" in caplog.text


@pytest.mark.usefixtures("collapsing")
def test_a_collapsed_trial_is_worth_what_it_was_before(config):  # noqa: F811
    config_ = configuration.with_values(
        config,
        tuning={"objective": "val_loss", "n_trials": 1, "max_epochs": 2},
        training={"init": "random", "margin": 0.01, "checkpoint_every_minutes": 1e6},
    )
    del config_.tuning.space["margin"]
    shared = prepare(config_)
    assert work(config_).ended == ["complete"]
    (trial,) = trials_of(shared)
    assert trial.value == trial.intermediate_values[0] > 0.02
    assert set(trial.intermediate_values) == {0}, "what others are pruned by is no margin"


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e12])
def test_rates_that_are_far_too_high_end_in_an_error_or_in_the_start(paths, data, rate):
    with contextlib.suppress(DivergedError):
        result = run(paths, data, learning_rate=rate, precision="fp32", num_epochs=2)
        assert result.best_epoch == 0
    assert all(map(finite, paths.saved()))


def test_a_loss_is_a_poor_judge_of_trials_with_margins_of_their_own(config, caplog):  # noqa: F811
    prepare(configuration.with_values(config, tuning={"objective": "val_loss"}))
    assert "a small margin makes a small loss" in caplog.text


# --- embeddings ------------------------------------------------------------------------------


def with_rows(path, rows: dict[int, float], **options) -> None:
    """Some vectors are all one number."""
    table = toy.table(**options)
    vectors = toy.vectors_of(table).astype(np.float32)
    for row, value in rows.items():
        vectors[row] = value
    pq.write_table(table.set_column(2, "embedding", toy.as_lists(vectors)), path)


def test_vectors_without_a_direction_are_named_each_time(tmp_path, caplog):
    with_rows(tmp_path / "a.parquet", {3: 0.0, 17: 1e-30, 40: 1e30})
    for _ in range(2):
        store = open_store(tmp_path / "a.parquet", tmp_path / "cache")
        assert store.embeddings.dtype == np.float32
        assert "3 vectors are zero, or too small or large" in caplog.text
        assert "rows 3, 17, 40 of a.parquet" in caplog.text
        caplog.clear()


def test_ordinary_vectors_say_nothing(tmp_path, caplog):
    with_rows(tmp_path / "a.parquet", {3: 1e-6, 4: 65504.0, 5: 1e6})
    open_store(tmp_path / "a.parquet", tmp_path / "cache")
    assert "vectors are zero" not in caplog.text


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_whole_file_of_them_does_not_train_unheard(tmp_path, caplog, scale):
    for name, first in (("train", 0), ("val", 100)):
        table = toy.table(first=first)
        vectors = toy.vectors_of(table).astype(np.float64) * scale
        pq.write_table(
            table.set_column(2, "embedding", toy.as_lists(vectors.astype(np.float32))),
            tmp_path / f"{name}.parquet",
        )
    stores = [open_store(tmp_path / f"{n}.parquet", tmp_path / "cache") for n in ("train", "val")]
    assert caplog.text.count("80 vectors are zero, or too small or large") == 2
    paths = run_paths(tmp_path / "run")
    if scale > 1:
        with pytest.raises(RunError, match="too large for float32"):
            run(paths, Data(stores[0], None, stores[1]))


def test_margins_and_losses_are_float32_whatever_the_products_are(paths, data, monkeypatch):
    types = set()

    def look(*vectors, **options):
        types.update(each.dtype for each in vectors)
        return triplet_loss(*vectors, **options)

    from tripletkit.train.step import triplet_loss

    monkeypatch.setattr("tripletkit.train.step.triplet_loss", look)
    run(paths, data, precision="bf16", num_epochs=1)
    assert types == {torch.float32}


# --- data that teach nothing -----------------------------------------------------------------


def test_one_building_is_refused_by_name(tmp_path):
    store = make_store([0] * 6, np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    with pytest.raises(DataError, match="two buildings or more"):
        train(make_config(run_paths(tmp_path / "run")), Data(store), run_paths(tmp_path / "run"))


def test_images_of_a_building_that_are_all_the_same_train(paths):
    building = np.repeat(np.arange(12), 4)
    vectors = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)[building]
    store = make_store(building, vectors)
    result = run(paths, Data(store, None, store), num_epochs=2)
    assert result.status == "finished"
    assert result.best_metrics["recall@1"] == 1.0
    assert all(map(finite, paths.saved()))


def test_one_image_under_two_buildings_counts_against_the_head(paths):
    """Half of the images are in another building once more: no head can tell them apart."""
    random = np.random.default_rng(0)
    building = np.repeat(np.arange(20), 4)
    vectors = random.normal(size=(20, 8))[building] + 0.01 * random.normal(size=(80, 8))
    vectors[40:] = vectors[:40]
    store = make_store(building, vectors.astype(np.float32))
    result = run(paths, Data(store, None, store), num_epochs=2)
    assert result.status == "finished"
    assert result.raw["recall@1"] == 0.0
    assert result.best_metrics["recall@1"] == 0.0
    assert all(
        math.isfinite(value)
        for r in records(paths)
        for value in r["raw" if "raw" in r else "bands"] and [r["val_loss"]]
    )


def test_embeddings_that_are_all_the_same_are_refused(tmp_path):
    store = make_store(np.repeat(np.arange(5), 3), np.ones((15, 4), np.float32))
    paths = run_paths(tmp_path / "run")
    with pytest.raises(DataError, match="are all the same"):
        train(make_config(paths), Data(store), paths)


def test_a_margin_of_zero_is_refused_with_the_key(tmp_path, capsys):
    words = ["train", "--set", "training.margin=0", f"--set=global.scratch_dir={tmp_path}"]
    assert cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False)) == 2
    assert "training.margin" in capsys.readouterr().err
