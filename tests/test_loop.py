"""The training loop: what it learns, keeps, reports and refuses."""

import dataclasses
import json

import pytest
import torch

from tests.worlds import clustered, make_bands, near_and_far
from tripletkit import config as configuration
from tripletkit import device
from tripletkit.device import choose_device
from tripletkit.errors import ConfigError, DataError, RunError
from tripletkit.paths import RunPaths, run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.assembly import Data
from tripletkit.train.evaluation import Evaluation
from tripletkit.train.head import Head, load_weights
from tripletkit.train.loop import TrainResult, train


@pytest.fixture
def paths(tmp_path) -> RunPaths:
    return run_paths(tmp_path / "run")


def make_config(paths: RunPaths, **training) -> configuration.Config:
    defaults = {
        "num_epochs": 3, "batch_size": 32, "learning_rate": 1e-3, "monitor": "map@r",
        "retrieval_metric_top_k": [1, 5], "device": "cpu",
    }  # fmt: skip
    return configuration.with_values(
        configuration.Config(),
        global_={"scratch_dir": paths.root.parent},
        paths={"checkpoint_dir": paths.checkpoints},
        training_model={"hidden_dim": 16, "output_dim": 8},
        training={**defaults, **training},
    )


@pytest.fixture(scope="module")
def data() -> Data:
    store, val = clustered(seed=0), clustered(seed=1, name="val")
    return Data(store, near_and_far(store), val, near_and_far(val))


def run(paths: RunPaths, data: Data, **training) -> TrainResult:
    return train(make_config(paths, **training), data, paths)


def records(paths: RunPaths) -> list[dict]:
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


def test_images_of_one_building_land_together(paths, data):
    result = run(paths, data, num_epochs=10)
    assert result.status == "finished"
    assert result.best_metrics["map@r"] > result.raw["map@r"] + 0.2


def test_a_random_start_learns_too(paths, data):
    result = run(paths, data, init="random", num_epochs=15, learning_rate=3e-3)
    start, *_, last = records(paths)
    assert last["map@r"] > start["map@r"] + 0.1
    assert last["train_loss"] < records(paths)[1]["train_loss"]
    assert result.epochs == 15


def test_the_start_from_data_beats_raw_before_any_step(paths, data):
    run(paths, data, num_epochs=0)
    (start,) = records(paths)
    assert start["map@r"] > start["raw"]["map@r"]
    assert paths.best.exists()
    assert paths.final.exists()


def test_every_epoch_is_recorded_with_its_bands(paths, data):
    run(paths, data)
    _, *epochs = records(paths)
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert [r["step"] for r in epochs] == [5, 10, 15]  # 160 anchors in batches of 32
    for record in epochs:
        bands = record["bands"]
        assert len(bands["share"]) == 3  # two bands and the random arm
        assert sum(bands["share"]) == pytest.approx(1)
        assert record.keys() >= {"train_loss", "val_loss", "recall@1", "recall@5", "map@r", "mrr"}
        # the mean loss over all bands is the training loss
        weighted = sum(s * x for s, x in zip(bands["share"], bands["loss"], strict=True) if s)
        assert weighted == pytest.approx(record["train_loss"])


def test_checkpoints_carry_what_earlier_trainers_wrote(paths, data):
    run(paths, data, num_epochs=4, save_every_n_epochs=2)
    assert [p.name for p in paths.saved()] == [
        "checkpoint_best.pt", "checkpoint_epoch_2.pt", "checkpoint_epoch_4.pt",
        "checkpoint_final.pt",
    ]  # fmt: skip
    final = checkpoints.load(paths.final)
    assert final.keys() >= {"model_state_dict", "optimizer_state_dict", "epoch", "metrics"}
    assert final["epoch"] == 4
    assert final["metrics"].keys() == {
        "train_loss", "val_loss", "best_val_loss", "best_val_epoch", "epochs_completed",
        "early_stopped", "val_metrics",
    }  # fmt: skip
    losses = [r["val_loss"] for r in records(paths)]
    assert final["metrics"]["best_val_loss"] == min(losses)
    assert final["metrics"]["best_val_epoch"] == losses.index(min(losses))


def test_best_checkpoint_gives_the_best_recorded_metric(paths, data):
    result = run(paths, data, num_epochs=6, learning_rate=3e-2)
    config = make_config(paths)
    state = checkpoints.load(paths.best)
    head = Head(config.training_model, 16)
    load_weights(head, state["model_state_dict"], paths.best)
    evaluation = Evaluation(
        data.val, data.val_bands, config.training,
        seed=42, device=torch.device("cpu"), precision=torch.float32,
    )  # fmt: skip
    best = max(records(paths), key=lambda r: r["map@r"])
    assert evaluation.of(head)["map@r"] == best["map@r"] == result.best_metrics["map@r"]
    assert state["epoch"] == best["epoch"] == result.best_epoch


def test_training_that_only_harms_hands_back_the_start_and_says_so(paths, data, caplog):
    result = run(paths, data, learning_rate=3.0, num_epochs=2, precision="fp32")
    assert result.best_epoch == 0
    assert checkpoints.load(paths.best)["epoch"] == 0
    assert "no epoch beat the untrained head" in caplog.text


def test_a_head_worse_than_the_raw_embeddings_says_so(paths, data, caplog):
    config = configuration.with_values(
        make_config(paths, num_epochs=0), training_model={"output_dim": 1}
    )
    result = train(config, data, paths)
    assert result.best_metrics["map@r"] < result.raw["map@r"]
    assert "the raw embeddings are better in map@r" in caplog.text


def test_early_stopping_counts_validations_without_improvement(paths, data):
    result = run(paths, data, learning_rate=3.0, num_epochs=9, early_stopping_patience=2)
    assert (result.best_epoch, result.epochs) == (0, 2)
    assert checkpoints.load(paths.final)["metrics"]["early_stopped"] is True
    again = run(paths, data, learning_rate=3.0, num_epochs=9, early_stopping_patience=2)
    assert again.epochs == 2


def test_val_loss_is_monitored_downwards(paths, data):
    run(paths, data, monitor="val_loss", num_epochs=5)
    losses = [r["val_loss"] for r in records(paths)]
    assert checkpoints.load(paths.best)["epoch"] == losses.index(min(losses))


def test_validation_interval_and_last_epoch(paths, data):
    run(paths, data, num_epochs=5, validate_every_n_epochs=2)
    assert [r["epoch"] for r in records(paths) if "val_loss" in r] == [0, 2, 4, 5]


def test_without_validation_data_it_just_trains(paths, data):
    result = run(paths, Data(data.train, data.bands))
    assert result.best_epoch is None
    assert [p.name for p in paths.saved()] == ["checkpoint_final.pt"]


def test_without_bands_negatives_are_random(paths, data):
    run(paths, Data(data.train, val=data.val))
    assert all(r["bands"]["share"] == [1.0] for r in records(paths)[1:])


@pytest.mark.parametrize("sampler", ["uniform", "random", "fixed:1"])
def test_ablation_samplers_use_their_bands(paths, data, sampler):
    run(paths, data, negative_sampler=sampler, num_epochs=1)
    share = records(paths)[1]["bands"]["share"]
    if sampler == "uniform":
        assert share == pytest.approx([1 / 3] * 3, abs=0.12)
    else:
        assert share[2 if sampler == "random" else 1] == 1.0


def test_fixed_band_must_exist(paths, data):
    with pytest.raises(ConfigError, match="the bands are 0 to 1"):
        run(paths, data, negative_sampler="fixed:2")


def test_report_sees_every_validation_and_may_end_the_run(paths, data):
    class PrunedError(Exception):
        pass

    seen = []

    def report(epoch, metrics):
        seen.append((epoch, metrics["map@r"]))
        if epoch == 2:
            raise PrunedError

    with pytest.raises(PrunedError):
        train(make_config(paths, num_epochs=9), data, paths, report=report)
    assert seen == [(r["epoch"], r["map@r"]) for r in records(paths)]
    assert len(seen) == 3


def test_more_epochs_continue_a_finished_run(paths, data, tmp_path):
    run(paths, data, num_epochs=2)
    run(paths, data, num_epochs=4)
    whole = run_paths(tmp_path / "whole")
    run(whole, data, num_epochs=4)
    assert paths.metrics.read_bytes() == whole.metrics.read_bytes()
    ours, theirs = (checkpoints.load(p.final)["model_state_dict"] for p in (paths, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_finished_run_does_nothing_again(paths, data):
    first = run(paths, data)
    before = paths.final.stat().st_mtime_ns, paths.metrics.read_bytes()
    assert run(paths, data) == dataclasses.replace(first, steps=0)
    assert (paths.final.stat().st_mtime_ns, paths.metrics.read_bytes()) == before


def test_resume_none_refuses_a_folder_with_checkpoints(paths, data):
    run(paths, data)
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        run(paths, data, resume_from_checkpoint="none")


def test_resume_from_a_named_checkpoint(paths, data, tmp_path):
    run(paths, data, num_epochs=4, save_every_n_epochs=2)
    other = run_paths(tmp_path / "other")
    named = str(paths.epoch(2))
    run(other, data, num_epochs=4, save_every_n_epochs=2, resume_from_checkpoint=named)
    ours, theirs = (checkpoints.load(p.final)["model_state_dict"] for p in (paths, other))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_named_checkpoint_only_starts_a_run_and_never_restarts_it(paths, data, tmp_path):
    run(paths, data, num_epochs=2)
    other = run_paths(tmp_path / "other")
    again = {"num_epochs": 4, "resume_from_checkpoint": str(paths.final)}
    run(other, data, **again)
    before = other.metrics.read_bytes(), other.final.stat().st_mtime_ns
    run(other, data, **again)
    assert (other.metrics.read_bytes(), other.final.stat().st_mtime_ns) == before
    assert [r["epoch"] for r in records(other)] == [2, 3, 4]  # where it came in, then its own
    assert other.best.exists()


def test_lost_metrics_file_is_said_and_not_padded(paths, data, caplog):
    run(paths, data, num_epochs=1)
    paths.metrics.unlink()
    run(paths, data, num_epochs=2)
    assert "has lost its first records" in caplog.text
    assert [r["epoch"] for r in records(paths)] == [2]


def test_a_folder_with_nothing_but_torn_checkpoints_is_refused(paths, data):
    run(paths, data)
    for path in paths.saved():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 checkpoints"):
        run(paths, data)


def test_only_our_own_leftovers_are_removed(paths, data):
    ours = paths.root / ".checkpoint_last.pt.123.tmp"
    theirs = paths.root / ".precious.tmp"
    paths.root.mkdir()
    ours.touch()
    theirs.mkdir()
    run(paths, data, num_epochs=0)
    assert not ours.exists()
    assert theirs.exists()


def test_weights_of_another_trainer_are_a_start(paths, data, tmp_path):
    torch.manual_seed(1)
    config = make_config(paths)
    head = Head(config.training_model, 16)
    foreign = tmp_path / "foreign.pt"
    state = {"model_state_dict": head.state_dict(), "optimizer_state_dict": {}, "epoch": 9}
    torch.save(state, foreign)
    run(paths, data, num_epochs=0, resume_from_checkpoint=str(foreign))
    kept = checkpoints.load(paths.final)["model_state_dict"]
    assert all(torch.equal(kept[k], v) for k, v in head.state_dict().items())


def test_other_architecture_lists_the_keys_that_differ(paths, data):
    run(paths, data)
    config = configuration.with_values(
        make_config(paths), training_model={"hidden_dim": 24, "num_hidden_layers": 2}
    )
    with pytest.raises(DataError) as caught:
        train(config, data, paths)
    message = caught.value.message
    assert "input_layer.weight: [16, 16] in the checkpoint, [24, 16] configured" in message
    assert "hidden_layers.0.weight: missing in the checkpoint" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": clustered(seed=9, name="other")}, "training embeddings"),
        ({"bands": None}, "difficulty bands"),
        ({"val": clustered(seed=9, name="other")}, "validation embeddings"),
    ],
)
def test_other_data_in_the_same_folder_is_refused(paths, data, change, named):
    bands = dataclasses.replace(data.bands, key="bands")
    data = dataclasses.replace(data, bands=bands)
    run(paths, data)
    with pytest.raises(DataError, match=f"these differ: {named}"):
        run(paths, dataclasses.replace(data, **change))


def test_other_activation_is_refused_though_the_weights_would_fit(paths, data):
    run(paths, data)
    config = configuration.with_values(make_config(paths), training_model={"activation": "relu"})
    with pytest.raises(DataError, match="trained with the activation 'gelu'"):
        train(config, data, paths)


def test_another_monitor_starts_a_new_search_for_the_best(paths, data):
    run(paths, data, num_epochs=2, monitor="val_loss")
    result = run(paths, data, num_epochs=4, monitor="recall@1")
    after = [r for r in records(paths) if r["epoch"] > 2]
    best = max(after, key=lambda r: r["recall@1"])
    assert result.best_metrics["recall@1"] == best["recall@1"]


def test_early_stopped_run_goes_on_with_more_patience(paths, data):
    harmful = {"learning_rate": 3.0, "num_epochs": 4}
    assert run(paths, data, early_stopping_patience=1, **harmful).epochs == 1
    assert run(paths, data, early_stopping_patience=3, **harmful).epochs == 3


def test_batch_larger_than_the_data_is_one_batch(paths, data):
    run(paths, data, batch_size=10**9, num_epochs=2)
    assert [r["step"] for r in records(paths)] == [0, 1, 2]


def test_the_placement_does_not_change_the_result_nor_does_moving(tmp_path, data):
    runs = {name: run_paths(tmp_path / name) for name in ("device", "host", "moved")}
    for name in ("device", "host"):
        run(runs[name], data, placement=name)
    for placement in ("host", "device", "host"):
        asked = iter([False] * 4)
        train(
            make_config(runs["moved"], placement=placement), data, runs["moved"],
            should_stop=lambda asked=asked: next(asked, True),
        )  # fmt: skip
    run(runs["moved"], data, placement="device")
    ends = [checkpoints.load(paths.final) for paths in runs.values()]
    for end, paths in zip(ends, runs.values(), strict=True):
        assert paths.metrics.read_bytes() == runs["device"].metrics.read_bytes()
        for part in ("model_state_dict", "bandit", "step"):
            torch.testing.assert_close(end[part], ends[0][part], rtol=0, atol=0)


def test_bands_without_a_neighbour_left_give_random_negatives(paths, data):
    empty = make_bands([[[], []] for _ in data.train.building], 2)
    run(paths, dataclasses.replace(data, bands=empty), num_epochs=1)
    assert records(paths)[1]["bands"]["share"] == [0, 0, 1]


def test_changed_hyperparameters_are_named_on_resume(paths, data, caplog):
    run(paths, data, num_epochs=1)
    run(paths, data, num_epochs=2, margin=0.25)
    assert "training.margin is now 0.25" in caplog.text


def test_newest_good_checkpoint_wins_over_a_torn_one(paths, data, caplog):
    run(paths, data, num_epochs=4, save_every_n_epochs=1)
    torn = paths.epoch(4)
    for path in (torn, paths.final, paths.best):
        path.write_bytes(path.read_bytes()[:-1000])
    run(paths, data, num_epochs=4, save_every_n_epochs=1)
    assert f"{torn} is torn" in caplog.text
    assert f"resuming from {paths.epoch(3)}" in caplog.text


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(paths, data):
    with pytest.raises(RunError, match="loss became") as caught:
        run(paths, data, learning_rate=1e30, num_epochs=4, checkpoint_every_minutes=1e-9)
    assert "learning_rate" in caught.value.hint
    for path in paths.saved():
        weights = checkpoints.load(path)["model_state_dict"].values()
        assert all(torch.isfinite(w).all() for w in weights)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(paths, data):
    def report(epoch, metrics):
        with pytest.raises(RunError, match="another process is training"):
            run(paths, data)

    train(make_config(paths, num_epochs=0), data, paths, report=report)


def test_effective_configuration_is_kept(paths, data):
    config = make_config(paths)
    train(config, data, paths)
    assert configuration.load(paths.config, (), {}) == config


@pytest.mark.parametrize("placement", ["device", "host"])
def test_bf16_trains_as_well(paths, data, placement):
    result = run(paths, data, precision="bf16", placement=placement, num_epochs=5)
    assert result.best_metrics["map@r"] > result.raw["map@r"] + 0.2


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [("fpu avx2 avx512_bf16", torch.float32), ("avx2 amx_bf16 amx_tile", torch.bfloat16)],
)
def test_on_a_cpu_bf16_is_for_those_with_matrix_units(monkeypatch, tmp_path, flags, chosen):
    (tmp_path / "cpuinfo").write_text(f"model name : X\nflags : {flags} other\n")
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "cpuinfo")
    assert device.choose_precision("auto", torch.device("cpu")) == chosen
    assert device.choose_precision("fp32", torch.device("cpu")) == torch.float32


def test_a_gpu_that_is_not_there_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="PyTorch sees no GPU") as caught:
        choose_device("cuda")
    assert 'training.device = "cpu"' in caught.value.hint
    assert choose_device("auto").type == "cpu"
