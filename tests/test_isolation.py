"""Other users of the machine: they read no secret, enter no database, and have us run no code."""

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import fleet, toy
from tests.cluster import ACCOUNT
from tripletkit import cli, fsio, inputs, notify
from tripletkit import config as configuration
from tripletkit.cluster import entry, launch
from tripletkit.config import Slurm
from tripletkit.data.store import open_store
from tripletkit.errors import ConfigError, DataError
from tripletkit.paths import LogPaths, run_paths
from tripletkit.train import checkpoint, loop
from tripletkit.tune import storage

PACKAGE = Path(configuration.__file__).parents[1]
STRANGER = 65534  # nobody
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user of the machine can enter; below tmp_path only its owner can."""
    with tempfile.TemporaryDirectory(prefix="shared-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def tripletkit(*arguments: str | Path) -> int:
    words = list(map(str, arguments))
    return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))


# --- rights of files -------------------------------------------------------------------------------

# What only its user may read, whatever the umask: addresses with tokens, what jobs unpickle, and
# changes to the code, from which not every secret can be told.
PRIVATE = (".webhook", "code_*.diff", "submitit", "submitit/*", "submitit/*/*")
# What a job writes there at its end, with its user's umask: nobody else gets into the folder, and
# nothing reads it.
RESULT = "submitit/*/*_result.pkl"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_every_file_has_the_rights_that_the_umask_leaves_and_secrets_have_none_for_others(
    tmp_path, monkeypatch, umask
):
    config = fleet.write_config(
        tmp_path, training={"num_epochs": 1}, tuning={"n_trials": 1, "max_epochs": 1}
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "address").write_text("http://127.0.0.1:9/token")
    bands = f"paths.difficulty_metadata_path={tmp_path}/bands.parquet"
    given = set(tmp_path.rglob("*"))
    for each in given:
        each.chmod(0o700 if each.is_dir() else 0o600)
    before = os.umask(umask)
    try:
        for command in (
            ("data", "split", tmp_path / "train.parquet", tmp_path / "splits"),
            ("data", "bands", "-c", config, "--set", bands),
            ("train", "-c", config, "--set", bands),
            ("tune", "-c", config, "--cluster", "here"),
            ("tune", "-c", config, "--cluster", "here", "--storage-path", "study.journal",
             "--study-name", "journal"),
            ("evaluate", "-c", config, "--split", "val"),
            ("report", "small", "-c", config, "--figures", tmp_path / "figures"),
            ("embed", tmp_path / "val.parquet", tmp_path / "embedded.parquet", "-c", config),
            ("export", tmp_path / "head", "-c", config, "--format", "safetensors"),
            ("tune", "-c", config, "--cluster", "here", "--prepare", "--n-trials", "2",
             "--webhook", tmp_path / "address"),
        ):  # fmt: skip
            assert tripletkit(*command) == 0, command
        background = launch.submit(
            launch.Job("tune", "tune:small", Slurm(gpus=0), tmp_path / "logs"), print,
            cluster="local",
        )  # fmt: skip
        (job_id,) = background.jobs
        os.waitpid(int(job_id.removeprefix("local-")), 0)  # it writes there until it has ended
    finally:
        os.umask(before)
    made = sorted(set(tmp_path.rglob("*")) - given)
    assert len(made) > 60
    seen = set()
    for path in made:
        name = path.relative_to(tmp_path)
        private = next((each for each in PRIVATE if name.match(each)), None)
        if name.match(RESULT):
            seen.add(RESULT)
            private = None
        seen.add(private)
        full = 0o777 if path.is_dir() else 0o666
        if name.name in ("study.db", "study.db-wal", "study.db-shm"):
            full = 0o644  # SQLite's own choice
        mode = stat.S_IMODE(path.lstat().st_mode)
        if private:
            assert mode & 0o077 == 0, f"{name} {mode:o}"
        elif not path.is_symlink():
            assert mode == full & ~umask, f"{name} {mode:o}"
    assert {".webhook", "submitit", RESULT} <= seen


# --- the database ------------------------------------------------------------------------------------

AS_STRANGER = """
import json, os, sys
import psycopg2
os.setgroups([]), os.setgid(65534), os.setuid(65534)  # what it has loaded, nobody might not reach
os.environ.clear()
folder, found = sys.argv[1], json.loads(sys.argv[2])
said = {}
for name in ("connection.json", "pgpass", "data/pg_hba.conf", "postgresql.log", "."):
    try:
        os.listdir(folder) if name == "." else open(os.path.join(folder, name)).close()
        said[name] = "open"
    except OSError as error:
        said[name] = type(error).__name__
for host in found["hosts"]:
    if host.startswith("/"):
        try:
            said[host] = os.listdir(host)
        except OSError as error:
            said[host] = type(error).__name__
    for user in ("postgres", "tripletkit", "nobody"):
        for password in (None, "", "wrong"):
            try:
                psycopg2.connect(host=host, port=found["port"], user=user, password=password,
                                 dbname="tripletkit", connect_timeout=10)
                said[f"{host} {user} {password}"] = "in"
            except psycopg2.OperationalError as error:
                said[f"{host} {user} {password}"] = str(error)
print(json.dumps(said))
"""


@root_only
def test_a_stranger_neither_reads_nor_enters_the_database_and_sees_no_key(shared, monkeypatch):
    """Of another user, on the same machine, with the right address, the socket, or other names."""
    monkeypatch.setenv("WANDB_API_KEY", "marker-of-wandb")
    monkeypatch.setenv("TRIPLETKIT_WEBHOOK", "https://hooks.example/marker-of-webhook")
    monkeypatch.chdir(shared)
    folder = shared / "db"
    assert tripletkit("db", "up", folder, "--cluster", "local") == 0
    try:
        found = json.loads((folder / "connection.json").read_text())
        number, _, _, port, sockets, address, *_ = (
            (folder / "data/postmaster.pid").read_text().splitlines()
        )
        assert address == "127.0.0.1"
        request = {"hosts": [found["host"], sockets], "port": int(port)}
        done = subprocess.run(
            [sys.executable, "-c", AS_STRANGER, folder, json.dumps(request)],
            capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert len(said) == 5 + 1 + 2 * 3 * 3
        for where, answer in said.items():
            refused = ("PermissionError", "no password supplied", "authentication failed",
                       "Permission denied")  # fmt: skip
            assert any(each in answer for each in refused), (where, answer)
        rules = (folder / "data/pg_hba.conf").read_text().split()
        assert "trust" not in rules
        assert "scram-sha-256" in rules
        # It runs as the user postgres, who may have other processes here.
        assert b"marker" not in Path(f"/proc/{number}/environ").read_bytes()
    finally:
        assert tripletkit("db", "down", folder) == 0


# --- pickles -------------------------------------------------------------------------------------------


class Malice:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


# Those of these modules, ours among them, and Triton's, which reads a GPU's memory.
HARMLESS = ("json", "tomllib", "yaml.safe", "config", "checkpoint", "resident", "load", "tl.")


def test_nothing_of_ours_unpickles_files():
    """Every call that could, in the whole package; what is allowed is the whole list."""
    allowed = {
        ("train/checkpoint.py", "torch.load"),  # weights_only
        ("processes.py", "pickle.loads"),  # what it has pickled itself, in the same line
        (
            "train/resident.py",
            "ForkingPickler.loads",
        ),  # what the process that started it hands over
    }
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call, words = ast.unparse(node.func), ast.unparse(node)
            if call.rpartition(".")[2] in ("load", "loads", "Unpickler", "read_pickle"):
                if call.startswith(HARMLESS):
                    continue
                assert call != "torch.load" or "weights_only=True" in words, words
                found.add((str(file.relative_to(PACKAGE)), call))
            assert "allow_pickle" not in words
            assert call not in ("eval", "exec", "os.system", "os.popen")
            assert "shell=True" not in words
    assert found <= allowed, found - allowed


@pytest.fixture
def site(tmp_path):
    """A configuration, and a run that has ended."""
    config = configuration.load(
        fleet.write_config(tmp_path, training={"num_epochs": 1}), environ={}
    )
    paths = run_paths(config.checkpoint_dir)
    loop.train(config, inputs.training_data(config), paths)
    return config, paths


def test_a_checkpoint_that_would_run_code_is_refused_wherever_it_is_read(site, tmp_path, capsys):
    _, paths = site
    trace = tmp_path / "trace"
    torch.save({"model_state_dict": {}, "x": Malice(trace)}, tmp_path / "zip.pt")
    plain = {"model_state_dict": {}, "x": Malice(trace)}
    torch.save(plain, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malice(trace)))
    file = tmp_path / "config.toml"
    for kind in ("zip", "old", "bare"):
        evil = tmp_path / f"{kind}.pt"
        with pytest.raises(DataError, match=rf"{kind}\.pt"):
            checkpoint.load(evil)
        for place in (paths.best, paths.final):
            shutil.copy(evil, place)
        capsys.readouterr()
        fresh = f"paths.checkpoint_dir={tmp_path}/fresh_{kind}"
        resume = f"training.resume_from_checkpoint={evil}"
        for named, *command in (
            (paths.best, "train", "--set", "training.num_epochs=2"),
            (evil, "train", "--set", fresh, "--set", resume),
            (evil, "evaluate", "--split", "val", "--checkpoint", evil),
            (paths.best, "embed", tmp_path / "val.parquet", tmp_path / "out.parquet"),
            (paths.best, "export", tmp_path / "head"),
            (paths.best, "report"),
        ):
            code = tripletkit(*command, "-c", file)
            said = capsys.readouterr().err
            assert code == 3, (command, said)
            assert str(named) in said, (command, said)
            assert "Traceback" not in said
    assert not trace.exists()


def test_what_lies_in_the_cache_is_never_code(tmp_path):
    trace = tmp_path / "trace"
    toy.write_parquet(tmp_path / "x.parquet")
    cache = tmp_path / "cache"
    files = [p for p in open_store(tmp_path / "x.parquet", cache).folder.rglob("*") if p.is_file()]
    assert len(files) > 2
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(pickle.dumps(Malice(trace)))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            with contextlib.suppress(DataError, ValueError, OSError):  # another test's
                open_store(tmp_path / "x.parquet", cache)
        file.write_bytes(whole)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_what_a_study_holds_is_never_code(tmp_path, name):
    """Optuna keeps JSON: whoever can write to the storage can spoil trials, and no more."""
    trace = tmp_path / "trace"
    config = configuration.load(
        fleet.write_config(tmp_path, tuning={"storage_path": tmp_path / name}), environ={}
    )
    study = storage.create(config.tuning).study
    evil = pickle.dumps(Malice(trace), protocol=0).decode()
    study.set_user_attr("evil", evil)
    trial = study.ask()
    trial.set_user_attr("evil", evil)
    study.tell(trial, 0.5)
    shared = storage.open_study(config.tuning, seed=0, workers=1)
    assert shared.study.user_attrs["evil"] == shared.study.trials[0].user_attrs["evil"] == evil
    assert not trace.exists()
    with pytest.raises(TypeError):  # so no object ever gets there
        study.set_user_attr("object", Malice(trace))


# --- jobs ------------------------------------------------------------------------------------------------


class Touch:
    """The call of a job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> int:
        self.path.touch()
        return 0


def job(folder: Path) -> launch.Job:
    return launch.Job("train", "train:x", Slurm(gpus=0), folder)


def of_stranger(path: Path) -> None:
    for each in [path, *path.rglob("*")]:
        os.lchown(each, STRANGER, STRANGER)


def refused(folder: Path, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        launch.submit(job(folder), print, cluster="local")
    assert "global.log_dir" in caught.value.hint
    assert list(LogPaths(folder).submitit.iterdir()) == []


@root_only
def test_nothing_is_submitted_through_a_folder_of_somebody_else(tmp_path):
    LogPaths(tmp_path).submitit.mkdir()
    of_stranger(LogPaths(tmp_path).submitit)
    refused(tmp_path, r"belongs to another user \(uid 65534\)")


def test_nothing_is_submitted_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    LogPaths(tmp_path).submitit.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, "cannot be used")
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o755


def test_nothing_is_submitted_where_others_keep_the_right_to_write(tmp_path, monkeypatch):
    """As on a file system that keeps no rights."""
    LogPaths(tmp_path).submitit.mkdir()
    LogPaths(tmp_path).submitit.chmod(0o777)
    monkeypatch.setattr(Path, "chmod", lambda *_, **__: None)
    refused(tmp_path, r"can be written to by others \(mode 0777\)")


def planted(folder: Path, trace: Path, job_id: str) -> Path:
    """What somebody puts in the place of the folder that a job reads its call from."""
    from submitit.core.utils import DelayedSubmission

    folder.mkdir()
    folder.chmod(0o755)
    DelayedSubmission(Touch(trace)).dump(folder / f"{job_id}_submitted.pkl")
    return folder


def start_job(folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7"}
    return subprocess.run(
        [sys.executable, "-m", entry.__name__, folder], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip


def test_a_job_runs_what_lies_in_the_folder_of_its_user(tmp_path):
    done = start_job(planted(tmp_path / "own", tmp_path / "trace", "7"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trace").exists()


@root_only
@pytest.mark.parametrize("how", ["theirs", "link", "open"])
def test_a_job_whose_folder_was_exchanged_runs_nothing(tmp_path, how):
    folder = planted(tmp_path / "planted", tmp_path / "trace", "7")
    if how == "theirs":
        of_stranger(folder)
    elif how == "link":
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path / "planted")
    else:
        folder.chmod(0o775)
    done = start_job(folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder} ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "trace").exists()


def test_exchanged_after_the_look_it_is_still_the_folder_that_was_looked_at(tmp_path):
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "own/ours").touch()
    handle = entry.hold(tmp_path / "own")
    (tmp_path / "own").rename(tmp_path / "away")
    (tmp_path / "own").mkdir()
    assert [path.name for path in (entry.HELD / str(handle)).iterdir()] == ["ours"]
    os.close(handle)


@root_only
def test_on_slurm_a_pickle_of_somebody_else_is_not_run(slurm, tmp_path):
    """In a folder for logs that others can write to, while the job waits in the queue."""
    logs = LogPaths(tmp_path / "logs")
    held = launch.Job("train", "train:x", Slurm(gpus=0, mem="100M", cpus_per_task=1,
                      account=ACCOUNT), logs.root, dependency=f"afterok:{wait_for(slurm)}")  # fmt: skip
    (number,) = launch.submit(held, Touch(tmp_path / "ours"), cluster="slurm").jobs
    logs.submitit.rename(tmp_path / "taken away")
    of_stranger(planted(logs.submitit, tmp_path / "trace", number))
    slurm.run("scontrol", "update", f"JobId={number}", "Dependency=")
    slurm.wait_state(number, {"FAILED"}, deadline=180)
    said = logs.err("train", number).read_text()
    assert "belongs to another user (uid 65534)" in said
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "ours").exists()


def wait_for(slurm) -> str:
    """A job that never starts."""
    return slurm.sbatch("true", "--hold")


# --- links -----------------------------------------------------------------------------------------------


def test_what_is_written_replaces_a_link_and_does_not_follow_it(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name, write in {
        "a.json": lambda path: fsio.write_json(path, {"secret": 1}),
        "a.txt": lambda path: fsio.write_text(path, "secret"),
        ".webhook": lambda path: notify.keep(path, "https://hooks.example/secret"),
    }.items():
        (tmp_path / name).symlink_to(victim)
        write(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert victim.read_text() == "mine"


def test_a_name_that_can_be_guessed_is_not_written_through(tmp_path):
    """The address is written aside first, under a name with our process number."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".webhook.{os.getpid()}.tmp").symlink_to(victim)
    notify.keep(tmp_path / ".webhook", "https://hooks.example/secret")
    assert victim.read_text() == "mine"
    assert stat.S_IMODE((tmp_path / ".webhook").stat().st_mode) == 0o600


def test_the_address_goes_where_it_was_meant_to_go_though_the_name_is_taken_over(
    tmp_path, monkeypatch
):
    """Others can rename files in a shared folder: between two steps they may exchange this one."""
    theirs = tmp_path / "theirs"
    made = os.open

    def open_and_exchange(path, flags, mode=0o777, **more):
        handle = made(path, flags, mode, **more)
        if flags & os.O_EXCL:
            Path(path).rename(tmp_path / "ours")
            theirs.touch(0o666)
            Path(path).symlink_to(theirs)
        return handle

    monkeypatch.setattr(os, "open", open_and_exchange)
    notify.keep(tmp_path / ".webhook", "https://hooks.example/secret")
    assert theirs.read_text() == ""


def test_an_object_in_memory_is_what_a_pickle_in_a_file_is():
    """Of the malicious class itself: loading it does leave a trace, so the tests above can fail."""
    with tempfile.TemporaryDirectory() as name:
        trace = Path(name) / "trace"
        pickle.load(io.BytesIO(pickle.dumps(Malice(trace))))
        assert trace.exists()
