"""What is known of a trial and of a job, from all sides; and the sizes and times in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tripletkit.cluster import resources
from tripletkit.cluster.jobs import LOCAL, JobState, Record
from tripletkit.cluster.queue import PastJob, QueuedJob


class Line(NamedTuple):
    """A line of a log."""

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.number}: {self.text}"


class JobFacts(NamedTuple):
    """One job from all sides."""

    id: str
    state: JobState
    queued: QueuedJob | None = None
    runs: tuple[PastJob, ...] = ()  # those that started and ended, oldest first
    never_ran: PastJob | None = None  # cancelled while it waited
    record: Record | None = None
    record_file: str = ""
    log: tuple[Line, ...] = ()  # the end of it, since its newest start
    silent: float | None = None  # seconds since the log's last line

    @property
    def is_local(self) -> bool:
        """A background process of some host, unknown to Slurm."""
        return self.id.startswith(LOCAL)

    @property
    def newest(self) -> PastJob | None:
        """Its newest start that ended."""
        return self.runs[-1] if self.runs else None

    @property
    def newest_record(self) -> Record | None:
        """Its record; not if it could not start again, and the record is of the start before."""
        if self.record is not None and self.record.restart >= len(self.runs) - 1:
            return self.record
        return None


class TrialFacts(NamedTuple):
    """One trial: what the study and its folder say."""

    number: int
    state: str  # Optuna's; "" when the study cannot be reached, and `message` says why
    objective: str
    folder: str
    epochs: int  # of a whole trial
    workers: int = 0  # of its study that run or wait in the queue
    value: float | None = None
    cause: Mapping[str, str] | None = None
    owner: Mapping[str, Any] | None = None
    reports: Mapping[int, float] = {}
    params: Mapping[str, Any] = {}
    batch_size: int | None = None
    per_gpu: int = 1  # trials at once on its GPU
    attempts: Sequence[Mapping[str, Any]] = ()
    pruned_by: str = ""  # the values that decided
    message: str = ""


def seconds(duration: str) -> int | None:
    """`1-02:03:04`, as Slurm prints it; None for UNLIMITED and the like."""
    try:
        return resources.seconds(duration)
    except ValueError:
        return 0 if re.fullmatch(r"[0:]+", duration) else None


def duration(seconds: int) -> str:
    """As `--time` reads it: `36:00:00`."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def bytes_of(size: str) -> int | None:
    """Memory as sacct prints it: `2000M`, `2Gn`; None per core (`2Gc`), and where there is none."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([KMGT])n?", size)
    return round(float(match[1]) * 1024 ** " KMGT".index(match[2])) if match else None


def size(count: float) -> str:
    """Bytes for people: `1.5G`."""
    unit = 0
    while count >= 1024 and unit < 4:
        count, unit = count / 1024, unit + 1
    return f"{count:.3g}{'BKMGT'[unit]}" if count < 1000 else f"{count:.0f}{'BKMGT'[unit]}"
