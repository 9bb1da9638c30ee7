"""The budget of a study: whether another trial may start.

A trial starts if what all of them have cost, what those that run are expected to cost to their end,
and what it is expected to cost itself, stay within the budget. A trial is expected to cost what the
complete and the pruned ones did on average; before there are any, nothing, so the first trial of each
worker starts in any case. What runs is never stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from tripletkit.config import Config
from tripletkit.paths import StudyPaths
from tripletkit.tune import attempts as records
from tripletkit.tune import claims, cost
from tripletkit.tune.claims import JobStates
from tripletkit.tune.cost import GPU_HOURS, HOUR, WORKER_HOURS
from tripletkit.tune.storage import SharedStudy

# User attribute of the study: as `Reached`, while the budget keeps trials from starting.
REACHED = "tripletkit:budget_reached"


class Reached(NamedTuple):
    """A budget that is used up."""

    budget: float
    unit: str
    spent: float
    done: int
    total: int

    def __str__(self) -> str:
        return (
            f"budget of {self.budget:g} {self.unit} reached ({self.spent:.3g} spent): "
            f"{self.done} of {self.total} trials done"
        )


class Budget:
    """What the trials of a study have cost, and whether another may start, for one worker.

    A trial in work costs time until its last sign of life: nobody may know whether its job lives.
    """

    def __init__(self, config: Config, paths: StudyPaths, *, slurm: bool) -> None:
        self.limit, self.total = config.tuning.budget_gpu_hours, config.tuning.total
        self.paths = paths
        self.share = cost.share(config, slurm=slurm)
        self.unit = GPU_HOURS if self.share["gpus"] else WORKER_HOURS
        self.refused: Reached | None = None
        # Hours of trials up to their newest attempt: which is over, or may go on.
        self._over: dict[tuple[int, int], float] = {}
        self._open: dict[tuple[int, int], float] = {}

    def measure(self, trials: Sequence[FrozenTrial]) -> None:
        """Read what these trials have cost, so that `allows` has little to read.

        What does not change any more is read once.
        """
        self._open.clear()
        for trial in trials:
            self._hours(trial)

    def allows(
        self, trials: Sequence[FrozenTrial], idle: Collection[int], trial: FrozenTrial | None
    ) -> bool:
        """Whether `trial`, or else a new one, may start.

        `idle`: the RUNNING ones that nobody works on at this moment.
        """
        self.refused = None
        if not self.limit:
            return True
        running = {each.number for each in trials if each.state == TrialState.RUNNING}
        at_work = running - set(idle)
        hours = {each.number: self._hours(each) for each in trials}
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        measured = [hours[each.number] for each in trials if each.state in ended]
        expected = sum(measured) / len(measured) if measured else 0.0
        committed = sum(
            max(spent, expected) if number in at_work else spent for number, spent in hours.items()
        )
        own = max(0.0, expected - (hours[trial.number] if trial else 0.0))
        if committed < self.limit and committed + own <= self.limit:
            return True
        done = sum(each.state.is_finished() for each in trials)
        self.refused = Reached(self.limit, self.unit, sum(hours.values()), done, self.total)
        return False

    def _hours(self, trial: FrozenTrial) -> float:
        mark = claims.owner(trial)
        if mark is None:
            return 0.0
        key = trial.number, mark["attempt"]
        for known in (self._over, self._open):
            if key in known:
                return known[key]
        paths = self.paths.trial(trial.number)
        lines = records.read(paths.attempts)
        made = cost.of_trial(trial.number, lines, paths, {}, self.share)
        hours = sum(cost.weight(each, self.unit) * each.seconds for each in made) / HOUR
        begun = bool(lines) and lines[-1].get("attempt", 0) >= mark["attempt"]
        known = self._over if begun and "outcome" in lines[-1] else self._open
        known[key] = hours
        return hours


def asked_anew(
    config: Config,
    paths: StudyPaths,
    trials: Sequence[FrozenTrial],
    job_states: JobStates,
    *,
    slurm: bool,
) -> Reached | None:
    """The budget that lets none of the study's trials start now."""
    purse = Budget(config, paths, slurm=slurm)
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    running = {trial.number for trial in trials if trial.state == TrialState.RUNNING}
    idle = running - claims.at_work(trials, job_states)
    some_left = bool(waiting or idle) or len(trials) < config.tuning.total
    if not some_left or purse.allows(trials, idle, waiting[0] if waiting else None):
        return None
    return purse.refused


def of_study(shared: SharedStudy) -> Reached | None:
    """The budget that keeps the study's trials from starting, as its workers last saw it."""
    found: dict[str, Any] | None = shared.study.user_attrs.get(REACHED)
    return Reached(**found) if found else None


def note(shared: SharedStudy, reached: Reached | None) -> None:
    """Keep for others to see that the budget is used up, or that it is not."""
    found = reached._asdict() if reached else None
    if shared.study.user_attrs.get(REACHED) != found:
        shared.study.set_user_attr(REACHED, found)
