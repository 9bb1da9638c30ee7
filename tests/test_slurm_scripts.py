"""The sbatch files and wrappers in slurm/, on the real cluster.

A requeued job is held back for 11 s, so all jobs of the module are started, and their signals sent,
before the first test looks at one. Every path in here holds a space.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import toy
from tests.cluster import ACCOUNT, MAX_ARRAY_SIZE, Cluster, wait

REPOSITORY = Path(__file__).parent.parent
SLURM = REPOSITORY / "slurm"
SCRIPTS = sorted(p for p in SLURM.rglob("*") if p.suffix in (".sh", ".sbatch"))
PATIENCE = 90

# Stands in for python -m tripletkit.worker: says what happens to it, ends as its argument wants.
STAND_IN = """\
import os, signal, sys, time
came = []
for name in "USR1", "TERM":
    signal.signal(getattr(signal, f"SIG{name}"), lambda *_, name=name: came.append(name))
print("start", os.environ.get("SLURM_RESTART_COUNT", 0), flush=True)
how = sys.argv[1]
if how == "until told":
    while not came and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(0.05)
    time.sleep(0.5)  # a checkpoint
    print(*sorted(set(came)), flush=True)
    sys.exit(85 if "USR1" in came else 130 if came else 0)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(how))
"""
JOB = '#!/bin/bash\n. "$TRIPLETKIT_SLURM_DIR/job.sh"\nrun python -u "$@"\n'
SLOW_PROFILE = '. "$(dirname "${BASH_SOURCE[0]}")/generic.sh"\necho profile; sleep 3\n'


class Site:
    """A user's folder on the cluster, with a copy of slurm/ in it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.scripts = folder / "slurm"
        shutil.copytree(SLURM, self.scripts)
        (self.scripts / "profiles" / "slow.sh").write_text(SLOW_PROFILE)
        (folder / "stand in.py").write_text(STAND_IN)
        (folder / "stand in.sbatch").write_text(JOB)
        self.environment = {
            **cluster.environment,
            "TRIPLETKIT_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
        )

    def run(self, *words: object, **variables: str) -> str:
        done = self.call(*words, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sbatch(self, *words: object, memory: str = "1500M", **variables: str) -> str:
        options = ("--parsable", f"--account={ACCOUNT}", f"--mem={memory}", "--cpus-per-task=1")
        return self.run("sbatch", *options, "--gres=none", *words, **variables)

    def stand_in(self, how: object, *options: str, **variables: str) -> str:
        """Submit the stand-in; what it says is in %A.out, or %A_%a.out for an array."""
        name = "%A_%a" if any(o.startswith("--array") for o in options) else "%j"
        return self.sbatch(
            f"--output={name}.out", "--time=5", "--open-mode=append", "--signal=B:USR1@120",
            *options, "stand in.sbatch", "stand in.py", how,
            **{"memory": "200M", "TRIPLETKIT_SLURM_DIR": str(self.scripts), **variables},
        )  # fmt: skip

    def said(self, job: str) -> list[str]:
        """The lines of a job's log, without those of Slurm itself."""
        path = self.folder / f"{job}.out"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line and not line.startswith("slurmstepd")]

    def wait_for(self, job: str, line: str) -> None:
        wait(lambda: line in self.said(job), lambda: f"{job} says {self.said(job)}", PATIENCE)

    def ended(self, job: str) -> str:
        """Wait for the end of a job or array element: its state and exit code."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        state = self.cluster.wait_state(job, final, PATIENCE)[job]
        facts = self.run("scontrol", "show", "job", "--oneliner", job)
        return state + " " + re.search(r"ExitCode=(\d+)", facts)[1]


# --- the jobs, all at once -------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory):
    yield Site(cluster, tmp_path_factory.mktemp("a folder") / "of mine")
    cluster.reset()


@pytest.fixture(scope="module")
def config(site) -> str:
    """A configuration whose name holds a space, and small data beside it."""
    toy.write_parquet(site.folder / "train.parquet", buildings=40)
    toy.write_parquet(site.folder / "val.parquet", buildings=20, first=100)
    (site.folder / "my config.toml").write_text("""\
[paths]
train_parquet_path = "train.parquet"
val_parquet_path = "val.parquet"
[training]
batch_size = 16
num_epochs = 3
retrieval_metric_top_k = [1, 5]
device = "cpu"
[tuning]
objective = "recall@1"
max_epochs = 2
pruner = "none"
[slurm]
time = "00:10:00"
mem = "1500M"
gpus = 0
cpus_per_task = 1
""")
    return "my config.toml"


@pytest.fixture(scope="module")
def time_limit(site) -> str:
    return site.stand_in("until told", "--time=1", "--signal=B:USR1@20")


@pytest.fixture(scope="module")
def array(site) -> tuple[str, str]:
    """An array whose one element got a signal: that with the id of the whole array, and the other."""
    array = site.stand_in("until told", "--array=0-1")
    for index in 0, 1:
        site.wait_for(f"{array}_{index}", "start 0")
    numbers = site.run("squeue", "--noheader", "--array", "--format=%A %i", f"--jobs={array}")
    ids = dict(line.split() for line in numbers.splitlines())
    told = ids.pop(array)
    site.run("scancel", "--batch", "--signal=USR1", told)
    return told, *ids.values()


@pytest.fixture(scope="module")
def early(site) -> str:
    """A job that gets its signal while the environment is still being prepared."""
    job = site.stand_in("until told", TRIPLETKIT_PROFILE="slow")
    site.wait_for(job, "profile")
    site.run("scancel", "--batch", "--signal=USR1", job)
    return job


@pytest.fixture(scope="module")
def requeued(site) -> str:
    """A job that Slurm requeues while it saves its state to ask for that itself."""
    job = site.stand_in("until told")
    site.wait_for(job, "start 0")
    site.run("scancel", "--batch", "--signal=USR1", job)
    site.run("scontrol", "requeue", job)
    return job


@pytest.fixture(scope="module")
def preempted(site) -> str:
    """A job that makes room for a more important one after a time of grace."""
    job = site.stand_in("until told", "--partition=lowgrace", "--nodelist=n4")
    site.wait_for(job, "start 0")
    room = ("--partition=high", "--nodelist=n4", "--exclusive", "--time=1", "--output=/dev/null")
    site.sbatch(*room, "--wrap=true")
    return job


@pytest.fixture(scope="module")
def training(site, config) -> str:
    """A training that is told to stop in the middle."""
    text = (site.folder / config).read_text().replace("num_epochs = 3", "num_epochs = 100")
    (site.folder / "long run.toml").write_text(text + '[global]\nlog_dir = "."\n')
    job = site.sbatch("--time=10", site.scripts / "train.sbatch", "long run.toml")
    metrics = site.folder / "checkpoints" / "metrics.jsonl"
    wait(lambda: metrics.exists() and metrics.stat().st_size, lambda: str(metrics), PATIENCE)
    site.run("scancel", "--batch", "--signal=USR1", job)
    return job


@pytest.fixture(scope="module")
def database(site, config) -> Iterator[tuple[str, Path]]:
    """A database that has to make room; its folder is one that the user postgres can reach."""
    with tempfile.TemporaryDirectory(prefix="a database ") as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "db"
        job = site.sbatch(site.scripts / "database.sbatch", config, path)
        wait((path / "connection.json").exists, lambda: str(path), PATIENCE)
        site.run("scancel", "--batch", "--signal=USR1", job)
        yield job, path


@pytest.fixture(scope="module", autouse=True)
def all_at_once(time_limit, preempted, training, array, early, requeued, database):
    """Start them before the first test waits for one."""


# --- the scripts -----------------------------------------------------------------------------


def test_shellcheck_has_no_remarks():
    command = ["shellcheck", "--external-sources", f"--source-path={REPOSITORY}", *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sbatch")), ids=lambda p: p.name)
def test_a_job_that_does_not_find_the_folder_says_so(script, tmp_path):
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "submit from the folder that holds slurm/, or set TRIPLETKIT_SLURM_DIR" in done.stderr


def test_a_missing_profile_is_named(site):
    done = site.call(site.scripts / "submit_best_training.sh", "--profile", "mars")
    assert done.returncode == 2
    assert "profiles/mars.sh" in done.stderr


def test_an_environment_without_tripletkit_is_said(site, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    script = site.scripts / "submit_best_training.sh"
    done = site.call(script, TRIPLETKIT_VENV=str(tmp_path / "bare"), PYTHONPATH="")
    assert done.returncode == 2
    assert "set TRIPLETKIT_VENV" in done.stderr
    assert "Traceback" not in done.stderr


# --- how a job ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "end"), [(0, "COMPLETED 0"), (7, "FAILED 7"), ("killed", "FAILED 137")]
)
def test_the_exit_code_is_that_of_the_command(site, how, end):
    assert site.ended(site.stand_in(how)) == end


def test_a_cancelled_job_stays_cancelled(site):
    job = site.stand_in("until told")
    site.wait_for(job, "start 0")
    site.run("scancel", job)
    assert site.ended(job).startswith("CANCELLED")
    assert site.said(job) == ["start 0", "TERM"]


def test_requests_for_another_start_are_limited(site):
    job = site.stand_in(85, TRIPLETKIT_MAX_RESTARTS="0")
    assert site.ended(job) == "FAILED 85"
    assert "TRIPLETKIT_MAX_RESTARTS" in site.said(job)[-1]


def test_a_refused_requeue_is_a_failure_with_the_words_of_slurm(site):
    job = site.stand_in(85, "--no-requeue")
    assert site.ended(job) == "FAILED 85"
    assert site.said(job)[-1].startswith(f"scontrol requeue {job}: ")


def test_only_the_element_that_asks_is_started_again(site, array):
    told, other = array
    assert site.ended(told) == "COMPLETED 0"
    assert site.said(told) == ["start 0", "USR1", "start 1"]
    assert site.said(other) == ["start 0"]
    site.run("scancel", other)


def test_a_job_that_slurm_requeued_already_is_started_once(site, requeued):
    assert site.ended(requeued) == "COMPLETED 0"
    assert site.said(requeued) == ["start 0", "TERM USR1", "start 1"]


def test_a_signal_before_the_command_listens_means_another_start(site, early):
    assert site.ended(early) == "COMPLETED 0"
    assert [line for line in site.said(early) if line != "profile"][-1] == "start 1"


# --- the real thing --------------------------------------------------------------------------


def test_training_goes_on_after_a_signal(site, training):
    assert site.ended(training) == "COMPLETED 0"
    text = (site.folder / f"train_{training}.err").read_text()
    assert "stopped in epoch" in text
    epochs = [
        json.loads(line)["epoch"]
        for line in (site.folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    ]
    assert epochs == list(range(101))


def test_the_database_comes_back_and_goes_down_when_told(site, database):
    job, folder = database
    log = site.folder / f"db_{job}.err"
    wait(lambda: log.read_text().count(" up at ") == 2, log.read_text, PATIENCE)
    site.run(sys.executable, "-m", "tripletkit", "db", "down", folder)
    assert site.ended(job) == "COMPLETED 0"


def test_tuning_and_then_the_best_training(site, config):
    flags = ("--config", config, "--account", ACCOUNT, "--study-name", "toy")
    script = site.scripts / "submit_optuna_tuning.sh"
    said = site.run(script, *flags, "--num-workers", 2, "--trials-per-worker", 1)
    array, tidy = re.search(r"array (\d+); after them: job (\d+)", said).groups()
    for index in 0, 1:
        assert site.ended(f"{array}_{index}") == "COMPLETED 0"
    assert site.ended(tidy) == "COMPLETED 0"
    logs = site.folder / "logs"
    outs = [(logs / f"tune_{array}_{index}.out").read_text() for index in (0, 1)]
    assert sum(int(n) for out in outs for n in re.findall(r"(\d+) complete", out)) == 2
    assert all((logs / f"tune_{array}_{index}.err").exists() for index in (0, 1))

    said = site.run(site.scripts / "submit_best_training.sh", *flags)
    job = re.search(r"training: job (\d+)", said)[1]
    assert site.ended(job) == "COMPLETED 0"
    assert "-> final" in (logs / f"best_training_{job}.out").read_text()
    assert (logs / f"best_training_{job}.err").exists()


def test_bands_and_evaluation_take_the_flags_of_their_commands(site, config, training):
    bands = (
        "--set",
        "paths.difficulty_metadata_path=some bands.parquet",
        "--neighbors",
        20,
        "--k0",
        5,
    )
    job = site.sbatch(site.scripts / "bands.sbatch", "--config", config, *bands)
    assert site.ended(job) == "COMPLETED 0"
    assert (site.folder / "some bands.parquet").exists()
    site.ended(training)
    job = site.sbatch(
        site.scripts / "evaluate.sbatch", "--config", config, "--split", "val", "--json"
    )
    assert site.ended(job) == "COMPLETED 0"
    assert json.loads((site.folder / f"evaluate_{job}.out").read_text())["split"] == "val"


def test_the_time_limit_means_another_start(site, time_limit):
    assert site.ended(time_limit) == "COMPLETED 0"
    assert site.said(time_limit) == ["start 0", "USR1", "start 1"]


def test_a_preempted_job_is_told_and_comes_back(site, preempted):
    assert site.ended(preempted) == "COMPLETED 0"
    assert site.said(preempted) == ["start 0", "TERM", "start 1"]


# --- what the wrappers ask for ---------------------------------------------------------------


def test_flags_and_configuration_become_options_of_sbatch(site, config):
    said = site.run(
        site.scripts / "submit_optuna_tuning.sh", "--config", config, "--dry-run",
        "--study-name=asked", "--account", ACCOUNT, "--partition", "low", "--time", "1:30:00",
        "--mem", "3G", "--cpus-per-task", 2, "--gres", "gpu:1", "--workers", 6,
        "--max-concurrent", 2, "--disable-wandb",
        "--storage-path", "a study.journal", "--set", "slurm.mail=me@example.org",
    )  # fmt: skip
    asked = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {said}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert asked == [
        "sbatch", "--parsable", "--export=ALL", "--job-name=tune:asked",
        f"--output={site.folder}/logs/tune_%A_%a.out", f"--error={site.folder}/logs/tune_%A_%a.err",
        f"--account={ACCOUNT}", "--partition=low", "--mail-user=me@example.org",
        "--mail-type=FAIL", "--array=0-5%2", "--time=90", "--mem=3G", "--cpus-per-task=2",
        "--gres=gpu:1", "--signal=B:USR1@120", f"{site.scripts}/tune.sbatch",
        f"{site.folder}/trials/asked/config.toml",
    ]  # fmt: skip
    assert not (site.folder / "logs").joinpath("tidy").exists()
    assert not (site.folder / "trials" / "asked").exists(), "a dry run makes no study"
    assert not list(site.folder.rglob("*.journal*"))


def test_help_is_that_of_the_command(site):
    said = site.run(site.scripts / "submit_best_training.sh", "--help")
    assert "--from" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--account", "nobody"], "account"),
        (["--partition", "mars"], "there are: main"),
        (["--workers", MAX_ARRAY_SIZE + 1], "`tripletkit tune` with the same flags"),
    ],
)
def test_what_slurm_would_refuse_is_not_submitted(site, config, flags, words):
    before = site.run("squeue", "--noheader", "--name=tune:refused")
    script = site.scripts / "submit_optuna_tuning.sh"
    given = ["--account", ACCOUNT, *flags]
    done = site.call(script, "--config", config, "--study-name", "refused", *given)
    assert done.returncode == 4
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert site.run("squeue", "--noheader", "--name=tune:refused") == before == ""
