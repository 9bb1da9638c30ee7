"""What the faults happen to: cluster, database, a small disk, and a fleet that works on a study."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2

from tests import fleet, postgres
from tests.cluster import ACCOUNT, NODES, Cluster
from tripletkit.paths import LogPaths, StudyPaths, TrialPaths
from tripletkit.tune import claims

if TYPE_CHECKING:
    from tests.chaos.faults import Happened

PARTITIONS: tuple[str, ...] = ("low", "lowgrace")  # preempted at once, and with a time of grace
WORKERS = 3  # that one command starts, in each of them
EPOCHS = 16
DISK = "64m"
PATIENCE = 240.0  # seconds: for so long things may take on a machine that is busy with others

PAUSE = 15.0  # seconds between two commands of a user who is in a hurry

# Every node has a clock of its own: the Python of its jobs sees it, whatever it asks.
CLOCK = """\
import datetime, os, time

offset = {"n2": 3600, "n3": -3600, "n4": 240}.get(os.environ.get("SLURMD_NODENAME"), 0)
real, now = datetime.datetime, time.time


class Kind(type):
    def __instancecheck__(cls, value):
        return isinstance(value, real)


class Shifted(real, metaclass=Kind):
    __slots__ = ()

    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=offset)


class As:  # a function would become a method of logging's formatters
    def __init__(self, function):
        self.function = function

    def __call__(self, at=None):
        return self.function(time.time() if at is None else at)


if offset:
    time.time = lambda: now() + offset
    time.gmtime, time.localtime = As(time.gmtime), As(time.localtime)
    datetime.datetime = Shifted
"""

LOOK = """
    SELECT t.number, t.state, v.value, a.value_json, (
        SELECT max(step) FROM trial_intermediate_values i WHERE i.trial_id = t.trial_id
    )
    FROM trials t
    LEFT JOIN trial_values v USING (trial_id)
    LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key = %s
    ORDER BY t.number
"""


@dataclass(frozen=True)
class Trial:
    """What the database says of a trial. Asked by SQL of our own, without the code under test."""

    number: int
    state: str
    value: float | None
    owner: dict | None
    epoch: int  # the last one reported, or -1


@dataclass
class World:
    """The surroundings of a study, and what was seen of it."""

    folder: Path
    cluster: Cluster
    server: postgres.Server
    say: Callable[[str], None]
    asked: int  # trials
    partitions: tuple[str, ...]
    trials: list[Trial] = field(default_factory=list)  # when they were last seen
    finished: dict[int, tuple[str, float | None]] = field(default_factory=dict)  # ever seen so
    nodes_away: set[str] = field(default_factory=set)
    frozen: set[int] = field(default_factory=set)
    lasting: list[Happened] = field(default_factory=list)  # faults that have not ended yet
    tuning: list[subprocess.Popen] = field(default_factory=list)  # commands under way
    topped_up: float = float("-inf")
    commands: int = 0  # `tripletkit tune`, of those that were not refused
    refused: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def disk(self) -> Path:
        return self.folder / "scratch"

    @property
    def ballast(self) -> Path:
        return self.disk / "ballast"

    @property
    def logs(self) -> LogPaths:
        return LogPaths(self.folder / "logs")

    @property
    def study(self) -> StudyPaths:
        return fleet.study_paths(self.config)

    def trial(self, number: int) -> TrialPaths:
        return self.study.trial(number)

    # what is there

    def look(self) -> list[Trial]:
        """The trials now; what they last were while the database is away."""
        names = {"RUNNING", "WAITING", "COMPLETE", "PRUNED", "FAIL"}
        try:
            with (
                contextlib.closing(psycopg2.connect(self.server.url)) as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute(LOOK, [claims.OWNER])
                rows = cursor.fetchall()
        except psycopg2.Error:
            return self.trials
        assert {state for _, state, *_ in rows} <= names
        self.trials = [
            Trial(
                number, state, value, json.loads(mark) if mark else None, -1 if at is None else at
            )
            for number, state, value, mark, at in rows
        ]
        for each in self.trials:
            if each.state in ("COMPLETE", "PRUNED", "FAIL"):
                self.finished.setdefault(each.number, (each.state, each.value))
        return self.trials

    def at_work(self) -> list[Trial]:
        """Trials that a living process trains, and has reported an epoch of."""
        ours = self.cluster.processes()
        return [
            each
            for each in self.look()
            if each.state == "RUNNING" and each.owner and each.epoch >= 0
            and each.owner["pid"] in ours and each.owner["pid"] not in self.frozen
        ]  # fmt: skip

    def jobs(self) -> dict[str, str]:
        """Workers in the queue, and the node of each that runs."""
        rows = self.cluster.run("squeue", "--noheader", "--array", "--format=%i %j %N").splitlines()
        found = [row.split() for row in rows]
        return {
            row[0]: row[2] if len(row) > 2 else "" for row in found if row[1].startswith("tune")
        }

    def said(self) -> dict[Path, int]:
        """How long each log is now."""
        return {path: path.stat().st_size for path in self.all_logs()}

    def all_logs(self) -> list[Path]:
        """Of the jobs, of the trials, and of the cluster's daemons."""
        return [
            *self.logs.root.glob("*.err"), *self.logs.root.glob("*.out"),
            *self.study.root.glob("trial_*/train.log"), *self.cluster.folder.glob("*.log"),
        ]  # fmt: skip

    def log_of(self, job: str) -> Path:
        return self.logs.err("tune", job)

    def words_since(self, before: dict[Path, int], *paths: Path) -> str:
        """What was written into these logs since `before`, or into all of them."""
        texts = []
        for path in paths or self.all_logs():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(before.get(path, 0))
                texts.append(file.read().decode(errors="replace"))
        return "\n".join(texts)

    # what a user does

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [fleet.COMMAND, *arguments], env=self.cluster.environment, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def command(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        out, err = process.communicate()
        assert "Traceback" not in err, f"{arguments}: {out}{err}"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def tune(self) -> None:
        """The same command again, for each partition; faults happen while it works."""
        for partition in self.partitions:
            self.tuning.append(self.start(
                "tune", "--cluster", "slurm", "--account", ACCOUNT, "--partition", partition,
                "--workers", str(WORKERS), "--n-trials", str(self.asked),
            ))  # fmt: skip

    def hear(self, *, wait: bool = False) -> None:
        """What the commands said that have ended: that they could not, and why, if anything."""
        for process in [each for each in self.tuning if wait or each.poll() is not None]:
            out, err = process.communicate()
            self.tuning.remove(process)
            self.topped_up = time.monotonic()
            assert "Traceback" not in err, out + err
            if process.returncode == 0:
                self.commands += 1
                continue
            assert process.returncode in (1, 4, 5), out + err
            why = next((line for line in err.splitlines() if "error:" in line), err)
            self.refused.append(why)
            self.say(f"    tune: exit code {process.returncode}: {why}")

    def top_up(self) -> None:
        """So that half of the fleet is there, and there is something for it to do."""
        self.hear()
        if self.tuning or time.monotonic() - self.topped_up < PAUSE:
            return
        try:
            there = len(self.jobs())
        except subprocess.CalledProcessError:
            return
        done = len(self.finished)
        more = self.asked - done < WORKERS * len(self.partitions)
        if there <= WORKERS * len(self.partitions) // 2 or more:
            self.asked += WORKERS * len(self.partitions) if more else 0
            self.say(f"    {there} workers, {done} trials done: tune --n-trials {self.asked}")
            self.tune()

    def resume(self) -> None:
        """As an administrator: of a job that came back to where it still ran, Slurm drains the node."""
        for node in NODES:
            if self.cluster.node_state(node) in ("drained", "draining"):
                self.say(f"    {node} is drained: scontrol update State=RESUME")
                self.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    # faults

    def settle(self, *, at_once: bool = False) -> None:
        """End the faults whose time has come, or all of them."""
        for each in [*self.lasting]:
            if at_once or each.may_end(self):
                self.lasting.remove(each)
                self.say(f"    over: {each.fault.kind}")
                assert each.undo
                each.undo(self)

    def fill(self) -> None:
        """Until not a byte more fits."""
        with self.ballast.open("ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    def empty(self) -> None:
        self.ballast.unlink(missing_ok=True)


def until(
    what: Callable[[], object], describe: Callable[[], str], *, deadline: float = PATIENCE
) -> None:
    fleet.until(what, describe, deadline=deadline)


@contextlib.contextmanager
def built(
    folder: Path,
    cluster: Cluster,
    say: Callable[[str], None],
    *,
    asked: int,
    partitions: tuple[str, ...] = PARTITIONS,
) -> Iterator[World]:
    """A study that is about to start, in `folder`; nothing of it is left afterwards."""
    disk = folder / "scratch"
    disk.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "chaos", disk], check=True
    )
    try:
        with postgres.Server() as server:
            clock = folder / "clock"
            clock.mkdir()
            (clock / "sitecustomize.py").write_text(CLOCK)
            fleet.write_config(
                folder,
                global_={"scratch_dir": disk},
                tuning={
                    "output_dir": disk / "trials", "storage_url": server.url, "max_epochs": EPOCHS,
                    "pruner": "median", "study_name": "chaos",
                },
                training={"checkpoint_every_minutes": 0.01, "save_every_n_epochs": 20},
                slurm={
                    "cpus_per_task": 4, "time": "12:00:00",
                    "setup": ["export OMP_NUM_THREADS=1", f"export PYTHONPATH={clock}${{PYTHONPATH:+:$PYTHONPATH}}"],
                },
            )  # fmt: skip
            world = World(folder, cluster, server, say, asked, partitions)
            try:
                yield world
            finally:
                for process in world.tuning:
                    process.kill()
                    process.communicate()
                with contextlib.suppress(OSError):
                    world.empty()
                for pid in world.frozen & cluster.processes():
                    os.kill(pid, signal.SIGCONT)
    finally:
        unmount(disk)


def unmount(disk: Path) -> None:
    """Also while processes that were killed a moment ago still have it."""
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(["umount", disk], capture_output=True, text=True)
        if done.returncode == 0:
            return
        if time.monotonic() > end:
            subprocess.run(["umount", "--lazy", disk], check=True)
            return
        time.sleep(0.5)
