"""TensorBoard and W&B, for real, as a run writes them."""

import os
import re
import resource
import signal
import socket
import threading

import optuna
import psutil
import pytest
import wandb

from tests.test_loop import data, make_config, paths, records  # noqa: F401 - fixtures
from tests.wandb_stand_in import serving
from tripletkit import config as configuration
from tripletkit.errors import DataError, RunError
from tripletkit.paths import run_paths
from tripletkit.train.loop import train
from tripletkit.train.trackers import MetricsFile, open_trackers, read_metrics


def test_metrics_file_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as file:
        size = file.append({"epoch": 0})
        file.append({"epoch": 1})
    with MetricsFile(path, size) as file:
        file.append({"epoch": 1, "again": True})
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1, "again": true}\n'


def test_of_a_file_cut_anywhere_the_whole_records_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    share = {"share": [1 / 3, None]}
    written = [{"epoch": n, "loss": float("inf"), "bands": share} for n in range(3)]
    with MetricsFile(path, 0) as file:
        ends = [0, *(file.append(record) for record in written)]
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        # A record is there when only its newline is missing.
        assert read_metrics(path) == written[: sum(end - 1 <= size for end in ends[1:])]
        path.write_bytes(whole[:size] + b"\0" * 3)  # as a power cut may leave it
        assert read_metrics(path) == written[: sum(end <= size for end in ends[1:])]


@pytest.mark.parametrize("line", [b'{"epo', b"", b"7", b"\xff"])
def test_a_line_in_the_middle_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n' + line + b'\n{"epoch": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not "):
        read_metrics(path)


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
def test_wandb_offline_writes_a_run_that_can_be_synced(wandb_alone, paths, data):  # noqa: F811
    train(with_wandb(paths), data, paths)
    wandb.teardown()  # its service process writes behind us; at the end of a process this is done
    (log,) = paths.root.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"train_loss" in content
    assert b"learning_rate" in content  # the configuration


@pytest.fixture
def wandb_alone(monkeypatch, tmp_path):
    """The real client, with nothing of this machine's: no key, no settings, no folder."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def with_wandb(paths, **logging):  # noqa: F811
    logging = {"wandb_enabled": True, "wandb_mode": "offline", "wandb_project": "p", **logging}
    return configuration.with_values(make_config(paths), logging=logging)


def end_service(number: int) -> None:
    """As Slurm does, which signals every process of a job."""
    services = [p for p in psutil.Process().children() if p.name() == "wandb-core"]
    assert services
    for service in services:
        service.send_signal(number)
        service.wait()


def said(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if " lost: " in r.getMessage()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_killed_while_training_costs_a_warning(wandb_alone, paths, data, caplog):  # noqa: F811
    def report(epoch, metrics):
        if epoch == 1:
            end_service(signal.SIGKILL)

    assert train(with_wandb(paths), data, paths, report=report).status == "finished"
    (warning,) = said(caplog)
    assert re.fullmatch(r"W&B lost: .+; training goes on without it", warning)
    assert len(records(paths)) == 4
    other = run_paths(paths.root.with_name("other"))  # the next trial of the same worker
    caplog.clear()
    train(with_wandb(other), data, other)
    assert not said(caplog)
    wandb.teardown()
    (log,) = other.root.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train_loss" in log.read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_killed_with_us_does_not_spoil_the_clean_stop(wandb_alone, paths, data, caplog):  # noqa: F811
    def should_stop():
        end_service(signal.SIGTERM)
        return True

    assert train(with_wandb(paths), data, paths, should_stop=should_stop).status == "stopped"
    assert paths.last.exists()
    assert len(said(caplog)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_killed_does_not_hide_why_a_trial_ends(wandb_alone, paths, data, caplog):  # noqa: F811
    def report(epoch, metrics):
        end_service(signal.SIGTERM)
        raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned):
        train(with_wandb(paths), data, paths, report=report)
    assert len(said(caplog)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trouble", ["no key", "wrong key", "no server"])
def test_wandb_that_does_not_let_us_in_is_not_the_trials_fault(wandb_alone, paths, data, trouble):  # noqa: F811
    key, wrong = "0" * 40, "f" * 40
    wandb_alone.setenv("WANDB_INIT_TIMEOUT", "2")
    with serving({}, key=key) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and not listening: connections are refused
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        wandb_alone.setenv("WANDB_BASE_URL", nobody if trouble == "no server" else server.url)
        if trouble != "no key":
            wandb_alone.setenv("WANDB_API_KEY", wrong)
        with pytest.raises(RunError, match=r"^Weights & Biases cannot be used: .") as caught:
            train(with_wandb(paths, wandb_mode="online"), data, paths)
    assert wrong not in caught.value.message
    for way_out in ("`wandb login`", "logging.wandb_mode=offline", "logging.wandb_enabled=false"):
        assert way_out in caught.value.hint


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_disk_that_is_full_for_tensorboard_costs_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of its writer; pytest's fails
    section = configuration.Logging(tensorboard=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_trackers(section, run_paths(tmp_path), {}) as (track,):
        track(0, {"val_loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        try:
            for epoch in range(1, 9):
                track(epoch, {"val_loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (warning,) = said(caplog)
    assert re.match("TensorBoard lost: .*File too large; training goes on", warning)
