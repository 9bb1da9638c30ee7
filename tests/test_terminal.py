"""What a terminal shows: the data, the bar of a training, and a machine without memory."""

import contextlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests import fleet, toy
from tests.worlds import clustered
from tripletkit import boundary, log, stages
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.errors import is_out_of_memory
from tripletkit.paths import run_paths
from tripletkit.train import loop
from tripletkit.train.assembly import Data
from tripletkit.tune.worker import _cause


def test_data_check_fits_into_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    toy.write_parquet(tmp_path / "train.parquet", buildings=300, images=4)
    toy.write_parquet(tmp_path / "test.parquet", buildings=200, first=1000)
    config = configuration.with_values(
        Config(),
        global_={"scratch_dir": tmp_path},
        paths={
            "train_parquet_path": tmp_path / "train.parquet",
            "test_parquet_path": tmp_path / "test.parquet",
            "difficulty_metadata_path": tmp_path / "bands.parquet",
        },
        training={"device": "cpu"},
    )
    stages.build_bands(config, neighbors=60, k0=20, force=False)
    capsys.readouterr()
    assert stages.check_data(config) == 0
    lines = capsys.readouterr().out.splitlines()
    (rows,) = [line for line in lines if "rows" in line]
    assert re.fullmatch(r"│ rows +│ +1,200 │ +800 │", rows)
    assert lines[-2] == "7 difficulty bands; anchors with neighbours in them, hardest band first:"
    assert re.fullmatch(r"(\d+% ){6}\d+%", lines[-1])
    assert all(len(line) <= 80 for line in lines)


def test_the_bar_moves_between_two_looks_at_the_loss(tmp_path, monkeypatch):
    """The loss waits for the device; how far we are does not."""
    shown: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def progress(_total, description):
        bar = shown if description.startswith("epoch") else []
        yield lambda place, text: bar.append((place, text))

    monkeypatch.setattr(log, "progress", progress)
    monkeypatch.setattr(loop, "SHOW_SECONDS", -1.0)
    looks = []
    loss = loop._Run._train_loss
    monkeypatch.setattr(loop._Run, "_train_loss", lambda run: looks.append(1) or loss(run))
    config = configuration.with_values(
        Config(),
        global_={"scratch_dir": tmp_path},
        training={"batch_size": 8, "num_epochs": 1, "device": "cpu", "placement": "device"},
        training_model={"hidden_dim": 8, "output_dim": 4},
        logging={"log_every_n_batches": 5},
    )
    loop.train(config, Data(clustered(24)), run_paths(tmp_path / "run"))
    assert [place for place, _ in shown] == list(range(8, 97, 8))
    assert [" loss " in text for _, text in shown] == [False] * 4 + [True] * 8
    assert len(looks) == 12 // 5 + 1, "and once at the end of the epoch"


def test_what_torch_raises_without_memory_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert _cause(caught.value)[0] == "host_oom"
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape"))


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_a_machine_without_memory_is_no_bug(kind, capsys):
    calls = {
        "torch": lambda: torch.empty(2**60, dtype=torch.uint8),
        "numpy": lambda: np.empty(2**60, np.uint8),
        "python": lambda: bytearray(2**60),
    }
    ended = boundary.run(lambda: calls[kind]() and None)
    said = capsys.readouterr().err
    assert ended.exit_code == 1
    assert said.startswith("error: out of memory")
    assert "training.batch_size" in said
    assert "Traceback" not in said


def test_a_batch_that_does_not_fit_is_an_error_that_names_its_key(tmp_path):
    config = fleet.write_config(
        tmp_path,
        training={"batch_size": 800, "num_epochs": 1},
        training_model={"hidden_dim": 100_000, "output_dim": 1000},
    )
    code = (
        "import resource, sys; from tripletkit.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)\n"
        "main(['train', '--config', sys.argv[2]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(3 * 2**30), str(config)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "error: out of memory" in done.stderr
    assert "training.batch_size" in done.stderr
    assert "Traceback" not in done.stderr
