"""The only place that knows the names of the files in the folders of runs, studies and jobs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tripletkit.config import Config

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class RunPaths:
    """The files of one training run. `checkpoints` may be `root` itself."""

    root: Path
    checkpoints: Path

    @property
    def config(self) -> Path:
        """The effective configuration."""
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object per validated epoch; no wall-clock times, so that runs compare."""
        return self.root / "metrics.jsonl"

    @property
    def origin(self) -> Path:
        """Of a final training: the trial that its parameters come from."""
        return self.root / "best_trial.json"

    @property
    def provenance(self) -> Path:
        """Code, data and machine of each start of the run; with times, unlike the others."""
        return self.root / "provenance.json"

    def code(self, key: str) -> Path:
        """Changes to the code that were not committed, by a key of their content."""
        return self.root / f"code_{key}.diff"

    @property
    def rerun_of(self) -> Path:
        """Of a run that `tripletkit rerun` made: which run it repeats."""
        return self.root / "rerun.json"

    @property
    def log(self) -> Path:
        """What the run said."""
        return self.root / "train.log"

    @property
    def webhook(self) -> Path:
        """The address that is told of the end, a secret (0600); gone once it has been told."""
        return self.root / ".webhook"

    @property
    def lock(self) -> Path:
        """Held while a process trains in this folder."""
        return self.root / ".lock"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.root / "tensorboard"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation so far."""
        return self.checkpoints / "checkpoint_best.pt"

    @property
    def last(self) -> Path:
        """The newest state, also from within an epoch; gone once `final` is there."""
        return self.checkpoints / "checkpoint_last.pt"

    @property
    def final(self) -> Path:
        """The state after the last epoch."""
        return self.checkpoints / "checkpoint_final.pt"

    def epoch(self, number: int) -> Path:
        """The state after epoch `number`, counted from 1."""
        return self.checkpoints / f"checkpoint_epoch_{number}.pt"

    @property
    def report(self) -> Path:
        """The page of `tripletkit report`."""
        return self.root / "report.html"

    def evaluation(self, split: str) -> EvaluationPaths:
        """What `tripletkit evaluate` found on a split."""
        return EvaluationPaths(self.root / "evaluation" / split)

    def saved(self) -> list[Path]:
        """Every checkpoint in the folder, whatever its state."""
        name = re.compile(r"checkpoint_(epoch_\d+|best|last|final)\.pt")
        return sorted(p for p in self.checkpoints.glob("checkpoint_*.pt") if name.fullmatch(p.name))


def run_paths(checkpoint_dir: Path) -> RunPaths:
    """The layout of `tripletkit train`: everything in one folder."""
    return RunPaths(root=checkpoint_dir, checkpoints=checkpoint_dir)


@dataclass(frozen=True)
class TrialPaths(RunPaths):
    """A run that belongs to a study."""

    @property
    def attempts(self) -> Path:
        """One JSON object per attempt at the trial: by which job, when, how it ended."""
        return self.root / "attempts.jsonl"

    def code(self, key: str) -> Path:
        """In the folder of the study: its trials have the same changes, mostly."""
        return self.root.parent / f"code_{key}.diff"


@dataclass(frozen=True)
class EvaluationPaths:
    """An evaluation of checkpoints on one split."""

    root: Path

    @property
    def report(self) -> Path:
        """Everything, for programs."""
        return self.root / "evaluation.json"

    @property
    def markdown(self) -> Path:
        """The tables, for people."""
        return self.root / "evaluation.md"


@dataclass(frozen=True)
class StudyPaths:
    """The folder of a study."""

    root: Path

    @property
    def config(self) -> Path:
        """The effective configuration of the workers."""
        return self.root / "config.toml"

    @property
    def identity(self) -> Path:
        """Which study the folder belongs to, whatever the names say."""
        return self.root / "study.json"

    @property
    def webhook(self) -> Path:
        """The address that is told of the end, a secret (0600); gone once it has been told."""
        return self.root / ".webhook"

    @property
    def report(self) -> Path:
        """The page of `tripletkit report`."""
        return self.root / "report.html"

    def trial(self, number: int) -> TrialPaths:
        """The folder of one trial."""
        root = self.root / f"trial_{number:05d}"
        return TrialPaths(root=root, checkpoints=root)


def study_paths(config: Config) -> StudyPaths:
    """The folder of the configured study."""
    return StudyPaths(config.output_dir / config.tuning.study_name)


@dataclass(frozen=True)
class LogPaths:
    """The files of jobs, in `global.log_dir`."""

    root: Path

    @property
    def submitit(self) -> Path:
        """What submitit needs: scripts and small pickles. 0700."""
        return self.root / "submitit"

    @property
    def configs(self) -> Path:
        """The effective configurations of submitted jobs that have no run folder yet."""
        return self.root / "configs"

    def record(self, job: str) -> Path:
        """What a job says about itself."""
        return self.root / "jobs" / f"{job}.json"

    def lock(self, job: str) -> Path:
        """Held for as long as the job's process lives."""
        return self.root / "jobs" / f"{job}.lock"

    def records(self) -> list[Path]:
        """The records of all jobs."""
        return sorted((self.root / "jobs").glob("*.json"))

    def output(self, key: str) -> Path:
        """Which jobs were started for an output of `embed`, by a key of its place."""
        return self.root / "embed" / f"{key}.json"

    def out(self, stage: str, job: str) -> Path:
        """Standard output of a job; `%j`, `%A_%a` may stand for the job."""
        return self.root / f"{LOG_NAMES.get(stage, stage)}_{job}.out"

    def err(self, stage: str, job: str) -> Path:
        """Standard error of a job."""
        return self.out(stage, job).with_suffix(".err")

    def of_job(self, job: str) -> list[Path]:
        """The logs that exist of a job, of all its elements if it is an array; .err first."""
        pattern = re.compile(rf".+_{re.escape(job)}(_\d+)?\.(out|err)")
        return sorted(p for p in self.root.glob(f"*_{job}*.*") if pattern.fullmatch(p.name))


LOG_NAMES = {"best": "best_training"}
