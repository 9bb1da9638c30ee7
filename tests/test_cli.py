"""The commands as a user runs them: real processes, real files, exit codes, messages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from tripletkit import cli, config
from tripletkit.paths import run_paths


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """train, val and test files in one folder."""
    folder = tmp_path_factory.mktemp("data")
    for number, split in enumerate(("train", "val", "test")):
        toy.write_parquet(folder / f"{split}.parquet", buildings=30, first=100 * number, dim=16)
    return folder


@pytest.fixture
def run(tmp_path, files, monkeypatch):
    """Run a command in this process, in an empty folder; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(config.ENV_PREFIX)]:
        monkeypatch.delenv(name)

    def call(*arguments: str) -> int:
        return cli.run(lambda: cli.app(arguments, prog_name="tripletkit", standalone_mode=False))

    return call


def use(files: Path, *splits: str) -> list[str]:
    return [f"--set=paths.{split}_parquet_path={files}/{split}.parquet" for split in splits]


QUICK = ["--set=training.num_epochs=2", "--set=training.batch_size=32",
         "--set=training_model.hidden_dim=16", "--set=training_model.output_dim=8",
         "--set=training.monitor=map@r"]  # fmt: skip


def test_help_is_answered_without_the_heavy_libraries():
    code = (
        "import sys\nfrom tripletkit.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.startswith("Usage: tripletkit")
    assert output.stdout.endswith("[]\n")


def test_commands_that_only_look_do_not_load_what_trains(run, files, tmp_path):
    assert run("tune", *use(files, "train", "val"), "--cluster=here", "--prepare") == 0
    code = (
        "import sys\nfrom tripletkit import cli\n"
        "def end(*words): return cli.run(\n"
        "    lambda: cli.app(words, prog_name='tripletkit', standalone_mode=False))\n"
        "print('ends', end('study', 'show'), end('status'), end('db', 'status'))\n"
        "end('doctor'), end('logs'), end('wait', '--timeout=0'), end('cancel', '1'), end('why', '1')\n"
        "print(sorted({'torch', 'pyarrow', 'submitit', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "ends 0 0 0\n" in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("[]\n")


def test_training_does_not_load_what_it_does_not_use(files, tmp_path):
    """PyTorch's compiler takes as long to load as PyTorch; its optimisers ask for it in passing."""
    arguments = ["train", *use(files, "train", "val"), *QUICK]
    code = (
        f"import sys\nfrom tripletkit import cli\n"
        f"assert cli.run(lambda: cli.app({arguments!r}, standalone_mode=False)) == 0\n"
        "unused = {'torch._dynamo', 'torch._inductor', 'sympy', 'optuna', 'submitit', 'matplotlib'}\n"
        "print(sorted(unused & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")


def test_version(run, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("tripletkit 0.")


def test_init_writes_the_template_once(run, tmp_path, capsys):
    assert run("init") == 0
    assert (tmp_path / "config.toml").read_text() == config.template()
    assert run("init") == 2
    assert "config.toml exists" in capsys.readouterr().err
    assert run("init", "--force") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--nonsense"], "No such option"),
        (["trian"], "No such command"),
        (["train"], "paths.train_parquet_path is not set"),
        (["train", "--config", "nowhere.toml"], "no configuration file"),
        (["evaluate", "--split", "tset"], "one of train, val, test"),
        (["data", "split", "a", "b", "--val", "0.6", "--test", "0.5"], "nothing to train on"),
    ],
)
def test_usage_errors_are_one_message_and_exit_2(run, capsys, arguments, says):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_a_command_group_alone_shows_its_help(run, capsys, arguments):
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert "Commands:" in captured.out
    assert not captured.err


def test_a_run_folder_that_cannot_be_made_is_one_message(run, files, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("train", *use(files, "train"), "--set=paths.checkpoint_dir=file/run") == 1
    error = capsys.readouterr().err
    assert "file/run" in error
    assert "Traceback" not in error


def test_a_full_disk_is_one_message_and_leaves_nothing_torn(files, tmp_path):
    """A limit on the size of files does what a full disk does: the write fails."""
    command = [sys.executable, "-m", "tripletkit", "train", *use(files, "train", "val"), *QUICK]
    first = [*command, "--set=paths.checkpoint_dir=first", "--set=training.num_epochs=0"]
    subprocess.run(first, cwd=tmp_path, check=True)  # builds the caches
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "checkpoint_best.pt: cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    paths = run_paths(tmp_path / "checkpoints")
    assert not paths.saved()
    assert not list(paths.root.glob("*.tmp"))


def test_brackets_in_a_path_are_not_markup(run, files, capsys):
    arguments = [*use(files, "train"), *QUICK, "--set=paths.checkpoint_dir=r[blue]m[/x]"]
    assert run("train", *arguments) == 0
    assert "r[blue]m[/x]" in capsys.readouterr().out


def test_missing_data_is_exit_3(run, capsys):
    assert run("train", "--set=paths.train_parquet_path=nowhere.parquet") == 3
    error = capsys.readouterr().err
    assert "nowhere.parquet" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["--set=paths.train_parquet_path=gone.parquet"], 3)]
)
def test_training_on_what_is_not_there_makes_nothing(run, tmp_path, arguments, code):
    assert run("train", *arguments) == code
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_a_usage_error(run, files, tmp_path, capsys):
    """Whatever it is: one exit code."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "train.parquet").write_text("precious")
    metadata = f"--set=paths.difficulty_metadata_path={there}/train.parquet"
    for arguments in (
        ["init", there / "train.parquet"],
        ["data", "split", files / "train.parquet", there],
        ["data", "bands", *use(files, "train"), metadata],
        ["data", "bands", *use(files, "train"), metadata, "--cluster=local"],
    ):
        assert run(*map(str, arguments)) == 2, arguments
        assert "train.parquet exists" in capsys.readouterr().err
    assert (there / "train.parquet").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("evaluate --split t", ["test", "train"]),
        ("report --split v", ["val"]),
        ("export folder --format ", ["onnx", "safetensors"]),
        ("embed a b --dtype ", ["float16", "float32"]),
        ("train --set training.marg", ["training.margin="]),
    ],
)
def test_tab_completes_values(words, offered):
    loaded = "import sys, tripletkit.cli as c\ntry:\n c.main()\nfinally:\n"
    loaded += " assert not {'numpy', 'torch', 'plotly'} & {*sys.modules}"
    place = len(words.split(" "))
    done = subprocess.run(
        [sys.executable, "-c", loaded],
        env={
            **os.environ, "_TRIPLETKIT_COMPLETE": "complete_bash",
            "COMP_WORDS": f"tripletkit {words}", "COMP_CWORD": str(place),
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert sorted(done.stdout.split()) == offered, done.stderr


def test_a_gpu_that_is_not_there_is_exit_1(run, files, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("train", *use(files, "train"), *QUICK, "--set=training.device=cuda") == 1
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_says_so(capsys):
    def broken():
        raise ZeroDivisionError

    assert cli.run(broken) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    assert "this is a bug in tripletkit" in error


def test_the_whole_tour(run, files, tmp_path, capsys):
    common = use(files, "train", "val", "test")
    bands = "--set=paths.difficulty_metadata_path=bands.parquet"
    assert run("data", "check", *common) == 0
    assert "no building is in two splits" in capsys.readouterr().out
    assert run("data", "bands", *common, bands, "--neighbors=20", "--k0=5") == 0
    assert run("data", "bands", *common, bands) == 2  # does not overwrite
    assert run("data", "check", *common, bands) == 0
    assert "7 difficulty bands" in capsys.readouterr().out
    assert run("train", *common, bands, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "raw" in printed
    assert "map@r" in printed
    paths = run_paths(tmp_path / "checkpoints")
    assert paths.final.exists()
    assert "epoch 2/2" in paths.log.read_text()
    shares = json.loads(paths.metrics.read_text().splitlines()[-1])["bands"]["share"]
    assert len(shares) == 8
    assert run("evaluate", *common, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split"] == "test"
    assert report["head"]["map@r"] > report["raw"]["map@r"]
    # the effective configuration reproduces the run
    assert run("train", f"--config={paths.config}", "--set=paths.checkpoint_dir=again") == 0
    again = run_paths(tmp_path / "again")
    assert again.metrics.read_bytes() == paths.metrics.read_bytes()


def test_environment_alone_through_the_module(files, tmp_path):
    environ = {
        **os.environ,
        "TRIPLET_TRAINING_TRAIN_PARQUET_PATH": str(files / "train.parquet"),
        "TRIPLET_TRAINING_NUM_EPOCHS": "1",
        "TRIPLET_TRAINING_SCRATCH_DIR": str(tmp_path),
    }
    subprocess.run(
        [sys.executable, "-m", "tripletkit.train"], env=environ, cwd=tmp_path, check=True
    )
    assert run_paths(tmp_path / "checkpoints").final.exists()


def test_config_file_through_the_module(files, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        f'[paths]\ntrain_parquet_path = "{files}/train.parquet"\n[training]\nnum_epochs = 1\n'
    )
    command = [sys.executable, "-m", "tripletkit.train", "--config", str(path)]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert run_paths(tmp_path / "checkpoints").final.exists()


def test_a_storage_path_on_the_command_line_beats_the_address_in_the_file(run, files, tmp_path):
    (tmp_path / "config.toml").write_text(
        "[tuning]\nstorage_url = 'postgresql://me@127.0.0.1:1/production'\n"
    )
    arguments = [*use(files, "train", "val"), "--cluster=here", "--prepare"]
    assert run("tune", *arguments, "--storage-path=test.journal") == 0
    assert (tmp_path / "test.journal").exists()


def test_interrupted_run_saves_exits_130_and_goes_on(files, tmp_path):
    command = [
        sys.executable, "-m", "tripletkit", "train", *use(files, "train", "val"),
        "--set=training.batch_size=4", "--set=training.num_epochs=30",
        "--set=logging.log_every_n_batches=1", "--set=training_model.hidden_dim=16",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 2/30 loss" in line:
                process.send_signal(signal.SIGTERM)
                break
        errors = process.stderr.read()
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert run_paths(tmp_path / "checkpoints").last.exists()
    done = subprocess.run(
        [*command, "--set=training.num_epochs=3"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    assert "resuming from" in done.stderr


def test_leakage_between_splits_stops_before_training(run, files, tmp_path, capsys):
    toy.write_parquet(tmp_path / "leak.parquet", first=10, dim=16)
    arguments = [*use(files, "train"), f"--set=paths.val_parquet_path={tmp_path}/leak.parquet"]
    assert run("train", *arguments) == 3
    assert "are in both train" in capsys.readouterr().err


def test_widths_must_agree(run, files, tmp_path, capsys):
    toy.write_parquet(tmp_path / "narrow.parquet", first=500, dim=8)
    arguments = [*use(files, "train"), f"--set=paths.val_parquet_path={tmp_path}/narrow.parquet"]
    assert run("train", *arguments) == 3
    assert "narrow.parquet" in capsys.readouterr().err
    assert run("train", *use(files, "train"), "--set=training_model.input_dim=99") == 3


def test_split_then_train(run, tmp_path):
    toy.write_parquet(tmp_path / "all.parquet", buildings=60, dim=16)
    assert run("data", "split", "all.parquet", "parts") == 0
    assert run("train", *use(tmp_path / "parts", "train", "val"), *QUICK) == 0


def test_evaluate_without_a_checkpoint_says_what_to_do(run, files, capsys):
    assert run("evaluate", *use(files, "test")) == 3
    assert "train first" in capsys.readouterr().err


def test_evaluate_takes_the_architecture_from_the_checkpoint(run, files, capsys):
    assert run("train", *use(files, "train"), *QUICK) == 0
    assert run("evaluate", *use(files, "test"), "--set=training_model.hidden_dim=99") == 0


def test_subsampling_takes_whole_buildings(run, files, tmp_path):
    arguments = [*use(files, "train"), *QUICK, "--set=training.sample_buildings=10"]
    assert run("train", *arguments) == 0
    lines = run_paths(tmp_path / "checkpoints").metrics.read_text().splitlines()
    assert json.loads(lines[1])["step"] == 2  # 40 anchors in batches of 32
