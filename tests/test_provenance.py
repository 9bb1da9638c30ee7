"""provenance.json: what it says of code, data and machine, and that it costs no run anything."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from tests.test_loop import data, make_config, paths, run  # noqa: F401 - fixtures
from tripletkit import fsio, provenance, repository
from tripletkit.paths import StudyPaths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.loop import train

COMMAND = Path(sys.executable).with_name("tripletkit")
ME = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
}  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env={**os.environ, **ME}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path) -> Path:
    """A repository with one commit of `model.py` and `picture.bin`."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / "model.py").write_text("margin = 1\n")
    (folder / "picture.bin").write_bytes(bytes(range(256)))
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a state")


def state(folder: Path) -> repository.State:
    found = repository.state(folder)
    assert found is not None
    return found


# --- the state of a repository ---------------------------------------------------------------


def test_a_clean_repository_is_its_commit(project):
    (project / "sub").mkdir()
    found = state(project / "sub")
    assert found == repository.State(
        root=project, commit=git(project, "rev-parse", "HEAD"), branch="main", remote=None,
        changes=0, untracked=(), diff=b"", cut=False,
    )  # fmt: skip


def test_the_diff_brings_the_changes_back(project):
    (project / "model.py").write_text("margin = 2\n")
    (project / "picture.bin").write_bytes(b"\0 other")
    (project / "staged.py").write_text("new = 1\n")
    git(project, "add", "staged.py")
    found = state(project)
    assert found.changes == 3
    git(project, "reset", "--quiet", "--hard")
    (project.parent / "changes").write_bytes(found.diff)
    git(project, "apply", str(project.parent / "changes"))
    assert (project / "model.py").read_text() == "margin = 2\n"
    assert (project / "picture.bin").read_bytes() == b"\0 other"
    assert (project / "staged.py").read_text() == "new = 1\n"


def test_of_untracked_files_the_name_is_known_and_not_the_content(project):
    (project / "notes ü.txt").write_text("hunter2")
    (project / "big").mkdir()
    for number in range(5):
        (project / "big" / f"{number}.npy").touch()
    (project / ".gitignore").write_text("*.tmp\n")
    (project / "ignored.tmp").touch()
    found = state(project)
    assert found.untracked == (".gitignore", "big/", "notes ü.txt")
    assert (found.changes, found.diff) == (0, b"")


def test_before_the_first_commit_and_without_a_branch(tmp_path, project):
    new = tmp_path / "new"
    new.mkdir()
    git(new, "init", "--quiet", "--initial-branch", "trunk")
    (new / "a.py").write_text("a\n")
    git(new, "add", "a.py")
    found = state(new)
    assert (found.commit, found.branch, found.changes, found.diff) == (None, "trunk", 1, b"")
    git(project, "checkout", "--quiet", "--detach")
    assert state(project).branch is None


def test_a_folder_outside_of_repositories_and_a_machine_without_git(tmp_path, project, monkeypatch):
    assert repository.state(tmp_path) is None
    assert repository.state(tmp_path / "gone") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert repository.state(project) is None


def test_what_lies_in_a_repository_without_being_part_of_it(project):
    installed = project / "venv" / "package.py"
    installed.parent.mkdir()
    installed.touch()
    assert repository.state(installed.parent, holding=installed) is None
    assert repository.state(project, holding=project / "model.py") is not None


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:hunter2@git.example/lab/code.git", "https://git.example/lab/code.git"),
        ("https://hunter2@git.example/code", "https://git.example/code"),
        ("https://git.example/code?token=hunter2", "https://git.example/code"),
        ("ssh://git@git.example/code", "ssh://git.example/code"),
        ("git@git.example:lab/code.git", "git@git.example:lab/code.git"),
    ],
)
def test_the_remote_is_known_without_its_credentials(project, address, shown):
    git(project, "remote", "add", "origin", address)
    assert state(project).remote == shown


def test_what_looks_like_a_secret_is_blanked_in_the_diff(project):
    (project / "model.py").write_text(
        "margin = 2\nAPI_KEY = 'hunter2'\nurl = 'postgresql://me:hunter2@host/db'\n"
        'webhook: "https://hooks.example/hunter2"\n'
    )
    found = state(project).diff
    assert b"hunter2" not in found
    assert b"+margin = 2\n" in found
    assert b"+API_KEY = '***'\n" in found


def test_a_long_diff_is_cut_and_says_so(project, monkeypatch):
    monkeypatch.setattr(repository, "MOST_BYTES", 1000)
    (project / "model.py").write_text("x = 1\n" * 10_000)
    found = state(project)
    assert found.cut
    assert len(found.diff) == 1000


def test_a_git_that_hangs_is_not_waited_for(tmp_path, project, monkeypatch):
    """At any question: a repository may be as large as its disk is slow."""
    real = shutil.which("git")
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    monkeypatch.setattr(repository, "SECONDS", 0.3)
    commit_ = state(project).commit
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    for question, known in (("rev-parse", None), ("status", commit_), ("diff", commit_)):
        (project / "model.py").write_text("margin = 3\n")
        fake.write_text(
            f'#!/bin/sh\ncase " $* " in *" {question} "*) sleep 1000 & wait;; esac\n'
            f'exec {real} "$@"\n'
        )
        fake.chmod(0o700)
        found = repository.state(project)
        assert (found and found.commit) == known, question
        if found is not None:
            assert found.changes is None
            assert found.diff == b""


def trap(folder: Path, name: str) -> str:
    """A program that leaves a trace in `folder` when it is run."""
    program = folder / f"trap-{name}"
    program.write_text(f"#!/bin/sh\ntouch {folder}/ran-{name}\ncat\n")
    program.chmod(0o700)
    return str(program)


def test_nothing_that_a_hostile_repository_names_is_run(tmp_path, project):
    traps = tmp_path / "traps"
    traps.mkdir()
    (project / ".gitattributes").write_text("*.py filter=evil diff=evil\n*.bin filter=worse\n")
    commit(project)
    for key in ("core.fsmonitor", "diff.external", "diff.evil.textconv", "diff.evil.command",
                "filter.evil.clean", "filter.worse.process", "core.pager", "core.sshCommand",
                "remote.origin.vcs", "core.editor", "diff.orderFile"):  # fmt: skip
        git(project, "config", key, trap(traps, key))
    git(project, "config", "filter.evil.required", "true")
    git(project, "config", "filter.worse.required", "true")
    git(project, "config", "remote.origin.promisor", "true")
    git(project, "config", "remote.origin.url", f"ext::{trap(traps, 'ext')}")
    hooks = traps / "hooks"
    hooks.mkdir()
    git(project, "config", "core.hooksPath", str(hooks))
    shutil.copy(trap(traps, "hook"), hooks / "post-index-change")
    for name in ("model.py", "picture.bin"):
        (project / name).write_bytes(b"changed\n")

    found = state(project)
    assert not list(traps.glob("ran-*"))
    assert found.changes == 2
    assert b"+changed" in found.diff

    for arguments in (("status",), ("diff", "--ext-diff"), ("update-index", "--refresh")):
        subprocess.run(["git", *arguments], cwd=project, capture_output=True)
    assert len(list(traps.glob("ran-*"))) >= 3  # the traps would have worked


def test_a_driver_that_cannot_be_switched_off_ends_the_questions(tmp_path, project):
    (project / ".gitattributes").write_text("*.py filter=a=b\n")
    commit(project)
    with (project / ".git" / "config").open("a") as file:
        file.write(f'[filter "a=b"]\n\tclean = {trap(tmp_path, "clean")}\n')
    (project / "model.py").write_text("margin = 7\n")
    found = state(project)
    assert (found.changes, found.diff) == (None, b"")
    assert not list(tmp_path.glob("ran-*"))


# --- secrets on the command line -------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["train", "--set", "training.margin=0.3"], ["train", "--set", "training.margin=0.3"]),
        (["tune", "--webhook", "https://h.example/S/hunter2"], ["tune", "--webhook", "***"]),
        (["tune", "--webhook=https://h.example/S/hunter2"], ["tune", "--webhook=***"]),
        (["--set", "tuning.storage_url=postgresql://a:hunter2@h/d"],
         ["--set", "tuning.storage_url=***"]),
        (["--storage-url", "postgresql://a@h/d?password=hunter2", "-v"],
         ["--storage-url", "***", "-v"]),
        (["-s", "slurm.setup=['export TOKEN=hunter2']"], ["-s", "slurm.setup=***"]),
        (["--storage-path", "postgresql://a:hunt/er2@h/d"],
         ["--storage-path", "postgresql://a:hunt"]),
        (["report", "https://h.example/services/hunter2"], ["report", "https://h.example"]),
        (["--storage-path", "host=h password=hunter2"],
         ["--storage-path", "host=h password=***"]),
    ],
)  # fmt: skip
def test_a_command_is_shown_without_secrets(given, shown):
    result = provenance.without_secrets(given)
    assert "hunter2" not in str(result)
    assert result == shown


# --- of a run --------------------------------------------------------------------------------


def test_a_run_says_where_it_comes_from(paths, data):  # noqa: F811
    run(paths, data, num_epochs=1)
    found = provenance.read(paths.root)
    (start,) = found["starts"]
    assert found["format_version"] == 1
    fingerprints = checkpoints.load(paths.final)["data"]
    assert {k: v["fingerprint"] for k, v in found["data"].items()} == fingerprints
    assert found["data"]["training embeddings"]["rows"] == 160
    assert found["data"]["training embeddings"]["buildings"] == 40
    assert found["data"]["difficulty bands"]["bands"] == 2
    assert start["config_digest"] == fsio.digest([paths.config.read_text()])
    assert start["started"] <= start["ended"]
    assert start["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert start["trainer"] | {"threads": 0} == {
        "device": "cpu", "precision": start["trainer"]["precision"], "placement": "device",
        "threads": 0, "processes": 1, "from_step": 0, "from_checkpoint": None,
    }  # fmt: skip
    assert start["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert start["machine"]["gpus"] == []
    assert paths.metrics.read_text().find(start["started"]) == -1


def test_a_resumed_run_has_two_starts(paths, data):  # noqa: F811
    steps = iter(range(7))
    train(make_config(paths), data, paths, should_stop=lambda: next(steps, None) is None)
    stopped_at = checkpoints.load(paths.last)["global_step"]
    run(paths, data)
    first, second = provenance.read(paths.root)["starts"]
    assert first["ended"] is not None
    assert (first["trainer"]["from_step"], second["trainer"]["from_step"]) == (0, stopped_at)


def die_at_the_third_step(paths, data) -> None:  # noqa: F811
    steps = iter(range(2))

    def should_stop() -> bool:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    train(make_config(paths), data, paths, should_stop=should_stop)


def test_a_killed_start_has_no_end(paths, data):  # noqa: F811
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=die_at_the_third_step, args=(paths, data))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (start,) = provenance.read(paths.root)["starts"]
    assert start["ended"] is None
    run(paths, data)
    first, second = provenance.read(paths.root)["starts"]
    assert (first["ended"], second["ended"] is None) == (None, False)


def test_what_a_kill_left_half_written_is_cleared_away(paths, data):  # noqa: F811
    paths.root.mkdir(parents=True)
    for name in (".provenance.json.17.tmp", ".code_0123.diff.17.tmp"):
        (paths.root / name).touch()
    run(paths, data, num_epochs=1)
    assert not list(paths.root.glob(".*.tmp"))


@pytest.mark.parametrize("content", ["{torn", "[]", '{"starts": 3}'])
def test_a_broken_file_is_named_and_replaced(paths, data, content, caplog):  # noqa: F811
    paths.root.mkdir(parents=True)
    paths.provenance.write_text(content)
    assert provenance.read(paths.root) is None
    assert str(paths.provenance) in caplog.text
    run(paths, data, num_epochs=1)
    assert len(provenance.read(paths.root)["starts"]) == 1


def test_no_run_fails_for_it(paths, data, caplog):  # noqa: F811
    (paths.provenance / "in the way").mkdir(parents=True)
    assert run(paths, data, num_epochs=1).status == "finished"
    assert f"{paths.provenance} is incomplete" in caplog.text


def test_a_run_from_before_there_was_provenance(paths, data):  # noqa: F811
    run(paths, data, num_epochs=0)
    paths.provenance.unlink()
    assert provenance.read(paths.root) is None
    assert provenance.newest(None) == {}


def test_trials_of_a_study_share_the_changes_to_the_code(
    tmp_path, project, data, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(project)
    (project / "model.py").write_text("margin = 9\n")
    study = StudyPaths(tmp_path / "study")
    for number in range(2):
        trial = study.trial(number)
        train(make_config(trial, num_epochs=0), data, trial)
        work = provenance.newest(provenance.read(trial.root))["code"]["work"]
        assert work["commit"] == git(project, "rev-parse", "HEAD")
        assert "+margin = 9" in provenance.code_diff(trial.root, work)
        assert not list(trial.root.glob("code_*"))
    (file,) = (p for p in study.root.glob("code_*") if p.stem == Path(work["diff"]).stem)
    assert file.stat().st_mode & 0o777 == 0o600
    shutil.copytree(trial.root, tmp_path / "elsewhere")
    shutil.copy(file, tmp_path / "elsewhere")
    assert "+margin = 9" in provenance.code_diff(tmp_path / "elsewhere", work)
    assert provenance.code_diff(trial.root, {"diff": "../../../etc/passwd"}) is None


def test_the_command_of_a_user_is_on_file_and_its_secrets_are_not(tmp_path, project):
    toy.write_parquet(tmp_path / "train.parquet", buildings=20)
    (project / "config.toml").write_text(
        f'[global]\nscratch_dir = "{tmp_path}/scratch"\n'
        f'[paths]\ntrain_parquet_path = "{tmp_path}/train.parquet"\n'
        '[training]\nnum_epochs = 0\ndevice = "cpu"\n'
    )
    git(project, "remote", "add", "origin", "https://me:hunter2@git.example/code")
    subprocess.run(
        [COMMAND, "train", "--set", "slurm.setup=['export KEY=hunter2']"],
        cwd=project, check=True, capture_output=True,
        env={**os.environ, "TRIPLET_TRAINING_SETUP": "hunter2", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (file,) = (tmp_path / "scratch").rglob("provenance.json")
    assert "hunter2" not in file.read_text()
    start = json.loads(file.read_text())["starts"][0]
    assert start["command"][1:] == ["train", "--set", "slurm.setup=***"]
    assert start["environment"]["OMP_NUM_THREADS"] == "1"
    assert start["environment"]["TRIPLET_TRAINING_SETUP"] == "***"
    assert start["code"]["work"]["root"] == str(project)
    assert start["code"]["work"]["remote"] == "https://git.example/code"
    assert "config.toml" in start["code"]["work"]["untracked"]
    assert start["trainer"]["threads"] == 1
