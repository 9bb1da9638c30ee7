"""TensorBoard and W&B, for real, as a run writes them."""

import os

import pytest
import wandb

from tests.test_loop import data, make_config, paths  # noqa: F401 - fixtures
from tripletkit import config as configuration
from tripletkit.train.loop import train
from tripletkit.train.trackers import MetricsFile


def test_metrics_file_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as file:
        size = file.append({"epoch": 0})
        file.append({"epoch": 1})
    with MetricsFile(path, size) as file:
        file.append({"epoch": 1, "again": True})
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1, "again": true}\n'


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_epoch(paths, data):  # noqa: F811
    config = configuration.with_values(make_config(paths), logging={"tensorboard": True})
    train(config, data, paths)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(paths.tensorboard))
    events.Reload()
    assert [e.step for e in events.Scalars("map@r")] == [0, 1, 2, 3]
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2, 3]
    assert {"raw/map@r", "band_share/0", "band_reward/2", "val_loss"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline_writes_a_run_that_can_be_synced(paths, data, monkeypatch):  # noqa: F811
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    config = configuration.with_values(
        make_config(paths),
        logging={"wandb_enabled": True, "wandb_mode": "offline", "wandb_project": "p"},
    )
    train(config, data, paths)
    wandb.teardown()  # its service process writes behind us; at the end of a process this is done
    (log,) = paths.root.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"train_loss" in content
    assert b"learning_rate" in content  # the configuration
