"""`python -m tests.exactness --rounds 20`: every command, killed and compared; a line for each."""

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests import exactness


def main() -> int:
    """Print a tally; 1 if anything differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.exactness", description=__doc__)
    every = ", ".join(exactness.COMMANDS)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"default: all of {every}")
    parser.add_argument("--rounds", type=int, default=3, help="of each command")
    parser.add_argument("--kills", type=int, default=5, help="at the most, in a round")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at the most, of a command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept, to look at afterwards")
    given = parser.parse_args()
    if unknown := set(given.commands) - exactness.COMMANDS.keys():
        parser.error(f"no such command: {', '.join(unknown)}; there are: {every}")
    bad = 0
    with _folder(given.folder) as folder:
        world = exactness.World.make(folder / "world")
        for name in given.commands or exactness.COMMANDS:
            tally = exactness.rounds(
                name, world, folder / name.replace(" ", "_"),
                count=given.rounds, seed=given.seed, kills=given.kills,
                until=time.monotonic() + 60 * given.minutes,
            )  # fmt: skip
            kills = ", ".join(f"{n} {by}" for by, n in sorted(tally.kills.items()))
            verdict = "; ".join(tally.differences) or "all equal"
            print(f"{name}: {tally.rounds} rounds, {kills or 'no kills'}: {verdict}", flush=True)
            bad += bool(tally.differences)
    return 1 if bad else 0


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
