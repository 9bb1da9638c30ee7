"""The test cluster is a real Slurm, shares nothing with the machine, and leaves no trace."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests import cluster as clusters
from tests.cluster import ACCOUNT, MAX_ARRAY_SIZE, NODES, ClusterFailed, settings, start, wait
from tests.cluster.keeper import descendants

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def shared(slurm):
    """A folder that every user and node can write to."""
    folder = slurm.folder / "shared"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    return folder


def test_a_job_runs_on_each_of_the_four_nodes(slurm, shared):
    jobs = {
        node: slurm.sbatch("echo $SLURMD_NODENAME", f"-w{node}", f"--output={shared}/{node}")
        for node in NODES
    }
    for node, job in jobs.items():
        slurm.wait_state(job, {"COMPLETED"})
        assert (shared / node).read_text() == f"{node}\n"
    assert len(jobs) == 4


def test_another_user_runs_jobs_too(slurm, shared):
    job = slurm.sbatch("id -un", f"--output={shared}/name", user="postgres")
    slurm.wait_state(job, {"COMPLETED"})
    assert (shared / "name").read_text() == "postgres\n"


def test_a_gpu_is_given_to_one_job_at_a_time(slurm, shared):
    options = ("--gres=gpu:1", "-wn1", f"--output={shared}/%j")
    first = slurm.sbatch(f"echo $CUDA_VISIBLE_DEVICES; {until(shared / 'go')}", *options)
    slurm.wait_state(first, {"RUNNING"})
    second = slurm.sbatch("true", *options)
    wait(lambda: reason(slurm, second) == "Resources", lambda: reason(slurm, second), 30)
    (shared / "go").touch()
    slurm.wait_state(second, {"COMPLETED"})
    assert (shared / first).read_text() == "0\n"


def test_an_array_has_a_job_for_each_element(slurm, shared):
    job = slurm.sbatch("echo $SLURM_ARRAY_TASK_ID", "--array=0-7", f"--output={shared}/%a")
    states = slurm.wait_state(job, {"COMPLETED"})
    assert sorted(states) == [f"{job}_{i}" for i in range(8)]
    assert [(shared / str(i)).read_text() for i in range(8)] == [f"{i}\n" for i in range(8)]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--account=nobody", "Invalid account"),
        ("--partition=nowhere", "invalid partition"),
        (f"--array=0-{MAX_ARRAY_SIZE}", "Invalid job array"),
        ("--mem=17G", "[Mm]emory specification"),
        ("--gres=gpu:3", "node configuration is not available"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused(slurm, option, reason):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        slurm.sbatch("true", option)
    assert refused.match(reason)


def test_accounting_records_how_a_job_ended(slurm):
    jobs = [slurm.sbatch("true"), slurm.sbatch("exit 3")]
    slurm.wait_state(jobs[0], {"COMPLETED"})
    slurm.wait_state(jobs[1], {"FAILED"})

    def records():
        columns = "--format=JobID,Account,State,ExitCode"
        return slurm.run("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), columns).split()

    wanted = [f"{jobs[0]}|{ACCOUNT}|COMPLETED|0:0", f"{jobs[1]}|{ACCOUNT}|FAILED|3:0"]
    wait(lambda: records() == wanted, lambda: f"sacct says {records()}", 20)


def test_a_job_that_uses_more_memory_than_it_asked_for_is_killed(slurm, shared):
    program = f"{sys.executable} -c 'x = bytearray(300 << 20); input()' < <(sleep 60)"
    job = slurm.sbatch(f'bash -c "{program}"', "--mem=100M", f"--output={shared}/memory")
    slurm.wait_state(job, {"FAILED"})
    assert "exceeded memory limit" in (shared / "memory").read_text()


def reason(slurm, job):
    """Why a job is pending."""
    return slurm.run("squeue", "-h", "-j", job, "-o", "%r")


def until(file: Path) -> str:
    """A shell command that ends once `file` is there."""
    return f"until [ -e {file} ]; do sleep 0.1; done"


def test_a_job_outlives_the_slurmd_of_its_node(slurm, shared):
    job = slurm.sbatch(
        f"{until(shared / 'end')}; echo ${{SLURM_RESTART_COUNT:-first}}",
        *("-wn2", f"--output={shared}/restarts"),
    )
    slurm.wait_state(job, {"RUNNING"})
    slurm.stop_slurmd("n2")
    slurm.start_slurmd("n2")
    assert slurm.states(job) == {job: "RUNNING"}
    (shared / "end").touch()
    slurm.wait_state(job, {"COMPLETED"})
    assert (shared / "restarts").read_text() == "first\n"


def start_of(slurm, job: str) -> datetime:
    facts = slurm.run("scontrol", "show", "job", job)
    return datetime.fromisoformat(re.search(r"StartTime=(\S+)", facts)[1])


def test_jobs_come_back_after_preemption_and_after_the_loss_of_their_node(slurm, shared):
    # three stories at once, since each has to wait for Slurm
    def submit(node: str, partition: str) -> str:
        return slurm.sbatch(
            f"{until(shared / 'over')}; echo ${{SLURM_RESTART_COUNT:-first}}",
            *(f"-w{node}", f"--partition={partition}", "--gres=gpu:1"),
            f"--output={shared}/%j",
        )

    low, grace, lost = submit("n1", "low"), submit("n2", "lowgrace"), submit("n3", "main")
    for job in (low, grace, lost):
        slurm.wait_state(job, {"RUNNING"})
    before = slurm.processes()
    slurm.kill_node("n3")
    assert len(before - slurm.processes()) >= 3  # slurmd, the job's step and its shell
    at_once = slurm.sbatch("true", "-wn1", "--partition=high", "--gres=gpu:1")
    later = slurm.sbatch("true", "-wn2", "--partition=high", "--gres=gpu:1")

    wait(lambda: slurm.node_state("n3") == "down", lambda: slurm.node_state("n3"), 90)
    slurm.wait_state(lost, {"PENDING"})
    slurm.start_slurmd("n3")
    for job in (low, lost):
        slurm.wait_state(job, {"RUNNING"})
    for job in (at_once, later):
        slurm.wait_state(job, {"COMPLETED"}, 90)
    (shared / "over").touch()  # whoever runs, or runs again, ends now
    for job in (low, lost, grace):
        slurm.wait_state(job, {"COMPLETED"}, 150)
        assert (shared / job).read_text() == "1\n"
    assert start_of(slurm, later) - start_of(slurm, at_once) > timedelta(seconds=20)  # of 30


@pytest.fixture
def owner():
    """A process of its own that owns a cluster: what contributors start in a shell."""
    command = [sys.executable, "-m", "tests.cluster"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        process.kill()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_is_left_of_a_cluster_however_its_owner_ends(owner, end):
    configuration = Path(owner.stdout.readline().strip().removeprefix("export SLURM_CONF="))
    text = configuration.read_text()
    ports = [int(word.partition("=")[2]) for word in text.split() if "Port=" in word]
    assert len(ports) == 1 + 1 + len(NODES)  # slurmctld, slurmdbd, each slurmd
    assert all(listens(port) for port in ports)

    escaping = "(setsid sleep 1000 &) ; sleep 1000"
    subprocess.run(
        ["sbatch", f"--account={ACCOUNT}", "--output=/dev/null", f"--wrap={escaping}"],
        env={**os.environ, "SLURM_CONF": str(configuration)},
        check=True,
    )
    wait(
        lambda: names(owner.pid).count("sleep") == 2,
        lambda: f"the job does not run: {names(owner.pid)}",
        30,
    )
    processes = descendants(owner.pid)
    owner.send_signal(end)
    owner.wait(60)
    wait(lambda: not any(map(alive, processes)), lambda: f"left: {processes}", 30)
    assert not configuration.parent.exists()
    assert not any(listens(port) for port in ports)


def names(root: int) -> list[str]:
    """Names of the programs that run below a process."""
    found = []
    for process in descendants(root):
        try:
            found.append(Path(f"/proc/{process}/comm").read_text().strip())
        except OSError:
            continue
    return found


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return (
        status.rpartition(")")[2].split()[0] != "Z"
    )  # the first process of a container may not reap


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_daemon_that_does_not_come_up_shows_its_log(monkeypatch):
    broken = settings.SLURMDBD.replace("accounting_storage/mysql", "accounting_storage/clay")
    monkeypatch.setattr(settings, "SLURMDBD", broken)
    before = set(descendants(os.getpid()))
    folder = Path(tempfile.mkdtemp()) / "cluster"
    folder.parent.chmod(0o755)
    with pytest.raises(ClusterFailed, match=r"(?s)slurmdbd did not come up.*clay"):
        start(folder)
    assert set(descendants(os.getpid())) <= before
    folder.parent.rmdir()  # fails if anything is left


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(clusters, "PROGRAMS", ("slurmctld", "slurmcastled"))
    with pytest.raises(ClusterFailed, match=r"^slurmcastled not found.*install\.sh"):
        start()
