"""Parquet in, parquet out: the embeddings of files replaced by what a head makes of them.

A work folder beside each output keeps what is done of it; the output appears whole, by a rename.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tripletkit import fsio, inputs, log
from tripletkit.apply import outputs as files
from tripletkit.apply.projection import Vectors, project, vectors_in
from tripletkit.apply.recipe import Job, Output, Request
from tripletkit.config import Config
from tripletkit.data import parquet
from tripletkit.data.parquet import Table
from tripletkit.data.store import DISK_FULL
from tripletkit.errors import ConfigError, Interrupted, RunError
from tripletkit.log import logger

TELL_SECONDS = 60.0  # so often the log says how far we are
ASK_SECONDS = 0.2  # so often we look whether what another process works on is there


@dataclass(frozen=True)
class Result:
    """What a run did."""

    made: tuple[Path, ...]
    rows: int  # of those
    dim: int
    skipped: int  # files that were there
    elsewhere: int  # files that other processes work on


# --- before it begins ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What there is to do."""

    left: int  # outputs that are still to be made
    weights: str  # of the checkpoint, for `Request.weights`


def check(config: Config, request: Request) -> Plan:
    """What is still to be made; reads footers, and the first row of each source.

    Raises DataError for sources that cannot be used, and ConfigError, also for outputs that were
    made of something else.
    """
    todo = outputs(request)
    job = Job(config, request, "cpu")  # a login node need not have what the job will
    inputs.warn_if_unfinished(request.checkpoint, job.epoch)
    left = 0
    for output in todo:
        for part in _files(parquet.open_table(output.sources, job.needed)):
            job.projector.check(part)
        job.provenance(output)  # knows the columns
        if not job.finished(output) or output.work.exists():
            left += 1
        elif job.outdated(output):
            logger.warning(
                "%s is older than its source: if that has other content now, --force makes it anew",
                output.path,
            )
    return Plan(left, job.weights)


def outputs(request: Request) -> list[Output]:
    """Which files become which. Raises ConfigError when that is not clear."""
    path = request.destination
    one = path.suffix == ".parquet" and not path.is_dir()
    sources = _not_made_by_us(parquet.find_files(request.source), path)
    if request.per_building and request.columns:
        raise ConfigError("--per-building and --columns exclude each other")
    if request.per_building and not one:
        raise ConfigError(f"{path}: --per-building writes one file, so its name ends in .parquet")
    folder = path.parent if one else path
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not above.is_dir():
        raise ConfigError(f"{above} is a file, so {path} cannot be written")
    if one and len(sources) > 1 and not request.per_building:
        raise ConfigError(
            f"{request.source} is {len(sources)} files, so {path} must be a folder",
            hint="a name without .parquet at its end",
        )
    if one:
        found = [Output(sources, path)]
    else:
        found = [Output((source,), path / source.name) for source in sources]
    of: dict[Path, Path] = {}
    for output in found:
        for source in output.sources:
            if output.path.exists() and output.path.samefile(source):
                raise ConfigError(
                    f"{source} would be replaced by its own embeddings",
                    hint="choose another destination",
                )
        source = output.sources[0]
        if (other := of.setdefault(output.path, source)) != source:
            raise ConfigError(
                f"{other} and {source} would both become {output.path}",
                hint="embed one folder at a time",
            )
    return found


def _not_made_by_us(sources: tuple[Path, ...], destination: Path) -> tuple[Path, ...]:
    """The sources but for former output, which a folder or glob may hold the next time."""
    here = destination.resolve()
    others = tuple(
        source
        for source in sources
        if here not in ((found := source.resolve()), found.parent)
        or files.provenance_of(source) is None
    )
    return others or sources


# --- doing it --------------------------------------------------------------------------------


def run(config: Config, request: Request, should_stop: Callable[[], bool]) -> Result:
    """Make the outputs that are not there yet, whoever else is at it.

    An element of a Slurm array leaves to others what they work on; elsewhere we wait for it. Raises
    Interrupted when asked to stop, with what is done saved.
    """
    todo = outputs(request)
    job = Job(config, request)
    turn, turns = _turn()
    left = deque(
        output for first in range(turns) for output in todo[(turn + first) % turns :: turns]
    )
    made: dict[Path, int] = {}
    waits = False
    busy = 0  # how many of `left`, one after the other, others work on
    total = sum(parquet.open_table(each.sources, ()).total for each in todo)
    with log.progress(total, "embedding") as update:
        steps = _Steps(should_stop, update)
        while left:
            if busy == len(left):
                if turns > 1:
                    break
                if not waits:
                    logger.info(
                        "waiting for other processes, which are at %d of the files", len(left)
                    )
                    waits = True
                time.sleep(ASK_SECONDS)
                busy = 0
            output = left.popleft()
            try:
                steps.check_stop()
                rows = _attempt(job, output, steps)
            except Interrupted as stopped:
                stopped.progress = stopped.progress or bool(made)
                raise
            if rows is None:
                left.append(output)
                busy += 1
            else:
                busy = 0
                made |= {output.path: rows} if rows else {}
    return Result(
        made=tuple(made),
        rows=sum(made.values()),
        dim=job.projector.dim,
        skipped=len(todo) - len(made) - len(left),
        elsewhere=len(left),
    )


def _turn() -> tuple[int, int]:
    """Which element of a Slurm array we are, counted from 0, and of how many."""
    first, count, this = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("MIN", "0"), ("COUNT", "1"), ("ID", "0"))
    )
    return (this - first) % count, count


def _attempt(job: Job, output: Output, steps: _Steps) -> int | None:
    """Make an output: its rows, 0 if it was there, None if another process is at it.

    Where locks do not work, another may be at it all the same: both come to the same file, and the
    one that is first takes away the work folder.
    """
    if job.finished(output) and not output.work.exists():
        return 0
    with _writing(output, job), fsio.exclusive_lock(output.lock, wait=False) as lock:
        if not lock.ours:
            return None
        rows = 0
        try:
            if not job.finished(output):  # meanwhile, or before its maker was killed
                if lock.sure:
                    name = glob.escape(output.path.name)
                    fsio.remove_leftovers(output.path.parent, f".{name}.[0-9]*.tmp")
                rows = _make(job, output, steps)
        except OSError:  # in the work folder, or on the way to it
            if not job.finished(output):
                raise
        shutil.rmtree(output.work, ignore_errors=True)
        return rows


def _make(job: Job, output: Output, steps: _Steps) -> int:
    """Make an output, with what is in its work folder; returns its rows."""

    def check() -> None:
        steps.check_stop()
        job.check_unchanged(*output.sources)

    table = parquet.open_table(output.sources, job.needed)
    vectors = [_vectors(job, part, output, steps) for part in _files(table)]
    provenance = job.provenance(output)
    if job.request.per_building:
        dtype = np.dtype(job.request.dtype)
        rows = files.write_buildings(output.path, table, vectors, dtype, provenance, check)
    else:
        columns = files.carried(output.sources[0], job.request.columns)
        rows = files.write_images(output.path, table, columns, vectors[0], provenance, check)
    logger.info("%s: %s rows", output.path, f"{rows:,}")
    return rows


class _Steps:
    """What tells the work to stop, and is told how far it is."""

    def __init__(self, should_stop: Callable[[], bool], update: Callable[[int, str], None]) -> None:
        self.should_stop = should_stop
        self.update = update
        self.before = self.done = 0
        self.told = time.monotonic()

    def check_stop(self) -> None:
        """Raise Interrupted when asked to stop."""
        if self.should_stop():
            raise Interrupted(
                "stopped", hint="the same command goes on from there", progress=self.done > 0
            )

    def advance(self, rows: int) -> None:
        """So many rows more went through the head."""
        self.done += rows
        self.update(self.before + self.done, "embedding")
        if time.monotonic() - self.told > TELL_SECONDS:
            self.told = time.monotonic()
            logger.info("%s rows went through the head", f"{self.done:,}")


def _vectors(job: Job, table: Table, output: Output, steps: _Steps) -> Vectors:
    """The head's output for one source file, [N, d]: made, or gone on with, in the work folder."""
    (source,) = table.files
    folder = job.folder(output, source)
    if len(output.sources) == 1 and output.work.exists() and not folder.exists():
        logger.info("%s was begun with something else, such as a precision: anew", output.path)
    vectors = vectors_in(folder, table, job.projector)
    if there := vectors.there():
        logger.info("%s: going on after %s of %s rows", source, f"{there:,}", f"{table.total:,}")
    steps.before += there
    project(
        vectors,
        table,
        job.projector,
        check=lambda: job.check_unchanged(source),
        should_stop=steps.should_stop,
        advance=steps.advance,
    )
    return vectors


@contextlib.contextmanager
def _writing(output: Output, job: Job) -> Iterator[None]:
    """An OSError becomes a RunError that says where, and what is free."""
    folder = output.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        problem = f"{output.path}: cannot be written: {error.strerror or error}"
        if error.errno in DISK_FULL:
            size = job.projector.dim * job.projector.dtype.itemsize
            problem += (
                f"; {shutil.disk_usage(folder).free:,} bytes are free, and each row takes twice "
                f"{size} until the file is there"
            )
        raise RunError(problem, hint="the destination can be on another disk") from None


def _files(table: Table) -> Iterator[Table]:
    """The files of a table, one by one."""
    for path, rows in zip(table.files, table.rows, strict=True):
        yield Table((path,), (rows,))
