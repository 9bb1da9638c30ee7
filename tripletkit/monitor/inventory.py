"""What there is: the study and its trials, and every job that the queue, logs and records know."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tripletkit import config as configuration
from tripletkit.cluster import jobs as records
from tripletkit.cluster import queue
from tripletkit.cluster.jobs import LOCAL, Record
from tripletkit.config import Config
from tripletkit.errors import REQUEUE, ClusterError, Interrupted, StorageError
from tripletkit.monitor.facts import seconds
from tripletkit.paths import LOG_NAMES, LogPaths, StudyPaths, study_paths

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from tripletkit.tune.storage import SharedStudy

OF_STUDY = ("tune", "tidy", "best")  # the jobs that are called after a study
OF_RUN = (
    "train",
    "evaluate",
    "bands",
    "embed",
    "report",
)  # and those called after the folder of a run
STAGES = (*OF_STUDY, *OF_RUN, "db")

# How a job ended, as the accounting says, and as far as we can tell ourselves without it.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
STOPPED = "STOPPED"  # saved its state and left, as asked
KILLED = "KILLED"  # a process of this host that ended without a word
GONE = "GONE"  # left the queue, and nobody says how
UNKNOWN = "UNKNOWN"  # cannot be asked: another host's process, or Slurm does not answer

_LOG = re.compile(rf"(\w+?)_({LOCAL}\d+|\d+(?:_\d+)?)\.(?:out|err)")
_STAGE_OF = {name: stage for stage, name in LOG_NAMES.items()}


@dataclass(frozen=True)
class Job:
    """A Slurm job, an element of an array, or a background process. "" and None: nobody says."""

    id: str
    name: str  # stage:subject, as in the queue
    state: str  # Slurm's, or one of those above
    reason: str = ""  # why it waits
    node: str = ""
    elapsed: float | None = None  # seconds, of its newest start, like `limit`
    limit: float | None = None
    record: Record | None = None
    here: bool = False  # started with our log folder

    @property
    def stage(self) -> str:
        """`tune`, `train`, ..."""
        return self.name.partition(":")[0]

    @property
    def subject(self) -> str:
        """The study, run or database that it works for."""
        return self.name.partition(":")[2]

    @property
    def array(self) -> str:
        """The job that was submitted: of an element, its array."""
        return self.id.partition("_")[0]

    @property
    def active(self) -> bool:
        """It runs, or will."""
        return self.state not in (*ENDED, STOPPED, KILLED, GONE, UNKNOWN)

    @property
    def over(self) -> bool:
        """It ended. An UNKNOWN one is neither active nor over."""
        return not self.active and self.state != UNKNOWN

    @property
    def failed(self) -> bool:
        """It is over and did not do what it was to do."""
        return self.over and self.state != "COMPLETED"

    @property
    def age(self) -> tuple[bool, list[int], str]:
        """Sorts jobs by when they were submitted, Slurm's before local ones."""
        if self.id.startswith(LOCAL):
            return True, [], self.record.started if self.record else "~"
        return False, [int(part) for part in self.id.split("_")], ""


class Inventory:
    """The study and the jobs of a configuration; everything is asked anew at each call.

    A storage or a Slurm that does not answer is a line in `warnings`, no error. `patience`: how
    many seconds to wait for the storage.
    """

    def __init__(self, config: Config, patience: float = 0) -> None:
        self.paths = study_paths(config)
        self.config = config
        self.logs = LogPaths(config.global_.log_dir)
        self.warnings: list[str] = []
        self.silence = ""  # instead of Slurm's last answer; it alone knows of jobs that wait
        self.patience = patience
        self._shared: dict[bool, SharedStudy] = {}
        self._settled: dict[str, Job] = {}

    @property
    def study_name(self) -> str:
        """The configured study."""
        return self.config.tuning.study_name

    def study(self, *, change: bool = False) -> SharedStudy:
        """The study, to read or to `change` it.

        Raises NoStudyError if there is none, and StorageError if the storage is away.
        """
        from tripletkit.tune import storage

        if change not in self._shared:
            self._shared[change] = storage.open_study(
                self.config.tuning, seed=0, workers=1, patience=self.patience, read_only=not change
            )
        return self._shared[change]

    def trials(self) -> list[FrozenTrial] | None:
        """Every trial, by number; None without a study."""
        try:
            return self.study().study.get_trials(deepcopy=False)
        except StorageError as error:
            self._warn(error.message)
            return None

    def total(self) -> int:
        """How many trials the study is to have."""
        from tripletkit.tune.study import TOTAL

        planned = self.config.tuning.total
        try:
            return int(self.study().study.user_attrs.get(TOTAL, planned))
        except StorageError as error:
            self._warn(error.message)
            return planned

    def jobs(self, owners: Iterable[str] = ()) -> dict[str, Job]:
        """Every job of ours by id, oldest first; `owners` are ids of trials' jobs.

        One call of squeue, none of sacct: how a job ended that Slurm only remembers in its
        accounting, `settled` finds out.
        """
        known = {record.job: record for record in records.records(self.logs)}
        logged = self._logged()
        arrays = {job.partition("_")[0] for job in (*known, *logged)} | self._submitted()
        names = dict.fromkeys(owners, f"tune:{self.study_name}")
        names |= {job: f"{stage}:" for job, stage in logged.items() if job not in names}
        names |= {record.job: record.name for record in known.values()}
        queued = self._queued()
        found = {
            row.id: Job(
                row.id, row.name, row.state, row.reason, row.node,
                seconds(row.elapsed), seconds(row.limit), known.get(row.id),
            )
            for row in queued or ()
        }  # fmt: skip
        local = [job for job in names if job.startswith(LOCAL)]
        states = records.states(self.logs, local)
        for job, name in names.items():
            if job.startswith(LOCAL):
                found[job] = _process(job, name, states[job], known.get(job), self.logs)
            elif job not in found:
                state = UNKNOWN if queued is None else GONE
                found[job] = _left(job, name, state, known.get(job))
        here = (replace(job, here=job.array in arrays) for job in found.values())
        return {job.id: job for job in sorted(here, key=lambda job: job.age)}

    def settled(self, jobs: Iterable[Job]) -> dict[str, Job]:
        """The same jobs; of those that left the queue, how the accounting says that they ended.

        It calls a job "allocation" that was over before it heard of its start.
        """
        wanted = {job.id: job for job in jobs}
        asked = {
            job.id
            for job in wanted.values()
            if job.over and not job.id.startswith(LOCAL) and job.id not in self._settled
        }
        if asked and queue.available():
            try:
                past = {run.id: run for run in queue.past(asked)}  # the newest start of each
            except ClusterError as error:
                self._warn(f"cannot ask the accounting: {error.message}")
                past = {}
            for job in asked & past.keys():
                run, name = past[job], wanted[job].name
                if run.state in ENDED:  # the accounting lags behind by a second or two
                    self._settled[job] = replace(
                        wanted[job], name=run.name if run.name.startswith(name) else name,
                        state=run.state, node=run.node,
                        elapsed=seconds(run.elapsed), limit=seconds(run.limit),
                    )  # fmt: skip
        return {
            id_: self._settled.get(id_, job) if job.over else job for id_, job in wanted.items()
        }

    def ended(self, job: Job) -> float:
        """About when a job ended, as Unix time: as it says, or when it wrote its log.

        Without a log it ended now if there is a record, as it was killed before it could say more,
        and long ago if only a trial remembers it.
        """
        if job.record is not None and job.record.ended is not None:
            return time.time() - _since(job.record.ended)
        logs = (self.logs.out(job.stage, job.id), self.logs.err(job.stage, job.id))
        silent = 0.0 if job.record is None else time.time()
        return max((path.stat().st_mtime for path in logs if path.exists()), default=silent)

    def has_submitted(self, job: str) -> bool:
        """Whether a job was submitted with our log folder, even if it never started."""
        return job.partition("_")[0] in self._submitted()

    def _queued(self) -> list[queue.QueuedJob] | None:
        """What is ours in the queue; None if nobody can say."""
        self.silence = ""
        if not queue.available():
            return None
        try:
            return [row for row in queue.queued() if row.name.partition(":")[0] in STAGES]
        except ClusterError as error:
            self.silence = f"cannot ask Slurm: {error.message}"
            self._warn(self.silence)
            return None

    def _logged(self) -> dict[str, str]:
        """Jobs with a log in our folder, and their stage."""
        matches = (_LOG.fullmatch(path.name) for path in _listed(self.logs.root))
        found = {match[2]: _STAGE_OF.get(match[1], match[1]) for match in matches if match}
        return {job: stage for job, stage in found.items() if stage in STAGES}

    def _submitted(self) -> set[str]:
        """Jobs and arrays that submitit has files of, also those that have not started yet."""
        return {path.name.partition("_")[0] for path in _listed(self.logs.submitit)}

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


def owner(trial: FrozenTrial) -> str | None:
    """The job that works on the trial, or did so last."""
    from tripletkit.tune import claims

    mark: Mapping[str, str] | None = claims.owner(trial)
    return mark["job"] if mark else None


def spans(ids: Iterable[str]) -> list[str]:
    """`12_[0-3,7]` for the elements of an array, and other ids as they are."""
    arrays: dict[str, list[int]] = {}
    for id_ in ids:
        array, _, element = id_.partition("_")
        arrays.setdefault(array, []).extend([int(element)] if element else [])
    return [
        f"{array}_{elements[0]}" if len(elements) == 1
        else f"{array}_[{_ranges(sorted(elements))}]" if elements
        else array
        for array, elements in arrays.items()
    ]  # fmt: skip


def _ranges(numbers: list[int]) -> str:
    """`0-3,7`, of numbers in order."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def of_study(config: Config, name: str) -> Config:
    """The configuration of another study, with its [tuning] as `tune` left it in its folder."""
    other = configuration.with_values(config, tuning={"study_name": name})
    own = StudyPaths(other.output_dir / name).config
    if not own.exists():
        return other
    tuning = configuration.load(own, environ={}).tuning.model_dump(exclude={"output_dir"})
    return configuration.with_values(other, tuning=tuning)


def _process(
    job: str, name: str, state: records.JobState, record: Record | None, logs: LogPaths
) -> Job:
    """A background process: its lock says whether it lives, its record how it ended."""
    if record is None:
        starts = _is_starting(job, logs)
        return Job(job, name, "PENDING" if starts else KILLED, "starting" if starts else "")
    found = _left(job, name, KILLED, record)
    if state == "running":
        return replace(found, state="RUNNING", elapsed=_since(record.started))
    return replace(found, state=UNKNOWN) if state == "unknown" else found


def _is_starting(job: str, logs: LogPaths) -> bool:
    """Python needs a moment before the job can say anything itself."""
    process = Path(f"/proc/{job.removeprefix(LOCAL)}/cmdline")
    try:
        return str(logs.submitit).encode() in process.read_bytes()
    except OSError:
        return False


def _left(job: str, name: str, state: str, record: Record | None) -> Job:
    """A job that is no longer there, as its record tells it; `state` if it says nothing."""
    if record is None:
        return Job(job, name, state)
    found = Job(job, name, state, node=record.host, record=record)
    if record.ended is None:
        return found
    stopped = record.exit_code in (Interrupted.exit_code, REQUEUE)
    if stopped and state == UNKNOWN:
        return found  # it may have come back since
    state = "COMPLETED" if record.exit_code == 0 else STOPPED if stopped else "FAILED"
    elapsed = _since(record.started) - _since(record.ended)
    return replace(found, state=state, elapsed=elapsed)


def _since(stamp: str) -> float:
    """Seconds since a time of a record."""
    return time.time() - datetime.fromisoformat(stamp).astimezone(UTC).timestamp()


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def is_on_this_host(job: Job) -> bool:
    """Whether a background process can be reached from here."""
    return job.record is None or job.record.host == socket.gethostname()
