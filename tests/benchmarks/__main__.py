"""`make bench`: speed and memory as ratios of something measured in the same run.

Prints what it finds, and writes benchmarks.json and benchmarks.md into OUT. Sections that need what
this machine has not (a GPU, PostgreSQL, a package) are left out with a line that says why. Run
again into the same OUT, it replaces the sections that it measures and keeps the others.

    python -m tests.benchmarks                             everything but the curves
    python -m tests.benchmarks OUT --only step peers       two sections
    python -m tests.benchmarks OUT --scaling --only rows   one curve
    python -m tests.benchmarks OUT --write-docs            OUT into docs/, measures nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.benchmarks import (
    gpu,
    large,
    measure,
    peers,
    pieces,
    processes,
    report,
    scaling,
    training,
)
from tests.benchmarks.measure import Bench, Section, UnavailableError
from tests.benchmarks.report import Results
from tripletkit.device import choose_device, make_deterministic

REPOSITORY = str(Path(__file__).parent.parent.parent)
SECONDS = {"cpu": 12.0, "cuda": 4.0}  # per measured rate

# Those that a GPU is rented for come first.
SECTIONS: dict[str, Section] = {
    "step": training.step,
    "gpu-step": gpu.gpu_training,
    "gpu-host": gpu.gpu_host,
    "gpu-retrieval": pieces.gpu_retrieval,
    "retrieval": pieces.retrieval,
    "bands": pieces.bands,
    "trials": processes.trials,
    "precision": training.precision,
    "peers": peers.peers,
    "memory": processes.memory,
    "cache": pieces.cache,
    "start": pieces.start,
    "study": processes.study,
    "large": large.large,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*SECTIONS, *scaling.CURVES]
    parser.add_argument("out", nargs="?", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--seconds", type=float, help="per measured rate; 12, on a GPU 4")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    parser.add_argument("--scaling", action="store_true", help="the curves instead of the table")
    parser.add_argument("--budget", type=float, help="start nothing after so many seconds")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing, write docs/")
    arguments = parser.parse_args()
    if arguments.write_docs:
        print(*report.write_docs(report.load(arguments.out)), sep="\n")
        return 0

    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(143) or sys.exit(143))
    # Commands run in folders of their own, maybe with tripletkit not installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [REPOSITORY, os.environ.get("PYTHONPATH")])
    )
    device = choose_device("auto")
    make_deterministic(device)
    results = report.load(arguments.out, measure.machine(device))
    print(report.describe(results["machine"]), flush=True)
    todo = [
        name
        for name in (scaling.CURVES if arguments.scaling else SECTIONS)
        if arguments.only is None or name in arguments.only
    ]
    seconds = arguments.seconds or SECONDS[device.type]
    run = curve if arguments.scaling else section
    began, failed = time.monotonic(), []
    for name in todo:
        if stopped:  # a dying worker of a loader's may have raised over the exit
            return stopped[0]
        passed = time.monotonic() - began
        print(f"\n== {name} ({passed:.0f} s so far)", flush=True)
        if arguments.budget is not None and passed > arguments.budget:
            print(f"left out: {arguments.budget:g} s are over", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="benchmarks_") as folder:
            try:
                run(name, Bench(Path(folder), device, seconds), results)
            except Exception:  # noqa: BLE001 - the other sections still count
                traceback.print_exc()
                failed.append(name)
        report.save(arguments.out, results)
    print(f"\n{report.table(results)}\n{time.monotonic() - began:.0f} s; {arguments.out}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def section(name: str, bench: Bench, results: Results) -> None:
    """Run one section and keep its rows, also those before an error."""
    began = time.monotonic()
    kept = {"rows": [], "seconds": 0.0, "left_out": ""}
    every = results["sections"] | {name: kept}
    results["sections"] = {known: every[known] for known in SECTIONS if known in every}
    try:
        for row in SECTIONS[name](bench):
            print(measure.line(row), flush=True)
            kept["rows"].append(row)
    except UnavailableError as error:
        kept["left_out"] = str(error)
    except ModuleNotFoundError as error:
        kept["left_out"] = f"needs {error.name}"
    if kept["left_out"]:
        print(f"left out: {kept['left_out']}", flush=True)
    kept["seconds"] = round(time.monotonic() - began, 1)
    print(f"took {kept['seconds']:.0f} s", flush=True)


def curve(name: str, bench: Bench, results: Results) -> None:
    """Measure one curve."""
    try:
        results["curves"][name] = dataclasses.asdict(scaling.CURVES[name](bench))
    except UnavailableError as error:
        print(f"left out: {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
