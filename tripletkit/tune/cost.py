"""What a study has cost, and what it will: the time of its attempts, times the GPUs they held.

Without GPUs the same is counted in hours of workers. What jobs hold while no trial runs (the start
of Python, the wait for a time limit) is not in it.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from tripletkit import config as configuration
from tripletkit.cluster import jobs, resources
from tripletkit.cluster.jobs import JobState
from tripletkit.config import Config
from tripletkit.errors import TripletkitError
from tripletkit.paths import LogPaths, RunPaths, StudyPaths, TrialPaths
from tripletkit.tune import attempts as records

if TYPE_CHECKING:
    import optuna

GPU_HOURS, WORKER_HOURS = "GPU-hours", "worker-hours"
HOUR = 3600.0  # seconds


@dataclass(frozen=True)
class Attempt:
    """One attempt at a trial. Times are Unix seconds.

    `ended` of one that was killed is the newest sign of life in its trial's folder, of one that
    runs it is now.
    """

    trial: int
    job: str
    host: str
    slot: int
    started: float
    ended: float
    outcome: str  # complete, pruned, stopped, failed, killed, running
    gpus: float  # its share of the GPUs of its job
    share: float = 1.0  # of its job as a whole: 1 / slots
    kept: float = 0.0  # until then its work was on file when it ended

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started


@dataclass(frozen=True)
class Spent:
    """What a study has cost so far, in `unit`; `gpu_hours` is `useful` + `wasted`.

    useful: attempts of trials that ended well, are open or run, up to their newest checkpoint.
    wasted: what was done after the newest checkpoint of an attempt that was interrupted, and has
    to be done again; and all of the trials that failed.
    saved: epochs that pruned trials did not train, times the seconds that an epoch takes (of
    complete trials on average; without one, of the pruned trial itself), times its GPUs.
    """

    gpu_hours: float
    useful: float
    wasted: float
    saved: float
    unit: str = GPU_HOURS


def attempts(paths: StudyPaths) -> list[Attempt]:
    """Every attempt at the trials of a study, by trial, oldest first."""
    found = {number: records.read(trial.attempts) for number, trial in _trial_folders(paths)}
    open_jobs = {each[-1]["job"] for each in found.values() if each and "outcome" not in each[-1]}
    states: Mapping[str, JobState] = {}
    config = _config(paths)
    if open_jobs and config is not None:
        states = jobs.states(LogPaths(config.global_.log_dir), open_jobs)
    share = share_of(config)
    return [
        attempt
        for number, lines in found.items()
        for attempt in of_trial(number, lines, paths.trial(number), states, share)
    ]


def spent(paths: StudyPaths, study: optuna.Study, known: Sequence[Attempt] | None = None) -> Spent:
    """What the study has cost so far; `known`: its `attempts`, where the caller has them."""
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    made: dict[int, list[Attempt]] = {}
    for attempt in attempts(paths) if known is None else known:
        made.setdefault(attempt.trial, []).append(attempt)
    unit = unit_of(each for tries in made.values() for each in tries)
    useful = wasted = 0.0
    for number, tries in made.items():
        failed = number in trials and trials[number].state == TrialState.FAIL
        for each in tries:
            lost = each.seconds if failed else _lost(each)
            useful += weight(each, unit) * (each.seconds - lost) / HOUR
            wasted += weight(each, unit) * lost / HOUR
    saved = _saved(made, trials, _config(paths), unit)
    return Spent(useful + wasted, useful, wasted, saved, unit)


def quote(
    config: Config, paths: StudyPaths, study: optuna.Study | None, *, slurm: bool
) -> list[str]:
    """What the trials to be done will cost, in words: expected, and at most.

    A trial takes what the complete and the pruned ones of this study took, on average and by their
    quartiles. At the most, Slurm charges all workers until their time limit.
    """
    trials = study.get_trials(deepcopy=False) if study is not None else []
    waiting = sum(trial.state == TrialState.WAITING for trial in trials)
    left = waiting + max(0, config.tuning.total - len(trials))
    held = share(config, slurm=slurm)
    unit = GPU_HOURS if held["gpus"] else WORKER_HOURS
    states = {trial.number: trial.state for trial in trials}
    took: dict[int, float] = {}
    for each in attempts(paths) if trials else []:
        if states.get(each.trial) in (TrialState.COMPLETE, TrialState.PRUNED):
            took[each.trial] = took.get(each.trial, 0.0) + each.seconds / HOUR
    lines = []
    if took:
        hours = sorted(took.values())
        low, _, high = statistics.quantiles(hours, n=4, method="inclusive") if len(hours) > 1 else (
            hours * 3
        )  # fmt: skip
        each_ = statistics.fmean(hours)
        times = left * (held["gpus"] or held["share"])
        pruned = sum(states[number] == TrialState.PRUNED for number in took)
        lines.append(
            f"{left} trials: about {_hours(each_ * times)} {unit} "
            f"({_hours(low * times)} to {_hours(high * times)}), by {_hours(60 * each_)} minutes for a trial: "
            f"the average of {len(took)}, {pruned} of them pruned"
        )
    if slurm:
        workers = resources.workers(config, left)
        limit, gpus = resources.seconds(config.slurm.time) / HOUR, resources.gpus(config.slurm)
        most = workers * limit * (gpus or 1)
        lines.append(
            f"at most {_hours(most)} {unit}: workers ({workers}) x time limit ({_hours(limit)} h)"
            + (f" x GPUs ({gpus})" if gpus else "")
            + ", which Slurm may charge; a worker that reaches the limit starts again while trials "
            "are left"
        )
        if not took:
            lines.append(
                "no trial of this study has been measured: run one (--n-trials 1), and this says "
                "what the others will cost"
            )
    if config.tuning.budget_gpu_hours and lines:
        lines.append(f"budget of the study: {config.tuning.budget_gpu_hours:g} {unit}")
    return lines


def _hours(value: float) -> str:
    """Two digits at least."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def unit_of(tries: Iterable[Attempt]) -> str:
    """GPU-hours as soon as one of them held a GPU."""
    tries = list(tries)
    return GPU_HOURS if any(each.gpus for each in tries) or not tries else WORKER_HOURS


def share(config: Config, *, slurm: bool) -> dict[str, float]:
    """What a trial holds of its job: its GPUs, and its share of the job.

    Slurm charges what the job asked for, used or not. Elsewhere a GPU counts if it is used.
    """
    slots, gpus = resources.slots(config), resources.gpus(config.slurm)
    if not slurm:
        from tripletkit.device import choose_device

        try:
            used = choose_device(config.training.device).type == "cuda"
        except TripletkitError:  # the training will say so
            used = False
        gpus = max(gpus, 1) if used else 0
    return {"gpus": gpus / slots, "share": 1 / slots}


def signs_of_life(paths: RunPaths) -> dict[str, float]:
    """When the newest checkpoint of a trial was saved, and when anything was last written; if ever."""
    found: dict[str, float] = {}
    saved = _newest(paths.saved())
    seen = _newest([*paths.saved(), paths.metrics, paths.log])
    if saved:
        found["saved"] = saved
    if seen:
        found["seen"] = seen
    return found


def _newest(files: Iterable[Path]) -> float:
    times = [0.0]
    for file in files:
        try:
            times.append(file.stat().st_mtime)
        except OSError:  # not there yet, or replaced at this moment
            continue
    return round(max(times), 3)


def _trial_folders(paths: StudyPaths) -> list[tuple[int, TrialPaths]]:
    folders = ((re.fullmatch(r"trial_(\d{5,})", p.name)) for p in paths.root.glob("trial_*"))
    return [(number, paths.trial(number)) for number in sorted(int(m[1]) for m in folders if m)]


def _config(paths: StudyPaths) -> Config | None:
    """The workers' configuration, where there is one."""
    try:
        return configuration.load(paths.config, environ={}) if paths.config.exists() else None
    except TripletkitError:
        return None


def share_of(config: Config | None) -> dict[str, float]:
    """For attempts that do not say what they held."""
    return share(config, slurm=True) if config else {"gpus": 1.0, "share": 1.0}


def of_trial(
    number: int,
    lines: Sequence[Mapping[str, Any]],
    paths: TrialPaths,
    states: Mapping[str, JobState],
    share: Mapping[str, float],
) -> list[Attempt]:
    """The attempts at one trial, of its lines in attempts.jsonl.

    `states`: of the job of the last one, which may still run; without it, it was killed.

    Lines of older versions do not say what they held: on Slurm it was `share`, elsewhere no GPU, as
    far as we know. Nor what was on file when they ended: then nothing is taken to be lost.
    """
    found = []
    for line, following in zip(lines, [*lines[1:], None], strict=False):
        started = _seconds(line["started"])
        signs = signs_of_life(paths) if following is None else following
        outcome, ended = line.get("outcome"), time.time()
        if outcome is None:
            state = states.get(line["job"], "gone") if following is None else "gone"
            outcome = "running" if state in ("running", "unknown") else "killed"
            if state != "running":  # of one that nobody knows of we believe what we see
                until = _seconds(following["started"]) if following else ended
                ended = min(signs.get("seen", until if following else started), until)
        else:
            ended = _seconds(line["ended"])
        ended = max(ended, started)
        done = outcome in ("complete", "pruned", "running")
        is_old = following is not None and "gpus" not in following
        gpus = 0.0 if line["job"].startswith(jobs.LOCAL) else share["gpus"]
        found.append(
            Attempt(
                trial=number,
                job=line["job"],
                host=line.get("host", ""),
                slot=line.get("slot", 0),
                started=started,
                ended=ended,
                outcome=outcome,
                gpus=line.get("gpus", gpus),
                share=line.get("share", share["share"]),
                kept=ended if done or is_old else min(max(signs.get("saved", 0.0), started), ended),
            )
        )
    return found


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def _lost(attempt: Attempt) -> float:
    """Seconds of work that is to be done again."""
    return attempt.ended - attempt.kept


def weight(attempt: Attempt, unit: str) -> float:
    """By what its hours are multiplied."""
    return attempt.gpus if unit == GPU_HOURS else attempt.share


def _saved(
    made: Mapping[int, Sequence[Attempt]],
    trials: Mapping[int, FrozenTrial],
    config: Config | None,
    unit: str,
) -> float:
    """Hours that pruning saved."""

    def of(state: TrialState) -> list[FrozenTrial]:
        return [trial for n, trial in trials.items() if trial.state == state and made.get(n)]

    def pace(some: Sequence[FrozenTrial]) -> float | None:
        """Seconds per epoch."""
        epochs = sum(max(t.intermediate_values, default=0) for t in some)
        useful = sum(each.seconds - _lost(each) for t in some for each in made[t.number])
        return useful / epochs if epochs else None

    last = max((max(t.intermediate_values, default=0) for t in of(TrialState.COMPLETE)), default=0)
    last = config.tuning.max_epochs if config is not None else last
    usual, hours = pace(of(TrialState.COMPLETE)), 0.0
    for trial in of(TrialState.PRUNED):
        seconds = usual if usual is not None else pace([trial])
        untrained = max(0, last - max(trial.intermediate_values, default=0))
        hours += (seconds or 0.0) * untrained * weight(made[trial.number][-1], unit) / HOUR
    return hours
