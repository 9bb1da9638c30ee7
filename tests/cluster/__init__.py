"""A real Slurm cluster of four nodes on this host, for tests and development.

    cluster = start()
    job = cluster.sbatch("hostname", "--array=0-3")
    cluster.wait_state(job, {"COMPLETED"})
    cluster.stop()

Everything it needs (keys, databases, sockets, logs, free ports of the loopback address) lies in one
folder below /tmp, which `stop` removes; nothing else of the machine is touched. It needs root, as
Slurm's daemons do, and the packages that `install.sh` installs.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from . import settings
from .keeper import descendants
from .settings import ACCOUNT, MAX_ARRAY_SIZE, NODES

__all__ = [
    "ACCOUNT",
    "MAX_ARRAY_SIZE",
    "NODES",
    "Cluster",
    "ClusterFailed",
    "running",
    "start",
    "wait",
]

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "sacctmgr")
PATH = f"{os.environ['PATH']}:/usr/sbin"  # `su` does not add it
INSTALL = Path(__file__).with_name("install.sh")
FOREIGN = ("SLURM", "SBATCH")  # variables of a Slurm that this process may itself run in
POLL = 0.1  # seconds between two looks at a condition


class ClusterFailed(Exception):  # noqa: N818
    """A daemon did not come up, or a job did not reach the state that a test waits for."""


def wait(condition: Callable[[], object], what: Callable[[], str], deadline: float) -> None:
    """Return as soon as `condition` holds; ClusterFailed(what()) after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise ClusterFailed(f"{what()} (waited {deadline:g} s)")
        time.sleep(POLL)


class Keeper:
    """The processes of one host: see keeper.py."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        script = Path(__file__).with_name("keeper.py")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for its owner
        )

    def ask(self, **request: object) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, *program: object, log: Path) -> int:
        return self.ask(run=[str(word) for word in program], log=str(log))

    def kill(self) -> None:
        self.ask(kill=True)

    def close(self) -> None:
        self.process.communicate('{"stop": true}\n')


class Cluster:
    """A running cluster; `start` makes one.

    `environment` is this process's environment without the traces of another Slurm and with
    SLURM_CONF: give it to every program that shall talk to this cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = settings.write(folder)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self.environment = {**kept, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._keepers: dict[str, Keeper] = {}
        self._pids: dict[str, int] = {}

    # daemons

    def log(self, daemon: str) -> Path:
        """Output of `munged`, `mariadb`, `slurmdbd`, `slurmctld`, or of the slurmd of a node."""
        return self.folder / f"{daemon}.log"

    def processes(self) -> set[int]:
        """Every process of the cluster, and of the jobs that run on it."""
        keepers = [keeper.process.pid for keeper in self._keepers.values()]
        return {*keepers, *(pid for keeper in keepers for pid in descendants(keeper))}

    def _daemon(self, name: str, *program: object) -> None:
        host = name if name in NODES else "services"
        if host not in self._keepers:
            self._keepers[host] = Keeper(self.folder, self.environment)
        self._pids[name] = self._keepers[host].run(*program, log=self.log(name))

    def _ready(self, name: str, condition: Callable[[], object], deadline: float = 30) -> None:
        """Wait for a daemon to answer; a failure shows the end of its log."""

        def failure() -> str:
            text = self.log(name).read_text(errors="replace")
            return f"{name} did not come up; the end of its log:\n{text[-3000:]}"

        def met() -> object:
            if not self._alive(name):
                raise ClusterFailed(failure())
            return condition()

        wait(met, failure, deadline)

    def _alive(self, name: str) -> bool:
        return Path(f"/proc/{self._pids[name]}").exists()

    def _listens(self, name: str) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.ports[name])) == 0

    def _up(self) -> None:
        folder = self.folder
        munge = folder / "munge"
        self._daemon(
            "munged",
            *("munged", "--foreground", f"--socket={munge}/socket", f"--key-file={munge}/key"),
            *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
        )
        self.run(
            *("mariadb-install-db", f"--defaults-file={folder}/mariadb.conf"),
            *("--auth-root-authentication-method=socket", "--skip-test-db"),
        )
        self._daemon("mariadb", "mariadbd", f"--defaults-file={folder}/mariadb.conf")
        self._ready("munged", (munge / "socket").exists)
        self._ready("mariadb", lambda: self._listens("mariadb"))
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._ready("slurmdbd", lambda: self._listens("slurmdbd"))
        for entry in (
            ("cluster", "test"),
            ("account", ACCOUNT),
            ("user", ",".join(settings.USERS), f"account={ACCOUNT}"),
        ):
            self.run("sacctmgr", "--immediate", "add", *entry)
        self._daemon("slurmctld", "slurmctld", "-D")
        self._ready("slurmctld", lambda: self._listens("slurmctld"))
        for node in NODES:
            self._slurmd(node)
        for node in NODES:
            self._ready(node, lambda node=node: self.node_state(node) == "idle")

    def _slurmd(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def start_slurmd(self, node: str) -> None:
        """Start the slurmd of a node that has none, and wait until the node can run jobs."""
        self._slurmd(node)
        lost = {"down", "unknown"}
        self._ready(node, lambda: self._listens(node) and self.node_state(node) not in lost)

    def stop_slurmd(self, node: str) -> None:
        """Kill the slurmd of a node, as an upgrade that goes wrong; its jobs go on."""
        os.kill(self._pids[node], signal.SIGKILL)
        wait(lambda: not self._listens(node), lambda: f"the slurmd of {node} lives on", 10)

    def kill_node(self, node: str) -> None:
        """Kill everything on a node, as a power cut; the controller notices it by itself."""
        self._keepers[node].kill()

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        for keeper in self._keepers.values():
            keeper.close()
        self._keepers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    # jobs

    def run(self, *command: str, user: str = "root") -> str:
        """Output of a command; CalledProcessError, with its error output as a note, if it fails."""
        done = subprocess.run(
            command, env=self.environment, user=user, cwd="/", text=True, capture_output=True
        )
        try:
            done.check_returncode()
        except subprocess.CalledProcessError as error:
            error.add_note(done.stdout + done.stderr)
            raise
        return done.stdout.strip()

    def sbatch(self, command: str, *options: str, user: str = "root") -> str:
        """Submit a shell command; the id of its job. Later options win over these defaults."""
        defaults = (f"--account={ACCOUNT}", "--output=/dev/null", f"--wrap={command}")
        return self.run("sbatch", "--parsable", *defaults, *options, user=user)

    def mails(self) -> list[str]:
        """Every mail so far, as `-s SUBJECT ADDRESS`."""
        log = self.folder / "mail.log"
        return log.read_text().splitlines() if log.exists() else []

    def states(self, job: str) -> dict[str, str]:
        """State of a job, or of every element of an array, by id; finished ones for 5 minutes."""
        rows = self.run("squeue", "--states=all", "--array", "-h", "-o", "%i %T", "-j", job)
        return dict(row.split() for row in rows.splitlines())

    def wait_state(self, job: str, states: Collection[str], deadline: float = 60) -> dict[str, str]:
        """Wait until the job, or every element of the array, is in one of `states`."""
        seen: dict[str, str] = {}

        def reached() -> bool:
            seen.update(self.states(job))
            return bool(seen) and set(seen.values()) <= set(states)

        wait(reached, lambda: f"job {job} is {seen}, not {sorted(states)}", deadline)
        return seen

    def reset(self) -> None:
        """Cancel every job, start slurmd where it is missing, wait until all nodes are idle."""
        if jobs := self.run("squeue", "-h", "-o", "%F").split():
            self.run("scancel", "--quiet", *set(jobs))
        for node in NODES:
            if not self._alive(node):
                self._slurmd(node)
        wait(lambda: not self.run("squeue", "-h"), lambda: self.run("squeue"), 60)
        for node in NODES:  # when a message about a job's end is lost, Slurm repeats it late
            self._ready(node, lambda node=node: self.node_state(node) == "idle", 120)

    def node_state(self, node: str) -> str:
        """What sinfo says of a node: idle, mixed, allocated, down, ..."""
        # Of a node asked for alone, slurmctld may say what was true a while ago.
        rows = self.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        return dict(row.split() for row in rows)[node].rstrip("*~#")


def start(folder: Path | None = None) -> Cluster:
    """Start a cluster in a new folder and wait until its four nodes are idle.

    Other users of the host must be able to enter the folder, and its path must be short (it holds
    sockets): the default is a new one for temporary files. Raises ClusterFailed with the log of
    the daemon that did not come up; nothing is left behind then.
    """
    if os.geteuid() != 0:
        raise ClusterFailed(
            "Slurm's daemons need root: run this as root, for example in a container"
        )
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        raise ClusterFailed(f"{', '.join(missing)} not found: run {INSTALL} as root")
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    else:
        folder.mkdir()
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster._up()
    except BaseException:
        cluster.stop()
        raise
    return cluster


@contextlib.contextmanager
def running(folder: Path | None = None) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts."""
    cluster = start(folder)
    try:
        yield cluster
    finally:
        cluster.stop()
