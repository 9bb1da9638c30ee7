"""provenance.json: what it says of code, data and machine, and that it costs no run anything."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import toy
from tests.test_loop import data, make_config, paths, run  # noqa: F401 - fixtures
from tripletkit import cli, fsio, provenance, repository
from tripletkit.paths import StudyPaths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.loop import train

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
        ("https://me:hunt/er@hunter2@git.example/code", "https://git.example/code"),
        ("https://git.example/code?token=hunter2", "https://git.example/code"),
        ("ssh://git@git.example/code", "ssh://git.example/code"),
        ("git@git.example:lab/code.git", "git@git.example:lab/code.git"),
    ],
)
def test_the_remote_is_known_without_its_credentials(project, address, shown):
    git(project, "remote", "add", "origin", address)
    assert state(project).remote == shown


SECRET_LINES = {
    "export WANDB_API_KEY=hunter2": "export WANDB_API_KEY=***",
    "AWS_SECRET_ACCESS_KEY=hunter2": "AWS_SECRET_ACCESS_KEY=***",
    "password: hunter2": "password: ***",
    "  'token' :  'hunter2', 'margin': 1": "  'token' :  ***",
    'os.environ["API_KEY"] = "hunter2"': 'os.environ["API_KEY"] = ***',
    'password = """hunter2"""': "password = ***",
    'setup = ["export HF_TOKEN=hunter2"]': 'setup = ["export HF_TOKEN=***',
    'headers = {"X": "Bearer hunter2"}': 'headers = {"X": "Bearer***',
    "hf upload --token hunter2": "hf upload --token***",
    'wandb.login(key="hunter2")': "wandb.login(key=***",
    'post("https://hooks.example/services/hunter2")': 'post("https://hooks.example***',
    "postgresql://ada:hunt/er2@db/d": "postgresql://***",
    "postgresql://ada:hunter2@db/d?x=y@hunter2": "postgresql://***",
    "# see https://docs.example:8080": "# see https://docs.example:8080",
    "margin = 2": "margin = 2",
}


def test_what_may_be_a_secret_is_blanked_in_the_diff(project):
    (project / "token.txt").touch()  # a name in a header is left alone
    (project / "model.py").write_text("password = 'hunter2'\n\n\n\n\nmargin = 1\n")
    commit(project)
    (project / "token.txt").write_text("-- hunter\n")
    (project / "model.py").write_text(
        "password = 'hunter2'\n\n\n\n\n" + "\n".join(SECRET_LINES) + "\n"
    )
    found = state(project).diff.decode()
    assert "hunter2" not in found
    assert "er2@" not in found
    lines = found.splitlines()
    assert [each[1:] for each in lines if each.startswith("+") and each[1:3] != "++"] == [
        *SECRET_LINES.values(), "-- hunter",
    ]  # fmt: skip
    assert "+++ b/token.txt" in lines
    assert any(each.startswith("@@ ") and each.endswith(" @@ password = ***") for each in lines)


@given(st.text(), st.sampled_from(["password", "API_KEY", "Bearer", "hf_token", "credentials"]),
       st.sampled_from(["=", ": ", " = '", " ", '"] = "']))  # fmt: skip
def test_whatever_stands_before_the_name_what_follows_is_blanked(before, name, between):
    line = f"+{before}{name}{between}hunter2".replace("\n", " ").encode()
    assert b"hunter2" not in repository._blanked(b"@@ -1 +1 @@\n" + line)


def test_states_that_differ_in_a_secret_are_not_the_same_code(project):
    keys = set()
    for value in ("hunter2", "hunter3"):
        (project / "model.py").write_text(f"token = '{value}'\n")
        found = state(project).diff
        assert b"hunter" not in found
        keys.add(provenance._diff_key(found))
    assert len(keys) == 2


@pytest.mark.parametrize("line", [
    bytes(range(256)).hex() * 600, base64.b64encode(bytes(range(256)) * 900).decode(),
    "://" * 100_000, "token" * 60_000, "token" + " " * 300_000, "a." * 150_000,
], ids=lambda line: line[:6])  # fmt: skip
def test_a_long_line_takes_no_longer_than_many_short_ones(line):
    """With a search that takes the square of it, this takes hours."""
    diff = f"@@ -1 +1 @@\n+{line} password = 'hunter2'\n".encode()
    assert b"hunter2" not in repository._blanked(diff)
    (argument,) = provenance.without_secrets([f"{line} password=hunter2"])
    assert "hunter2" not in argument
    address = f"https://{line}@git.example/code"
    assert repository.without_credentials(address) == "https://git.example/code"


def test_a_long_diff_is_cut_and_says_so(project, monkeypatch):
    monkeypatch.setattr(repository, "MOST_BYTES", 1000)
    (project / "model.py").write_text("x = 1\n" * 10_000)
    found = state(project)
    assert found.cut
    assert len(found.diff) == 1000


@pytest.mark.parametrize(
    ("question", "known"),
    [
        ("rev-parse", ()),
        ("--untracked-files=no", ("commit", "branch")),
        ("diff", ("commit", "branch")),
        ("--untracked-files=normal", ("commit", "branch", "changes", "diff")),
    ],
)
def test_a_git_that_hangs_is_not_waited_for(tmp_path, project, monkeypatch, question, known):
    """At any question: a repository may be as large as its disk is slow."""
    (project / "model.py").write_text("margin = 3\n")
    whole = state(project)
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\ncase " $* " in *" {question} "*) sleep 1000 & wait;; esac\n'
        f'exec {shutil.which("git")} "$@"\n'
    )
    fake.chmod(0o700)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    answer = repository._output

    def patiently(command: list[str], environment: dict[str, str]) -> bytes:
        monkeypatch.setattr(repository, "SECONDS", 0.05 if question in command else 600)
        return answer(command, environment)

    monkeypatch.setattr(repository, "_output", patiently)
    found = repository.state(project)
    if not known:
        assert found is None
        return
    unknown = {"changes": None, "diff": b"", "untracked": None}
    for name in known:
        unknown.pop(name, None)
    assert found == whole._replace(**unknown)


def test_settings_that_name_a_folder_of_somebody_else_as_theirs(tmp_path, project):
    """Their repository lists the file, ours has the content, and a diff would show it."""
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / "model.py").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    git(project, "config", "core.worktree", str(victim))
    assert "PRIVATE KEY" in git(project, "diff", "HEAD")  # the trap would work
    assert repository.state(project) is None
    git(victim, "init", "--quiet")  # one of its own is not theirs either
    assert repository.state(project) is None


def test_submodules_and_further_work_trees_have_their_files_elsewhere_rightly(tmp_path, project):
    git(project, "worktree", "add", "--quiet", str(tmp_path / "second"))
    (tmp_path / "second" / "model.py").write_text("margin = 4\n")
    assert b"+margin = 4" in state(tmp_path / "second").diff
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "--quiet")
    git(
        outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(project), "in"
    )
    assert (outer / "in" / ".git").is_file()
    (outer / "in" / "model.py").write_text("margin = 5\n")
    assert b"+margin = 5" in state(outer / "in").diff
    assert state(outer / "in").root == outer / "in"


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
        (["-sslurm.setup=['export TOKEN=hunter2']"], ["-sslurm.setup=***"]),
        (['--set=slurm.setup=["a\\nb", "export X=hunter2"]'], ["--set=slurm.setup=***"]),
        (['--set=slurm.extra=["a\\n", "export WANDB_API_KEY=hunter2"]'],
         ['--set=slurm.extra=["a\\n", "export WANDB_API_KEY=***']),
        (["--set=tuning.storage_url=postgresql://a:hunter2/cd@h/d"],
         ["--set=tuning.storage_url=***"]),
        (["--storage-path", "postgresql://a:hunt/er2@h/d"], ["--storage-path", "postgresql://***"]),
        (["report", "https://h.example/services/hunter2"], ["report", "https://h.example***"]),
        (["--storage-path", "host=h password='a hunter2' user=u"],
         ["--storage-path", "host=h password=***"]),
        (["/lab/curl/setup/token/bin/tripletkit", "report", "/data/secret_3"],
         ["/lab/curl/setup/token/bin/tripletkit", "report", "/data/secret_3"]),
    ],
)  # fmt: skip
def test_a_command_is_shown_without_secrets(given, shown):
    result = provenance.without_secrets(given)
    assert "hunter2" not in str(result)
    assert "er2" not in str(result)
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


def test_a_start_with_nothing_left_to_do_is_none(paths, data):  # noqa: F811
    run(paths, data, num_epochs=1)
    before = [file.read_bytes() for file in (paths.provenance, paths.config)]
    run(paths, data, num_epochs=1, learning_rate=1e-5)  # of which nothing comes
    assert [file.read_bytes() for file in (paths.provenance, paths.config)] == before
    run(paths, data, num_epochs=2)
    assert len(provenance.read(paths.root)["starts"]) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from tripletkit import provenance
from tripletkit.config import Config
from tripletkit.paths import run_paths
with provenance.recorded(run_paths(Path(sys.argv[1])), Config(), {}, {"device": "cpu", "processes": 1}):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_start_has_no_end(paths, data):  # noqa: F811
    paths.root.mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", KILLED, str(paths.root)])
    assert done.returncode == -signal.SIGKILL
    (start,) = provenance.read(paths.root)["starts"]
    assert start["ended"] is None
    run(paths, data, num_epochs=0)
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


def test_the_command_of_a_user_is_on_file_and_its_secrets_are_not(tmp_path, project, monkeypatch):
    toy.write_parquet(tmp_path / "train.parquet", buildings=20)
    (project / "config.toml").write_text(
        f'[global]\nscratch_dir = "{tmp_path}/scratch"\n'
        f'[paths]\ntrain_parquet_path = "{tmp_path}/train.parquet"\n'
        '[training]\nnum_epochs = 0\ndevice = "cpu"\n'
    )
    git(project, "remote", "add", "origin", "https://me:hunter2@git.example/code")
    monkeypatch.chdir(project)
    monkeypatch.setenv("TRIPLET_TRAINING_SETUP", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    setup = "--set=slurm.setup=['export KEY=hunter2']"
    monkeypatch.setattr(sys, "argv", ["tripletkit", "train", setup])
    assert cli.run(lambda: cli.app(standalone_mode=False)) == 0
    (file,) = (tmp_path / "scratch").rglob("provenance.json")
    assert "hunter2" not in file.read_text()
    start = json.loads(file.read_text())["starts"][0]
    assert start["command"] == ["tripletkit", "train", "--set=slurm.setup=***"]
    assert start["environment"]["OMP_NUM_THREADS"] == "1"
    assert start["environment"]["TRIPLET_TRAINING_SETUP"] == "***"
    assert start["code"]["work"]["root"] == str(project)
    assert start["code"]["work"]["remote"] == "https://git.example/code"
    assert "config.toml" in start["code"]["work"]["untracked"]
