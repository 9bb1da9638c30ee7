"""`python -m tests.fuzz TARGET ... --seconds N`: try inputs for so long, and say what came of it.

With atheris (pip install atheris) the inputs are guided by what they reach; without it they are
random changes of good ones. What surprises is kept, with its traceback, in --keep; exit 1 then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz import engine


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="+", metavar="TARGET", choices=[*engine.TARGETS, "all"],
                        help=f"all, or of {', '.join(engine.TARGETS)}")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0, help="for each target")
    parser.add_argument("--runs", type=int, default=0, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["auto", "atheris", "plain"], default="auto")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder of the finds")
    given = parser.parse_args()
    if not (given.seconds or given.runs):
        parser.error("--seconds or --runs says when to stop")
    kind = given.engine
    if kind == "auto":
        kind = "atheris" if engine.has_atheris() else "plain"
    names = list(engine.TARGETS) if "all" in given.targets else given.targets
    bad = False
    for name in names:
        tally = engine.fuzz(
            name,
            seconds=given.seconds,
            runs=given.runs,
            seed=given.seed,
            engine=kind,
            keep=given.keep,
        )
        print(f"{name}: {tally}", flush=True)
        for place, file in tally.surprises.items():
            print(f"  {place}: {file}")
        for crash in tally.crashes:
            print(f"  {crash}")
        bad |= bool(tally.surprises or tally.crashes)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
