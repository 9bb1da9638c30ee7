"""What users may name: a job, a trial, a study or a run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tripletkit.cluster.jobs import LOCAL
from tripletkit.config import Config
from tripletkit.errors import ConfigError
from tripletkit.monitor.inventory import (
    GONE,
    OF_RUN,
    OF_STUDY,
    Inventory,
    Job,
    of_study,
    owner,
    spans,
)
from tripletkit.paths import StudyPaths

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_JOB = re.compile(rf"(?:job:)?({LOCAL}\d+|\d+(?:_\d+)?)")
_TRIAL = re.compile(r"(?:trial:)?(?:trial_)?(\d+)")
_STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Target:
    """What was named, and where it is found."""

    kind: Literal["job", "trial", "study", "run"]
    name: str
    inventory: Inventory
    number: int = -1  # of a trial

    def __str__(self) -> str:
        return f"trial {self.number}" if self.kind == "trial" else f"{self.kind} {self.name}"

    def jobs(self, also: Collection[str] = ()) -> dict[str, Job]:
        """Its jobs, oldest first; of a trial, the one that works on it, or did so last.

        `also`: ids of jobs that are known to belong to it.
        """
        ids = {*also, *(job for trial in self.trials() if (job := owner(trial)))}
        found = {id_: job for id_, job in self.inventory.jobs(ids).items() if self._has(job, ids)}
        if self.kind == "job" and not found:  # cancelled before it could leave a trace
            found = {self.name: Job(self.name, "", GONE)}
        return found

    def trials(self) -> list[FrozenTrial]:
        """Its trials; none while the storage is away."""
        if self.kind in ("job", "run"):
            return []
        trials = self.inventory.trials() or []
        return [trial for trial in trials if self.kind == "study" or trial.number == self.number]

    def _has(self, job: Job, ids: Collection[str]) -> bool:
        match self.kind:
            case "job":
                return self.name in (job.id, job.array)
            case "trial":
                return job.id in ids
            case "study":
                ours = job.id in ids or (job.stage in OF_STUDY and job.subject == self.name)
                return ours or _study_reported(job, self.inventory) == self.name
            case "run":
                return _run_of(job, self.inventory) == self.name


def resolve(text: str | None, config: Config, patience: float = 0) -> Target:
    """What `text` names; the configured study without one. `config` is `load_study`'s.

    `job:123` and `trial:7` leave no doubt; a mere number is a trial if the study has it, else a
    job. `patience` as of the Inventory. Raises ConfigError that lists what there is.
    """
    inventory = Inventory(config, patience)
    if text is None or text == inventory.study_name:
        return Target("study", inventory.study_name, inventory)
    trial = _TRIAL.fullmatch(text)
    if trial and _has_trial(inventory, number := int(trial[1])):
        return Target("trial", trial[1], inventory, number)
    jobs = inventory.jobs()
    if job := _JOB.fullmatch(text):
        found = Target("job", job[1], inventory)
        if any(found._has(each, ()) for each in jobs.values()) or inventory.has_submitted(job[1]):
            return found
    if text in {_run_of(each, inventory) for each in jobs.values()}:
        return Target("run", text, inventory)
    if _STUDY.fullmatch(text) and text in {*_studies(jobs.values()), *_folders(config)}:
        return Target("study", text, Inventory(of_study(config, text), patience))
    raise ConfigError(
        f"nothing here is called {text!r}", hint="\n".join(_offer(inventory, jobs.values(), config))
    )


def _has_trial(inventory: Inventory, number: int) -> bool:
    """In the study or, when its storage does not answer, by its folder."""
    trials = inventory.trials()
    return inventory.paths.trial(number).root.exists() if trials is None else number < len(trials)


def _run_of(job: Job, inventory: Inventory) -> str | None:
    """The name of the run's folder that a job trains in, or reads."""
    if job.stage in OF_RUN:
        return None if _study_reported(job, inventory) else job.subject or None
    return _own_run(job) if job.stage == "best" else None


def _study_reported(job: Job, inventory: Inventory) -> str | None:
    """The study that a report is about, if it is not about a run.

    Its configuration names both. Without that, as while it waits, what is called like a study is
    one.
    """
    if job.stage != "report" or _own_run(job) == job.subject:
        return None
    names = {inventory.study_name, *_folders(inventory.config)}
    return job.subject if job.subject in names else None


def _own_run(job: Job) -> str | None:
    """The name of the run's folder in the configuration that a job was started with."""
    if job.record is None or not job.record.config:
        return None
    try:
        values = tomllib.loads(Path(job.record.config).read_text())
        return Path(values["paths"]["checkpoint_dir"]).name
    except (OSError, ValueError, KeyError):
        return None


def _studies(jobs: Collection[Job]) -> set[str]:
    return {job.subject for job in jobs if job.stage in OF_STUDY and job.subject}


def _folders(config: Config) -> Iterator[str]:
    """Studies that were prepared here, whether or not a job of theirs is known."""
    for identity in sorted(config.output_dir.glob(f"*/{StudyPaths(Path()).identity.name}")):
        yield identity.parent.name


def _offer(inventory: Inventory, jobs: Collection[Job], config: Config) -> Iterator[str]:
    """What a name could mean."""
    trials = inventory.trials()
    if trials is not None:
        last = f", trials 0 to {len(trials) - 1}" if trials else ", no trials yet"
        yield f"study {inventory.study_name}{last}"
    others = {*_studies(jobs), *_folders(config)} - {inventory.study_name}
    for kind, names in (
        ("studies", others),
        ("runs", {run for job in jobs if (run := _run_of(job, inventory))}),
        ("jobs", spans(job.id for job in jobs)),
    ):
        if names:
            yield f"{kind}: {', '.join(sorted(names) if isinstance(names, set) else names)}"
    yield from inventory.warnings  # what there is may be more than what answered
    yield (
        f"looked at {inventory.paths.root} and the jobs of {inventory.logs.root}: "
        "--study-name and --config say where else"
    )
