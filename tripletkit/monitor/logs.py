"""`tripletkit logs`: the logs of a job, a trial, a study or a run, once or as they grow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tripletkit import log
from tripletkit.cluster.jobs import LOCAL
from tripletkit.errors import RunError
from tripletkit.log import logger
from tripletkit.monitor.inventory import Job
from tripletkit.monitor.targets import Target
from tripletkit.tune import attempts

POLL = 1.0  # seconds between two looks at the files: network file systems do not tell of changes
ASK = (3.0, 30.0)  # seconds between two questions to Slurm whether a job is over: first, longest
BLOCK = 64 * 1024  # bytes; the end of a file is searched in such steps
# Bytes. Progress bars write lines that do not end: we neither search nor wait for ever.
SEARCHED = 64 * 2**20
LONG_LINE = 2**20

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
BARS = re.compile(r"\r\n?")  # a bar that moves, or the end of a line as Windows writes it

Emit = Callable[[Path, str], None]


class Tail:
    """What is new in a file, which may not be there yet, and may be cut off or replaced.

    It is opened for each look: on a network file system that shows the lines of other nodes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = 0
        self._offset = 0

    def skip_to_last(self, lines: int) -> None:
        """Begin with the last `lines` lines of what is there now."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            self._inode = os.fstat(file.fileno()).st_ino
            start = self._offset = file.seek(0, os.SEEK_END)
            stop = max(0, start - max(SEARCHED, 4096 * lines))
            blocks: list[bytes] = []
            ends = 0
            while start > stop and ends <= lines:
                size = min(BLOCK, start)
                start = file.seek(start - size)
                blocks.append(file.read(size))
                ends += blocks[-1].count(b"\n")
            kept = b"".join(reversed(blocks))
        if lines:
            line_end = len(kept) - kept.endswith(b"\n")
            for _ in range(lines):
                line_end = kept.rfind(b"\n", 0, max(line_end, 0))
                if line_end < 0:
                    break
            self._offset = start + line_end + 1

    def read(self, *, to_the_end: bool = False) -> str:
        """The lines that were not read yet; `to_the_end`: also one that has no end."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return ""
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            data = file.read()
        if not to_the_end and (b"\n" in data or len(data) < LONG_LINE):
            data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        return data.decode(errors="replace")


def show(target: Target, lines: int) -> None:
    """Print the last lines of each log. Raises RunError if there is none."""
    files = _files(target, target.jobs(_attempted(target)))
    written = _written(files)
    if not written:
        raise _nothing(target, files, "-f waits for it; `tripletkit status` shows what runs")
    emit = _emitter(target, written)
    for path in written:
        tail = Tail(path)
        tail.skip_to_last(lines)
        if text := tail.read(to_the_end=True):
            emit(path, text)


def follow(target: Target, lines: int) -> None:
    """Print the last lines of each log and then what is added, until the jobs are over.

    Raises RunError if they are over already and there is none.
    """
    attempted = _attempted(target)
    jobs = target.jobs(attempted)
    files, over = _files(target, jobs), _is_over(target, jobs)
    if over and not _written(files):
        raise _nothing(target, files, "`tripletkit status` shows what runs")
    if not over and not any(path.exists() for path in files):
        logger.info("waiting for the log of %s", target)
    emit = _emitter(target, files)
    tails = {path: Tail(path) for path in files}
    for tail in tails.values():
        tail.skip_to_last(lines)
    warned: set[str] = set()
    pause, asked = ASK[0], time.monotonic()
    while True:
        for path, tail in tails.items():
            if text := tail.read(to_the_end=over):
                emit(path, text)
        if over:
            return
        time.sleep(POLL)
        if time.monotonic() - asked >= pause:
            jobs = target.jobs(attempted)
            over = _is_over(target, jobs)
            for path in _files(target, jobs):
                tails.setdefault(path, Tail(path))
            _warn(target, warned)
            pause, asked = min(1.5 * pause, ASK[1]), time.monotonic()


def _files(target: Target, jobs: dict[str, Job]) -> list[Path]:
    """The logs of a target, also those that are still to come."""
    inventory = target.inventory
    if target.kind == "trial":  # its own log goes on when the trial changes its job
        return [inventory.paths.trial(target.number).log]
    logs = inventory.logs
    both = [(job, of(job.stage, job.id)) for job in jobs.values() for of in (logs.err, logs.out)]
    return [path for job, path in both if job.active or path.exists()]


def _written(files: Collection[Path]) -> list[Path]:
    """Those that say anything."""
    return [path for path in files if path.exists() and path.stat().st_size]


def _nothing(target: Target, files: Sequence[Path], hint: str) -> RunError:
    return RunError(f"{target} has written no log" + (f" {files[0]}" if files else ""), hint=hint)


def _attempted(target: Target) -> set[str]:
    """Jobs that once worked on a trial of the study."""
    if target.kind != "study":
        return set()
    paths = target.inventory.paths
    trials = range(len(target.trials()))
    return {
        each["job"] for number in trials for each in attempts.read(paths.trial(number).attempts)
    }


def _warn(target: Target, warned: set[str]) -> None:
    """Say what could not be asked, once."""
    for warning in sorted({*target.inventory.warnings} - warned):
        logger.warning("%s; asking again", warning)
    warned |= {*target.inventory.warnings}


def _is_over(target: Target, jobs: dict[str, Job]) -> bool:
    """Nothing will be written any more."""
    if target.kind == "trial":
        trials = target.trials()
        if trials and trials[0].state.is_finished():
            return True
        study = Target("study", target.inventory.study_name, target.inventory)
        jobs = {id_: job for id_, job in study.jobs().items() if job.stage == "tune"}
    local = jobs and all(id_.startswith(LOCAL) for id_ in jobs)
    if target.inventory.silence and not local:
        return False
    return all(job.over for job in jobs.values())


def _emitter(target: Target, files: Collection[Path]) -> Emit:
    """How lines are printed: as they are, below their file's name, or beside their job."""
    if len({path.stem for path in files}) > 1 or target.kind == "study":
        return lambda path, text: _write(
            "".join(f"[{path.stem}] {line}\n" for line in text.removesuffix("\n").split("\n"))
        )
    if len(files) <= 1:
        return lambda _path, text: _write(text)
    shown: list[Path] = []

    def below_its_name(path: Path, text: str) -> None:
        if shown[-1:] != [path]:
            _write(f"==> {path.name} <==\n")
            shown.append(path)
        _write(text.removesuffix("\n") + "\n")  # the next name begins a line

    return below_its_name


def _write(text: str) -> None:
    """To stdout: no wrapping, no markup, and to a terminal nothing that it would obey."""
    if log.out.is_terminal:
        text = log.visible(BARS.sub("\n", COLOURS.sub("", text)))
    log.out.file.write(text)
    log.out.file.flush()
