"""What can be wrong around a study: records of jobs, disks, its database."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tripletkit import fsio
from tripletkit.cluster import jobs
from tripletkit.cluster.jobs import Record
from tripletkit.config import Tuning
from tripletkit.monitor.facts import size
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.tune.claims import JobStates

ROOM = 2**30  # bytes that should be free on every disk of ours
FILES = 1000  # inodes
CROWDED = 0.9  # of a server's connections


class Finding(NamedTuple):
    """A mismatch and its repair. `apply` does it, and says whether it did; without, you must."""

    kind: str
    what: str
    repair: str
    harmless: bool = False  # worth knowing, but nothing is wrong
    apply: Callable[[], bool] | None = None


def open_records(logs: LogPaths, job_states: JobStates) -> Iterator[Finding]:
    """Jobs that were killed before they could write how they ended."""
    going = [record for record in jobs.records(logs) if record.ended is None]
    states = job_states([record.job for record in going])
    for record in going:
        if states[record.job] == "gone":
            path = logs.record(record.job)
            yield Finding(
                "open_record",
                f"{path}: job {record.job} ({record.name}) has no end, and is gone",
                "note that it was killed",
                apply=partial(_close, logs, record),
            )


def _close(logs: LogPaths, record: Record) -> bool:
    with fsio.exclusive_lock(logs.lock(record.job), wait=False) as lock:
        path = logs.record(record.job)
        if not lock.ours or jobs.read(path) != record:
            return False
        end = replace(record, ended=fsio.timestamp(), message="killed; noted by tripletkit doctor")
        fsio.write_json(path, asdict(end))
        return True


def full_disk(name: str, folder: Path, room: int = ROOM, files: int = FILES) -> Iterator[Finding]:
    """A folder that cannot be written to, or soon cannot: `room` in bytes. `name` is its key."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding(
            "not_writable",
            f"{name}: {there}: {error.strerror}",
            f"make room, make it writable, or set {name} to another folder",
        )
        return
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    if free < room:
        yield Finding(
            "disk_full",
            f"{name}: {size(free)} are free on the disk of {there}, and {size(room)} may be needed",
            "make room, or choose another disk",
        )
    if disk.f_files and disk.f_favail < files:
        yield Finding(
            "no_inodes",
            f"{name}: {disk.f_favail} more files fit on the disk of {there}, and {files} may be "
            "needed",
            "delete files that nobody needs, or choose another disk",
        )


def needs(paths: StudyPaths, trials: int) -> tuple[int, int]:
    """Bytes and files that so many more trials may need, judging by the newest ones."""
    sizes = [0]
    files = [0]
    for folder in sorted(paths.root.glob("trial_*"))[-20:]:
        found = [entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()]
        sizes.append(sum(found))
        files.append(len(found))
    return max(ROOM, trials * max(sizes)), max(FILES, trials * max(files))


def sick_database(tuning: Tuning) -> Iterator[Finding]:
    """Of a PostgreSQL of ours: whether it is up, and how full."""
    if tuning.storage_url is not None or not tuning.storage_path.is_dir():
        return
    from tripletkit.tune import database  # heavy, and only for this

    folder = tuning.storage_path
    word = shlex.quote(str(folder))
    now = database.status(folder)
    if now.state != "up":
        yield Finding(
            "database",
            f"the database in {folder} is not up: {now}",
            f"`tripletkit db up {word}` starts it",
        )
    elif now.connections > CROWDED * now.max_connections:
        yield Finding(
            "connections",
            f"the database in {folder} has {now.connections} of at most {now.max_connections} "
            "connections",
            f"`tripletkit db down {word}` and `db up --workers N`, with as many as there are",
        )


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    shown = " ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} ... ({len(names)})"
