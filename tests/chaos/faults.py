"""The faults: each begins, may last, ends, and must have left a word about itself in a log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.draw import Fault
from tests.chaos.world import PATIENCE, Trial, World, until
from tests.cluster import NODES
from tripletkit.errors import DataError
from tripletkit.train import checkpoint


@dataclass
class Happened:
    """A fault that has begun. `undo` ends it, once `noticed` holds and its time is over."""

    fault: Fault
    whom: str
    words: str = ""  # what a log must say, as a pattern; nothing if nobody is to notice
    where: tuple[Path, ...] = ()  # in which logs; in any
    before: dict[Path, int] = field(default_factory=dict)
    undo: Callable[[World], None] | None = None
    noticed: Callable[[World], bool] | None = None  # as the words
    began: float = field(default_factory=time.monotonic)

    def said(self, world: World) -> bool:
        """Whether a log says what happened."""
        return bool(re.search(self.words, world.words_since(self.before, *self.where)))

    def may_end(self, world: World) -> bool:
        """After its time, when somebody has noticed; when patience is at its end anyway."""
        lasted = time.monotonic() - self.began
        if lasted > self.fault.seconds and (self.noticed or self.said)(world):
            return True
        if lasted <= PATIENCE:
            return False
        if not self.where and not world.jobs():
            self.words = ""  # no worker is left who could have noticed
        return True


def begin(world: World, fault: Fault) -> Happened:
    """Do it, to one of those that it can happen to."""
    return KINDS[fault.kind](world, fault)


def _victim(world: World, fault: Fault) -> Trial:
    found: list[Trial] = []

    def there() -> bool:
        found[:] = sorted(world.at_work(), key=lambda each: each.number)
        if not found:
            world.settle()
            world.top_up()
        return bool(found)

    until(there, lambda: f"nobody is at work: {world.jobs()}, {world.trials}")
    return found[int(fault.pick * len(found))]


def _name(trial: Trial) -> str:
    return f"trial {trial.number} of job {trial.owner['job']}, epoch {trial.epoch}"


# To one worker


def _kill(world: World, fault: Fault) -> Happened:
    trial, before = _victim(world, fault), world.said()
    with contextlib.suppress(ProcessLookupError):
        os.kill(trial.owner["pid"], signal.SIGKILL)
    return Happened(fault, _name(trial), "Killed", (world.log_of(trial.owner["job"]),), before)


def _torn(world: World, fault: Fault) -> Happened:
    """Kill a worker, and half of what it last saved is lost, as on a disk that fails."""
    trial, before = _victim(world, fault), world.said()
    paths = world.trial(trial.number)
    with contextlib.suppress(ProcessLookupError):
        os.kill(trial.owner["pid"], signal.SIGKILL)
    with paths.lock.open("a+") as lock:  # the next worker waits meanwhile
        fcntl.flock(lock, fcntl.LOCK_EX)
        good = []
        for path in paths.saved():
            with contextlib.suppress(DataError):
                good.append((checkpoint.load(path)["global_step"], path.stat().st_mtime, path))
        if not good or paths.final in [path for *_, path in good]:
            return Happened(fault, f"{_name(trial)}, which had nothing to lose")
        path = max(good)[2]
        os.truncate(path, path.stat().st_size // 2)
    words = f"{re.escape(path.name)} is torn or not a checkpoint"
    return Happened(fault, f"{_name(trial)}: {path.name}", words, (), before)


def _told(world: World, fault: Fault, words: str, *command: str) -> Happened:
    """Slurm is told something about the job of a worker, whose log then has `words`.

    In them `{}` is the number of the worker's trial.
    """
    trial, before = _victim(world, fault), world.said()
    job = trial.owner["job"]
    if world.jobs().get(job) in world.nodes_away:
        words = ""  # nobody there who passes it on
    world.cluster.run(*command, job)
    words = words.format(trial.number)
    return Happened(fault, _name(trial), words, (world.log_of(job),), before)


def _requeue(world: World, fault: Fault) -> Happened:
    return _told(world, fault, "DUE TO JOB REQUEUE", "scontrol", "requeue")


def _preempt(world: World, fault: Fault) -> Happened:
    """A job of higher priority wants the whole node."""
    trial, before = _victim(world, fault), world.said()
    job = trial.owner["job"]
    node = world.jobs().get(job) or NODES[0]
    wanted = ("--partition=high", "--exclusive", f"--nodelist={node}")
    world.cluster.sbatch(f"sleep {fault.seconds:.0f}", *wanted)
    words = "DUE TO (PREEMPTION|JOB REQUEUE)|asked to stop" if node not in world.nodes_away else ""
    return Happened(
        fault, f"{_name(trial)}, and all of {node}", words, (world.log_of(job),), before
    )


def _limit(world: World, fault: Fault) -> Happened:
    """The signal that Slurm sends ahead of the time limit; it may come as the trial ends anyway."""
    words = "asked to stop|trial {}: (complete|pruned)"
    return _told(world, fault, words, "scancel", "--signal=USR2")


def _cancel(world: World, fault: Fault) -> Happened:
    return _told(world, fault, "CANCELLED AT", "scancel")


def _freeze(world: World, fault: Fault) -> Happened:
    """Frozen and thawed it goes on, and nobody has taken it for dead: nothing to say."""
    trial = _victim(world, fault)
    pid = trial.owner["pid"]

    def thaw(world: World) -> None:
        world.frozen.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        world.frozen.add(pid)
    return Happened(fault, _name(trial), undo=thaw)


# To a node


def _node_of(world: World, fault: Fault) -> str:
    node = world.jobs().get(_victim(world, fault).owner["job"])
    return node or NODES[int(fault.pick * len(NODES))]


def _start_node(node: str) -> Callable[[World], None]:
    def start(world: World) -> None:
        world.cluster._slurmd(node)

        def up() -> bool:
            world.resume()
            return world.cluster.node_state(node) in {"idle", "mixed", "allocated", "completing"}

        until(up, lambda: world.cluster.run("sinfo", "-N", "-l"))
        world.nodes_away.discard(node)

    return start


def _is_down(node: str) -> Callable[[World], bool]:
    return lambda world: world.cluster.node_state(node) == "down"


def _slurmd(world: World, fault: Fault) -> Happened:
    """Its jobs go on, and do not notice."""
    node, before = _node_of(world, fault), world.said()
    world.cluster.stop_slurmd(node)
    world.nodes_away.add(node)
    log = (world.cluster.log(node),)
    return Happened(
        fault, node, "slurmd version .* started", log, before, _start_node(node), lambda _: True
    )


def _power(world: World, fault: Fault) -> Happened:
    """Everything on a node ends at once; the controller finds out by itself."""
    node, before = _node_of(world, fault), world.said()
    world.cluster.kill_node(node)
    world.nodes_away.add(node)
    log = (world.cluster.log("slurmctld"),)
    words = f"{node}.* not responding|Killing .*{node}|{node} unexpectedly rebooted|on failed node"
    return Happened(fault, node, words, log, before, _start_node(node), _is_down(node))


def _cut_off(world: World, fault: Fault) -> Happened:
    """Slurm gives a node up while its workers go on, frozen at first: their jobs come back."""
    node, before = _node_of(world, fault), world.said()
    job_nodes = world.jobs()
    there = [each for each in world.at_work() if job_nodes.get(each.owner["job"]) == node]
    world.cluster.stop_slurmd(node)
    world.nodes_away.add(node)
    pids = {each.owner["pid"] for each in there}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            world.frozen.add(pid)

    def back(world: World) -> None:
        for pid in pids & world.cluster.processes():
            os.kill(pid, signal.SIGCONT)
        world.frozen -= pids
        end = time.monotonic() + fault.seconds
        while time.monotonic() < end:  # they go on, and Slurm does not know
            world.look()
            time.sleep(0.2)
        _start_node(node)(world)

    log = (world.cluster.log("slurmctld"),)
    whom = f"{node}, with {', '.join(map(_name, there)) or 'nobody'}"
    words = rf"{node}.* not responding|\[?{node}.*DOWN|on failed node"
    return Happened(fault, whom, words, log, before, back, _is_down(node))


# To what they have in common


def _controller(world: World, fault: Fault) -> Happened:
    """Killed, away for a while, and started again."""
    before = world.said()
    cluster = world.cluster
    os.kill(cluster._pids["slurmctld"], signal.SIGKILL)
    until(lambda: not cluster._listens("slurmctld"), lambda: "slurmctld lives on")
    end = time.monotonic() + fault.seconds
    while time.monotonic() < end:
        world.look()
        time.sleep(0.2)
    cluster._daemon("slurmctld", "slurmctld", "-D")
    until(lambda: cluster._listens("slurmctld"), cluster.log("slurmctld").read_text)
    until(lambda: _answers(world), lambda: "slurmctld does not answer")
    log = (cluster.log("slurmctld"),)
    return Happened(fault, "slurmctld", "slurmctld version .* started", log, before)


def _answers(world: World) -> bool:
    try:
        world.jobs()
    except Exception:  # noqa: BLE001 - whatever squeue says of a controller that is only starting
        return False
    return True


def _database(world: World, fault: Fault) -> Happened:
    """Ended as by a crash; it comes back."""
    _victim(world, fault)  # somebody who notices
    before = world.said()
    world.server.stop(signal.SIGQUIT)
    return Happened(
        fault, "PostgreSQL", r"is away: .*trying again", (), before, lambda w: w.server.start()
    )


def _disk(world: World, fault: Fault) -> Happened:
    _victim(world, fault)
    before = world.said()
    world.fill()
    words = "No space left on device"
    return Happened(fault, f"{world.disk}", words, (), before, lambda w: w.empty())


KINDS: dict[str, Callable[[World, Fault], Happened]] = {
    "kill": _kill, "torn": _torn, "requeue": _requeue, "preempt": _preempt, "limit": _limit,
    "cancel": _cancel, "freeze": _freeze, "slurmd": _slurmd, "power": _power, "cut off": _cut_off,
    "controller": _controller, "database": _database, "disk": _disk,
}  # fmt: skip
OF_NODES = {"slurmd", "power", "cut off"}
OF_ALL = {"disk", "database"}
