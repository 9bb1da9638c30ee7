"""What a worker takes it gives back; what a run writes is bounded, announced, and whole on a full disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import endurance, fleet, toy
from tripletkit import cli, room
from tripletkit import config as configuration
from tripletkit.config import Config, TrainingModel
from tripletkit.errors import RunError
from tripletkit.paths import run_paths, study_paths
from tripletkit.train import checkpoint
from tripletkit.train.head import Head
from tripletkit.tune import attempts, storage

SHORT = 30

pytest_plugins = ["tests.small_disk"]


def call(*command: str | Path) -> int:
    words = [str(word) for word in command]
    return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))


# --- a worker, trial after trial --------------------------------------------------------------


def test_open_files_threads_and_inodes_are_the_same_in_every_trial(tmp_path):
    """`python -m tests.endurance --trials 1000` is the long one."""
    found = endurance.run(tmp_path, SHORT)
    assert endurance.problems(found, SHORT) == [], endurance.table(found, 1)
    assert set(found.inodes) == {room.FILES + room.OF_A_TRIAL["all"]}
    assert found.others < 50


def test_what_grows_is_found():
    flat = [endurance.Sample(20, 5, 300_000 + n % 7) for n in range(400)]

    def told(samples: list[endurance.Sample], inodes: int = 10, size: int = 100) -> list[str]:
        result = endurance.Result(samples, [10] * 399 + [inodes], [100] * 399 + [size], 40)
        return endurance.problems(result, 400)

    assert told(flat) == []
    leaking = [s._replace(files=20 + n // 100) for n, s in enumerate(flat)]
    assert told(leaking) == ["files vary: [20, 21, 22, 23]"]
    assert told([*flat[:-1], flat[-1]._replace(threads=6)]) == ["threads vary: [5, 6]"]
    growing = [s._replace(memory=300_000 + 50 * n) for n, s in enumerate(flat)]
    assert told(growing) == ["memory grows by 50.0 kB per trial"]
    assert told(flat, inodes=11) == ["inodes per trial vary: [10, 11]"]
    assert told(flat, size=110) == ["bytes per trial vary: 100 to 110"]
    assert told(flat[1:]) == ["399 trials instead of 400"]


@pytest.fixture
def config(tmp_path) -> Path:
    return endurance.write_config(tmp_path, 3)


@pytest.mark.parametrize("keep", ["all", "best"])
def test_a_trial_that_is_over_keeps_the_checkpoints_that_were_asked_for(config, keep):
    words = ("--cluster", "here", "--set", f"tuning.keep_checkpoints={keep}")
    assert call("tune", "-c", config, *words) == 0
    loaded = configuration.load(config, environ={})
    shared = storage.open_study(loaded.tuning, seed=0, workers=1)
    for trial in shared.study.get_trials():
        paths = study_paths(loaded).trial(trial.number)
        kept = {path.name for path in paths.saved()}
        more = {"checkpoint_epoch_2.pt", "checkpoint_final.pt"} if keep == "all" else set()
        assert kept == {"checkpoint_best.pt"} | more
        assert len(kept) == room.OF_A_TRIAL[keep]
        best = checkpoint.load(paths.best)["progress"]
        assert best["best_metrics"]["map@r"] == trial.value
        assert len(list(paths.root.iterdir())) + 1 == room.FILES + len(kept)
    # the next command finds nothing to do, and the best is of use
    assert call("tune", "-c", config, *words) == 0
    best = study_paths(loaded).trial(shared.study.best_trial.number).best
    assert call("evaluate", "-c", config, "--split", "val", "--checkpoint", best) == 0


KILLED_BEFORE_IT_TIDIED = """
import os
from tripletkit.cli import main
from tripletkit.tune import worker

worker._clear_away = lambda config, over: os._exit(9)
main()
"""


def test_the_checkpoints_a_killed_worker_left_are_deleted_by_another(config):
    """It had told the study how the trial ended, and died before it deleted them."""
    words = ("--cluster", "here", "--set", "tuning.keep_checkpoints=best")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_IT_TIDIED, "tune", "-c", config, *words]
    )
    loaded = configuration.load(config, environ={})
    first = study_paths(loaded).trial(0)
    assert killed.returncode == 9
    assert len(first.saved()) == room.OF_A_TRIAL["all"]
    assert call("tune", "-c", config, *words) == 0
    for number in range(3):
        paths = study_paths(loaded).trial(number)
        assert paths.saved() == [paths.best]
    shared = storage.open_study(loaded.tuning, seed=0, workers=1)
    assert [trial.state.name for trial in shared.study.get_trials()] == ["COMPLETE"] * 3


@pytest.mark.parametrize("keep", ["all", "best"])
def test_a_trial_that_goes_on_keeps_its_newest_checkpoint(config, keep):
    """However it is asked for, as long as the trial is not over."""
    loaded = configuration.load(config, environ={})
    words = ("--cluster", "here", "--set", f"tuning.keep_checkpoints={keep}")
    process = subprocess.Popen(
        [fleet.COMMAND, "tune", "-c", config, *words, "--max-epochs", "100000"]
    )
    paths = study_paths(loaded).trial(0)
    try:
        fleet.until(paths.best.exists, lambda: "no checkpoint", deadline=300)
        process.terminate()
        assert process.wait(300) == 130
    finally:
        process.kill()
        process.wait()
    assert paths.last.exists()


# --- room --------------------------------------------------------------------------------------

SECTIONS = st.builds(
    TrainingModel,
    hidden_dim=st.integers(1, 40),
    num_hidden_layers=st.integers(1, 4),
    hidden_dim_multiplier=st.sampled_from([0.3, 1.0, 1.7]),
    output_dim=st.integers(1, 20),
    use_residual=st.booleans(),
    use_layer_norm=st.booleans(),
)


@given(SECTIONS, st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_the_parameters_of_a_head_are_counted(section, width):
    head = Head(section, width)
    assert room.parameters(section, width) == sum(p.numel() for p in head.parameters())


@given(st.lists(st.sampled_from([8, 24, 40]), min_size=1), st.integers(10, 30))
@settings(deadline=None, max_examples=30)
def test_no_head_of_a_space_is_larger_than_the_largest(choices, high):
    space = configuration.with_values(
        Config(),
        tuning={
            "space": {
                "hidden_dim": {"type": "categorical", "choices": choices},
                "output_dim": {"type": "int", "low": 5, "high": high},
                "activation": {"type": "categorical", "choices": ["relu", "gelu"]},
            }
        },
    ).tuning.space
    most = room.parameters(room.largest(TrainingModel(), space), 16)
    assert most == room.parameters(TrainingModel(hidden_dim=max(choices), output_dim=high), 16)


@pytest.mark.parametrize(
    "space",
    [
        {"num_hidden_layers": {"type": "float", "low": 1, "high": 3}},
        {
            "num_hidden_layers": {"type": "int", "low": 1, "high": 1000},
            "hidden_dim_multiplier": {"type": "float", "low": 1, "high": 30},
        },
    ],
)
def test_of_a_space_whose_largest_is_no_head_nothing_is_said(config, space, caplog):
    loaded = configuration.load(config, environ={})
    room.warn(configuration.with_values(loaded, tuning={"space": space}), trials=100)
    assert caplog.records == []


def test_what_a_training_writes_is_about_what_was_expected(tmp_path):
    toy.write_parquet(tmp_path / "train.parquet", buildings=20, dim=256)
    toy.write_parquet(tmp_path / "val.parquet", buildings=10, dim=256, first=100)
    loaded = configuration.with_values(
        configuration.load(endurance.write_config(tmp_path / "other", 1), environ={}),
        global_={"scratch_dir": tmp_path},
        paths={
            "train_parquet_path": tmp_path / "train.parquet",
            "val_parquet_path": tmp_path / "val.parquet",
        },
        training_model={"hidden_dim": 256, "output_dim": 128},
        training={"num_epochs": 4, "save_every_n_epochs": 2},
    )
    (tmp_path / "config.toml").write_text(configuration.dump(loaded))
    *caches, run = room.needs(loaded)
    assert [need.key for need in caches] == ["paths.cache_dir"] * 2
    assert call("train", "-c", tmp_path / "config.toml") == 0

    def written(folder: Path) -> tuple[int, int]:
        files = [p for p in folder.rglob("*") if p.is_file()]
        return sum(p.stat().st_size for p in files), len(files)

    size, files = written(loaded.checkpoint_dir)
    assert size <= run.bytes <= 2 * size
    assert files <= run.files <= files + 4
    stores = [path.parent for path in loaded.cache_dir.glob("*/embeddings.*")]
    size = sum(written(folder)[0] for folder in stores)
    assert 0.5 * size <= sum(need.bytes for need in caches) <= 2 * size
    (again,) = room.needs(loaded)
    assert again == run, "the caches are there"


def test_a_search_needs_room_for_all_of_its_trials(config):
    loaded = configuration.load(config, environ={})
    loaded = configuration.with_values(loaded, training_model={"hidden_dim": 4096})
    each = room.checkpoint_bytes(loaded.training_model, 8)
    *_, need = room.needs(loaded, trials=1000)
    assert need.folder == study_paths(loaded).root
    assert need.files == 1000 * (3 + room.FILES) + room.IN_FLIGHT
    assert need.bytes == 3002 * each + 1000 * room.BYTES
    assert need.what == "1,000 trials with 3 checkpoints of up to " + room.size(each)
    best = configuration.with_values(loaded, tuning={"keep_checkpoints": "best"})
    *_, less = room.needs(best, trials=1000)
    assert less.files == 1000 * (1 + room.FILES) + 2 + room.IN_FLIGHT
    assert less.bytes < need.bytes / 1.5


# --- disks that fill up --------------------------------------------------------------------------


def whole(folder: Path) -> list[str]:
    """Every file of runs below a folder can be read; returns the names of the checkpoints."""
    names = []
    for path in folder.rglob("*"):
        assert path.suffix != ".tmp", path
        if path.suffix == ".pt":
            checkpoint.load(path)
            names.append(path.name)
        elif path.suffix == ".toml":
            configuration.load(path, environ={})
        elif path.suffix == ".json":
            json.loads(path.read_text())
    return names


def test_a_disk_that_is_nearly_full_is_named_before_a_training_begins(config, disk, capsys):
    words = ("train", "-c", config, "--set", f"paths.checkpoint_dir={disk.folder}/run")
    disk.resize("size=300k,nr_inodes=10")
    assert call(*words, "--set", "training.num_epochs=0") == 0
    full, inodes = (s for s in capsys.readouterr().err.splitlines() if "may be needed" in s)
    assert f"300K are free on the disk of {disk.folder}, and 1G may be needed" in full
    assert "make room, or choose another disk with paths.checkpoint_dir" in full
    assert "9 more files fit on the disk of" in inodes
    assert "and 11 may be needed (2 checkpoints of" in inodes


def test_a_disk_that_is_nearly_full_is_named_before_a_study_begins(config, disk, caplog):
    words = ("tune", "-c", config, "--cluster", "here", "--n-trials", "100", "--prepare")
    loaded = configuration.load(config, environ={})
    room.warn(configuration.with_values(loaded, tuning={"output_dir": disk.folder}), trials=100)
    (full, inodes) = (r.getMessage() for r in caplog.records)
    assert f"8M are free on the disk of {disk.folder}, and 1G may be needed (100 trials" in full
    assert "499 more files fit on" in inodes
    assert "1,002 may be needed" in inodes
    assert "choose another disk with tuning.output_dir" in inodes
    assert call(*words) == 0


@pytest.mark.parametrize("left", [4096, 40_960, 77_824])
def test_on_a_full_disk_a_training_leaves_whole_files_and_goes_on_exactly(
    config, disk, tmp_path, capsys, left
):
    epochs = "training.num_epochs=4", "training.save_every_n_epochs=1"
    more = [word for key in epochs for word in ("--set", key)]
    assert call("train", "-c", config, *more, "--set", f"paths.checkpoint_dir={tmp_path}/a") == 0
    words = ("train", "-c", config, *more, "--set", f"paths.checkpoint_dir={disk.folder}/run")
    disk.leave(left)
    capsys.readouterr()
    assert call(*words) == RunError.exit_code
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    before = whole(disk.folder)
    disk.make_room()
    assert call(*words) == 0
    alone, other = run_paths(tmp_path / "a"), run_paths(disk.folder / "run")
    assert alone.metrics.read_bytes() == other.metrics.read_bytes()
    assert {*before} <= {*whole(disk.folder)}


@pytest.mark.parametrize("left", [4096, 61_440, 122_880])
def test_on_a_full_disk_a_study_loses_nothing(config, disk, capsys, left):
    words = (
        "tune", "-c", config, "--cluster", "here",
        "--set", f"tuning.output_dir={disk.folder}/trials",
    )  # fmt: skip
    disk.leave(left)
    capsys.readouterr()
    assert call(*words) in (1, 5)
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    whole(disk.folder)
    disk.make_room()
    assert call(*words) == 0
    loaded = configuration.load(config, ["tuning.output_dir=" + f"{disk.folder}/trials"])
    trials = storage.open_study(loaded.tuning, seed=0, workers=1).study.get_trials()
    assert [(t.number, t.state.name) for t in trials] == [(n, "COMPLETE") for n in range(3)]
    for trial in trials:
        paths = study_paths(loaded).trial(trial.number)
        assert fleet.epochs(paths) == [0, 1, 2]
        assert attempts.read(paths.attempts)[-1]["outcome"] == "complete"
    whole(disk.folder)


def test_without_inodes_a_training_says_so_and_goes_on(config, disk, capsys):
    words = ("train", "-c", config, "--set", f"paths.checkpoint_dir={disk.folder}/run")
    disk.resize("nr_inodes=8")
    assert call(*words, "--set", "training.num_epochs=2") == RunError.exit_code
    assert "No space left on device" in capsys.readouterr().err
    whole(disk.folder)
    disk.resize("nr_inodes=500")
    assert call(*words, "--set", "training.num_epochs=2") == 0
