"""`tripletkit diff` and `tripletkit rerun`: real runs, and what is known to differ between them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests import fleet, toy
from tests.test_loop import data, paths, run  # noqa: F401 - fixtures
from tripletkit import cli, compare, fsio, repository
from tripletkit import config as configuration
from tripletkit.errors import ConfigError, DataError
from tripletkit.paths import run_paths

TRAINING = {
    "num_epochs": 2, "batch_size": 32, "monitor": "map@r", "retrieval_metric_top_k": [1],
    "device": "cpu", "init": "random",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with data, config.toml, a finished run in `run` and a study of two trials."""
    folder = tmp_path_factory.mktemp("made")
    fleet.write_config(
        folder,
        paths={"checkpoint_dir": folder / "run"},
        training=TRAINING,
        tuning={"max_epochs": 2, "n_trials": 2},
    )
    for command in ("train", "tune"):
        assert call("-c", folder / "config.toml", command=command) == 0
    return folder


def call(*arguments: object, command: str) -> int:
    words = [command, *map(str, arguments), *(["--cluster", "here"] if command == "tune" else [])]
    threads = torch.get_num_threads()
    try:
        return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """A copy of it: everything that the configuration names is in there."""
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    for file in copy.rglob("*.toml"):
        file.write_text(file.read_text().replace(str(made), str(copy)))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    return copy


def differences(*runs: object, capsys) -> dict:
    capsys.readouterr()
    assert call(*runs, "--json", command="diff") == 0
    return json.loads(capsys.readouterr().out)


# --- rerun -----------------------------------------------------------------------------------


def test_a_rerun_is_identical(folder, capsys):
    assert call("run", command="rerun") == 0
    output = capsys.readouterr().out
    again = run_paths(folder / "run-rerun")
    assert "result: identical, every epoch and every weight\n" in output
    assert again.metrics.read_bytes() == (folder / "run/metrics.jsonl").read_bytes()
    assert json.loads(again.rerun_of.read_text()) == {"run": str(folder / "run")}
    assert call("run", command="rerun") == 0  # that one is finished: the next
    assert run_paths(folder / "run-rerun-2").final.exists()


def test_it_takes_as_many_threads_as_the_run_had(folder):
    file = run_paths(folder / "run").provenance
    found = json.loads(file.read_text())
    other = torch.get_num_threads() + 2
    found["starts"][-1]["trainer"]["threads"] = other
    file.write_text(json.dumps(found))
    assert call("run", command="rerun") == 0
    again = json.loads(run_paths(folder / "run-rerun").provenance.read_text())
    assert again["starts"][0]["trainer"]["threads"] == other


def test_an_interrupted_rerun_goes_on(folder, capsys):
    started = run_paths(folder / "run-rerun")
    assert call("run", command="rerun") == 0
    started.final.unlink()
    (started.checkpoints / "checkpoint_best.pt").rename(started.last)  # as after a kill
    capsys.readouterr()
    assert call("run", command="rerun") == 0
    assert f"rerun of {folder}/run: {folder}/run-rerun\n" in capsys.readouterr().out
    assert started.metrics.read_bytes() == (folder / "run/metrics.jsonl").read_bytes()
    assert not (folder / "run-rerun-2").exists()


def test_a_trial_is_rerun_as_a_plain_run(folder, capsys):
    assert call("trial:1", command="rerun") == 0
    assert "result: identical" in capsys.readouterr().out
    again = folder / "trials/small/trial_00001-rerun"
    assert configuration.load(again / "config.toml", environ={}).checkpoint_dir == again
    assert not (again / "attempts.jsonl").exists()


def test_a_pruned_trial_is_trained_to_the_end_and_compared_as_far_as_it_went(folder, capsys):
    trial = run_paths(folder / "trials/small/trial_00000")
    lines = trial.metrics.read_text().splitlines(keepends=True)
    trial.metrics.write_text("".join(lines[:2]))  # epochs 0 and 1
    trial.final.unlink()
    assert call("0", command="rerun") == 0
    output = capsys.readouterr().out
    assert "metrics: the same up to epoch 1, where one of them ends" in output
    again = run_paths(folder / "trials/small/trial_00000-rerun")
    assert again.metrics.read_text() == "".join(lines)


def test_other_data_is_refused_by_name_unless_it_is_wanted(folder, capsys):
    toy.write_parquet(folder / "val.parquet", buildings=41, first=1000, dim=32, noise=1.0)
    assert call("run", command="rerun") == DataError.exit_code
    error = capsys.readouterr().err
    assert "these differ: validation embeddings\n" in error
    assert "training embeddings" not in error
    assert not (folder / "run-rerun").exists()
    assert call("run", "--anyway", command="rerun") == 0
    assert "metrics: different from the start\n" in capsys.readouterr().out


def test_data_that_is_gone_is_refused_and_may_be_elsewhere(folder, capsys):
    (folder / "train.parquet").rename(folder / "moved.parquet")
    assert call("run", "--anyway", command="rerun") == DataError.exit_code
    assert f"{folder}/train.parquet" in capsys.readouterr().err
    moved = f"paths.train_parquet_path={folder}/moved.parquet"
    assert call("run", "--set", moved, command="rerun") == 0
    assert "result: identical" in capsys.readouterr().out


def test_a_run_from_before_provenance_is_rerun_by_its_checkpoints(folder, capsys):
    (folder / "run/provenance.json").unlink()
    assert call("run", command="rerun") == 0
    captured = capsys.readouterr()
    assert "from before there was provenance" in captured.err
    assert "result: identical" in captured.out
    toy.write_parquet(folder / "train.parquet", buildings=99, dim=32)
    assert call("run", command="rerun") == DataError.exit_code
    assert "these differ: training embeddings\n" in capsys.readouterr().err


def test_what_may_keep_it_from_being_identical_is_said(folder, capsys):
    file = run_paths(folder / "run").provenance
    found = json.loads(file.read_text())
    start = found["starts"][0]
    start["versions"]["torch"] = "1.0"
    start["machine"]["cpu"] = "abacus"
    start["code"]["tripletkit"] = {"commit": "0" * 40, "diff": None}
    found["starts"].insert(0, {**start, "config_digest": "another"})
    file.write_text(json.dumps(found))
    assert call("run", command="rerun") == 0
    error = capsys.readouterr().err
    assert "the run had 2 starts, not all with the same configuration" in error
    assert ", was 1.0" in error
    assert "the run did on abacus" in error
    assert "was commit 000000000000" in error


def test_a_folder_that_is_something_else_is_left_alone(folder, capsys):
    before = (folder / "run/metrics.jsonl").read_bytes()
    for other in ("run", "trials"):
        assert call("run", "--into", other, command="rerun") == ConfigError.exit_code
        assert f"{folder}/{other} exists, and is no rerun of" in capsys.readouterr().err
    assert (folder / "run/metrics.jsonl").read_bytes() == before


def test_on_slurm_it_is_a_job_whose_ids_are_on_file(slurm, made, tmp_path, capsys):
    """On the account and partition of today; those that the run had are no more."""
    into, run, today = tmp_path / "again", tmp_path / "run", tmp_path / "today.toml"
    shutil.copytree(made / "run", run)
    then = configuration.load(run_paths(run).config, environ={})
    for file, values in (
        (run_paths(run).config, {"account": "gone", "partition": "gone", "mem": "1999M"}),
        (today, {"partition": "high", "mem": "2001M"}),
    ):
        fsio.write_text(file, configuration.dump(configuration.with_values(then, slurm=values)))
    words = (run, "--into", into, "--set", f"global.log_dir={tmp_path}/logs")
    assert call(*words, "-c", today, "--cluster", "slurm", command="rerun") == 0
    output = capsys.readouterr().out
    job = output.split("slurm job ")[1].split()[0]
    assert f"`tripletkit logs {job} -f` follows its log\n" in output
    assert f"when it is done: tripletkit diff {run} {into}\n" in output
    fleet.until(run_paths(into).final.exists, lambda: slurm.run("squeue"), deadline=180)
    fleet.wait_for_empty_queue(slurm, tmp_path / "logs", deadline=60)
    (start,) = json.loads(run_paths(into).provenance.read_text())["starts"]
    assert start["slurm"]["job"] == job
    assert start["slurm"]["account"] == fleet.ACCOUNT
    assert start["slurm"]["partition"] == "high"
    assert "nodes" in start["slurm"]
    assert configuration.load(run_paths(into).config, environ={}).slurm.mem == "1999M"
    assert "array_job" not in start["slurm"]
    found = differences(made / "run", into, capsys=capsys)
    assert found["machine"]["slurm job"] == [None, job]
    assert found["result"]["a"]["best"].keys() == found["result"]["b"]["best"].keys()


# --- diff ------------------------------------------------------------------------------------


def test_a_run_and_itself(folder, capsys):
    assert call("run", "run", command="diff") == 0
    output = capsys.readouterr().out.splitlines()
    how = "finished, 2 epochs"
    assert output[0].startswith(f"a: {folder}/run: {how}")
    assert output[2:6] == [
        "result: identical, every epoch and every weight",
        "configuration: the same",
        "paths: the same",
        "data: the same (training embeddings 800, validation embeddings 160)",
    ]
    assert output[6].startswith("code: the same")
    assert output[7:] == ["machine: the same"]


def test_trials_differ_in_what_the_study_chose(folder, capsys):
    found = differences("0", "trial:1", capsys=capsys)
    settings = found["configuration"]["settings"]
    assert settings.keys() == {"training.learning_rate", "training.margin"}
    for number, side in enumerate("ab"):
        trial = folder / f"trials/small/trial_{number:05d}"
        assert found[side] == str(trial)
        own = configuration.load(trial / "config.toml", environ={}).training
        assert settings["training.margin"][number] == own.margin
        assert settings["training.learning_rate"][number] == own.learning_rate
        lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        best = max(lines, key=lambda record: record["map@r"])
        result = found["result"][side]
        assert result["best"]["map@r"] == best["map@r"]
        assert result["last"]["val_loss"] == lines[-1]["val_loss"]
        assert result["raw"] == lines[0]["raw"]
        assert (result["status"], result["epochs"]) == ("finished", 2)
    assert all(each["same"] for each in found["data"].values())
    assert found["code"]["versions"] == {}


def test_what_is_known_to_differ_is_found(paths, data, capsys):  # noqa: F811
    """Keys, a data file, a version, a commit with changes, a machine; and the result."""
    run(paths, data, num_epochs=2)
    found = json.loads(paths.provenance.read_text())
    found["starts"][0]["code"]["tripletkit"] = {"commit": "e" * 40, "diff": None}
    paths.provenance.write_text(json.dumps(found))
    other = run_paths(paths.root.with_name("other"))
    run(other, data, num_epochs=1, margin=0.25)
    found = json.loads(other.provenance.read_text())
    start = found["starts"][0]
    start["versions"]["numpy"] = "0.9"
    start["host"] = "elsewhere"
    start["code"]["tripletkit"] = {"commit": "f" * 40, "diff": "code_00.diff"}
    found["data"]["training embeddings"] |= {"fingerprint": "0123456789abcdef", "rows": 7}
    other.provenance.write_text(json.dumps(found))
    other.code("00").write_text("diff --git a/x.py b/x.py\n@@ -1 +1 @@\n-a\n+b\n")

    assert call(paths.root, other.root, command="diff") == 0
    output = capsys.readouterr().out
    assert "training.margin: 0.5 -> 0.25\n" in output
    assert "training.num_epochs: 2 -> 1\n" in output
    assert "global.seed" not in output
    assert "training embeddings: 160 rows, 40 buildings" in output
    assert "-> 7 rows, 40 buildings, fingerprint 0123456789ab\n" in output
    assert "validation embeddings 160: the same" in output
    assert "commit eeeeeeeeeeee -> commit ffffffffffff and changes\n" in output
    assert "changes that were not committed differ in x.py\n" in output
    assert "    +-a\n    ++b\n" in output
    assert "-> 0.9\n" in output
    assert '-> "elsewhere"\n' in output
    assert "metrics: different from the start\n" in output  # the margin shapes val_loss

    a, b = (
        max(map(json.loads, p.metrics.read_text().splitlines()), key=lambda r: r["map@r"])["map@r"]
        for p in (paths, other)
    )
    assert f"best map@r {a:.4f} -> {b:.4f}" in output
    assert "val_loss" in output
    assert "spread" not in output


def test_changes_that_differ_in_a_secret_only_are_other_code_and_say_so(folder, capsys):
    shutil.copytree(folder / "run", folder / "other")
    for name, key in (("run", "00"), ("other", "11")):
        run_ = run_paths(folder / name)
        found = json.loads(run_.provenance.read_text())
        found["starts"][0]["code"]["work"] = {"commit": "f" * 40, "diff": f"code_{key}.diff"}
        run_.provenance.write_text(json.dumps(found))
        run_.code(key).write_text(
            f"diff --git a/x.py b/x.py\nindex 77..{key} 100644\n@@ -1 +1 @@\n-a\n+token***\n"
        )
    assert call("run", "other", command="diff") == 0
    output = capsys.readouterr().out
    assert "commit ffffffffffff and changes -> commit ffffffffffff and changes\n" in output
    assert "changes that were not committed differ only in what is blanked\n" in output


def test_weights_that_differ_are_told_by_how_much(paths, data):  # noqa: F811
    run(paths, data, num_epochs=0)
    other = run_paths(paths.root.with_name("other"))
    shutil.copytree(paths.root, other.root)
    state = torch.load(other.final, weights_only=True)
    state["model_state_dict"]["output_layer.bias"][3] += 0.5
    torch.save(state, other.final)
    found = compare.compare(compare.open_run(paths.root), compare.open_run(other.root))
    apart = found["result"]["weights"]
    assert apart["checkpoint_best.pt"]["identical"]
    assert not apart["checkpoint_final.pt"]["identical"]
    assert apart["checkpoint_final.pt"]["largest"] == pytest.approx(0.5)
    assert found["result"]["history"]["same"] == "all"
    assert not compare.is_identical(found)


def test_runs_without_provenance_compare_by_configuration_and_checkpoints(folder, capsys):
    for file in folder.rglob("provenance.json"):
        file.unlink()
    found = differences("0", "1", capsys=capsys)
    assert found["configuration"]["settings"].keys() == {
        "training.learning_rate", "training.margin",
    }  # fmt: skip
    assert {name: each["same"] for name, each in found["data"].items()} == {
        "training embeddings": True, "validation embeddings": True,
    }  # fmt: skip
    assert found["code"] == {"known": False, "versions": {}, "repositories": {}}
    assert call("0", "1", command="diff") == 0
    assert "code: not on file of both\n" in capsys.readouterr().out


def test_a_configuration_of_another_version_is_compared_too(folder, capsys):
    file = folder / "run/config.toml"
    shutil.copytree(folder / "run", folder / "older")
    older = folder / "older/config.toml"
    text = file.read_text().replace("\n[training]\n", '\n[training]\nan_old_key = "x"\n')
    older.write_text("\n".join(line for line in text.splitlines() if "margin = " not in line))
    found = differences("older", "run", capsys=capsys)
    assert found["configuration"]["settings"] == {"training.an_old_key": ["x", None]}


def test_setup_lines_are_not_repeated(folder, capsys):
    shutil.copytree(folder / "run", folder / "other")
    file = folder / "other/config.toml"
    file.write_text(file.read_text().replace("export OMP_NUM_THREADS=1", "export TOKEN=hunter2"))
    assert call("run", "other", command="diff") == 0
    output = capsys.readouterr().out
    assert "slurm.setup" in output
    assert "hunter2" not in output


def test_what_is_no_run_is_said_with_where_was_looked(folder, capsys):
    assert call("run", "nonsense", command="diff") == ConfigError.exit_code
    assert "there is no run 'nonsense'" in capsys.readouterr().err
    assert call("run", "trials", command="diff") == ConfigError.exit_code
    assert "trials is not the folder of a run" in capsys.readouterr().err


def test_two_sets_of_changes_are_compared_file_by_file():
    def changes(**files: str) -> str:
        return "".join(
            f"diff --git a/{name}.py b/{name}.py\nindex 11..{hash(text) % 97} 100644\n"
            f"@@ -{len(text)},3 +1,3 @@ def f\n{text}"
            for name, text in files.items()
        )

    same = "-old\n+new\n"
    a = changes(both=same, ours="-x\n", edited="-1\n+2\n")
    b = changes(theirs="+y\n", edited="-1\n+3\n", both=same)
    assert repository.diff_of_diffs(a, a) == ""
    lines = repository.diff_of_diffs(a, b).splitlines()
    assert [line for line in lines if line.startswith("---")] == [
        "--- a: ours.py", "--- a: edited.py", "--- a: theirs.py",
    ]  # fmt: skip
    assert "--x" in lines
    assert "++y" in lines
    assert "-+2" in lines
    assert "++3" in lines
    long = changes(big="+x\n" * (repository.LONG + 1))
    assert "too long to show" in repository.diff_of_diffs(long, a)
