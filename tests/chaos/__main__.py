"""`make chaos`: prints the faults as they happen, and at the end the tally."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests import cluster
from tests.chaos import draw, faults, tally
from tests.chaos.draw import Fault
from tests.chaos.faults import Happened
from tests.chaos.world import PARTITIONS, PATIENCE, World, built, until

END = 900.0  # seconds, from the last fault to the end of the study


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults, before the end")
    parser.add_argument("--rounds", type=int, help="instead: so often each kind of fault")
    parser.add_argument("--only", nargs="+", choices=draw.KINDS, default=draw.KINDS, metavar="KIND")
    parser.add_argument(
        "--keep", type=Path, help="keep what was there at a failure, in this folder"
    )
    given = parser.parse_args()
    order = draw.faults(given.seed, given.only)
    seconds = 60 * given.minutes
    if given.rounds:
        seconds = float("inf")
        order = itertools.islice(order, given.rounds * len(given.only))
    again = f'make chaos CHAOS="{shlex.join(sys.argv[1:])}"'
    with cluster.running() as slurm, tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        os.environ |= {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
        return run(
            Path(folder), slurm, given.seed, order, seconds=seconds, again=again, keep=given.keep
        )


def run(
    folder: Path,
    slurm: cluster.Cluster,
    seed: int,
    order: Iterable[Fault],
    *,
    seconds: float,
    again: str,
    short: bool = False,
    keep: Path | None = None,
) -> int:
    """Faults in this order for so many seconds, then the end of the study; 1 if anything is wrong."""
    began = time.monotonic()

    def say(line: str) -> None:
        for each in line.splitlines():
            print(f"{time.monotonic() - began:6.1f} {each}", flush=True)

    say(f"seed {seed}")
    asked, partitions = (4, PARTITIONS[:1]) if short else (12, PARTITIONS)
    with built(folder, slurm, say, asked=asked, partitions=partitions) as world:
        happened: list[Happened] = []
        try:
            world.tune()
            world.hear(wait=True)
            assert not world.refused
            _break(world, order, time.monotonic() + seconds, happened)
            say("no more faults: the same command, until the study is done")
            _finish(world)
            wrong = list(tally.problems(world, happened, seed))
        except BaseException:
            say(f"failed; again: {again}")
            _keep(world, keep)
            raise
        say(tally.printed(world, happened))
        for line in wrong:
            say(f"WRONG: {line}")
        if wrong:
            say(f"{len(wrong)} things wrong; again: {again}")
            _keep(world, keep)
        return 1 if wrong else 0


def _break(world: World, order: Iterable[Fault], end: float, happened: list[Happened]) -> None:
    """One fault after another; several last at a time, of nodes only one."""
    lasting = world.lasting

    def over(kinds: set[str] | None) -> bool:
        world.settle()
        if any(e.fault.kind in faults.OF_ALL for e in lasting):
            world.top_up()  # somebody has to notice
        return not [e for e in lasting if kinds is None or e.fault.kind in kinds]

    def wait_for(kinds: set[str] | None) -> None:
        until(
            lambda: over(kinds), lambda: f"still lasting: {lasting}", deadline=3 * PATIENCE
        )  # each ends by itself after PATIENCE, and may take long to undo

    try:
        for number, fault in enumerate(order, 1):
            pause = time.monotonic() + fault.pause
            while time.monotonic() < pause:
                world.settle()
                world.look()
                time.sleep(0.2)
            if time.monotonic() > end:
                break
            of_a_kind = faults.OF_NODES if fault.kind in faults.OF_NODES else {fault.kind}
            wait_for(of_a_kind)
            if fault.kind in faults.OF_ALL:  # somebody has to notice
                wait_for(faults.OF_ALL)
            world.top_up()
            each = faults.begin(world, fault)
            happened.append(each)
            world.say(f"{number:3d} {fault.kind}: {each.whom}")
            if each.undo:
                lasting.append(each)
        wait_for(None)
    finally:
        world.settle(at_once=True)


def _finish(world: World) -> None:
    """The same command, as the documentation says, and `doctor --fix`."""
    world.hear(wait=True)
    deadline = time.monotonic() + END

    def over() -> bool:
        world.resume()
        done = [each for each in world.look() if each.state in tally.DONE]
        assert time.monotonic() < deadline, f"{world.jobs()}\n{world.trials}"
        if not world.jobs() and len(done) < world.asked:
            world.say(f"    {len(done)} of {world.asked} are done, and no worker is left: tune")
            refused = len(world.refused)
            world.tune()
            world.hear(wait=True)
            assert len(world.refused) == refused
        return len(done) == world.asked and not world.jobs()

    until(over, lambda: f"{world.jobs()}\n{world.trials}", deadline=END + 60)
    # The tidy jobs behind the workers.
    until(
        lambda: not world.cluster.run("squeue", "--noheader"), lambda: world.cluster.run("squeue")
    )
    tally.age(world)
    fixed = world.command("doctor", "--fix")
    for line in fixed.stdout.splitlines():
        if line.startswith(("wrong:", "repaired:")):
            world.say(f"doctor: {line}")


def _keep(world: World, folder: Path | None) -> None:
    if folder is not None:
        shutil.copytree(world.folder, folder, dirs_exist_ok=True)
        for path in world.cluster.folder.glob("*.log"):
            shutil.copy(path, folder / "logs" / f"cluster_{path.name}")


if __name__ == "__main__":
    sys.exit(main())
