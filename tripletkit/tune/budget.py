"""The budget of a study: whether another trial may start.

A trial starts if what all of them have cost, what those that run are expected to cost to their end,
and what it is expected to cost itself, stay within the budget. A trial is expected to cost what the
complete and the pruned ones did on average; before there are any, nothing, so the first trial of each
worker starts in any case. What runs is never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from tripletkit.config import Config
from tripletkit.paths import StudyPaths
from tripletkit.tune import attempts as records
from tripletkit.tune import claims, cost
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

    The lines of a trial's attempts.jsonl are read once they do not change any more, and only once.
    """

    def __init__(self, config: Config, paths: StudyPaths, *, slurm: bool) -> None:
        self.limit, self.total = config.tuning.budget_gpu_hours, config.tuning.total
        self.paths = paths
        self.share = cost.share(config, slurm=slurm)
        self.unit = GPU_HOURS if self.share["gpus"] else WORKER_HOURS
        self.weight = self.share["gpus"] or self.share["share"]
        self.refused: Reached | None = None
        self._over: dict[tuple[int, int], float] = {}

    def allows(
        self, trials: Sequence[FrozenTrial], idle: Collection[int], trial: FrozenTrial | None
    ) -> bool:
        """Whether `trial`, or else a new one, may start.

        `idle`: the RUNNING ones that nobody works on at this moment.
        """
        self.refused = None
        if not self.limit:
            return True
        hours, at_work = {}, set()
        for each in trials:
            if each.state == TrialState.RUNNING and each.number not in idle:
                at_work.add(each.number)
            hours[each.number] = self._hours(each, at_work=each.number in at_work)
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

    def _hours(self, trial: FrozenTrial, *, at_work: bool) -> float:
        mark = claims.owner(trial)
        if mark is None:
            return 0.0
        past = mark["attempt"] - 1 if at_work else mark["attempt"]
        hours = self._of_attempts(trial.number, past)
        if at_work:
            since = datetime.fromisoformat(mark["since"]).timestamp()
            hours += max(0.0, time.time() - since) * self.weight / HOUR
        return hours

    def _of_attempts(self, number: int, past: int) -> float:
        """Hours of the first `past` attempts at a trial, all of which are over."""
        if past == 0:
            return 0.0
        if (number, past) in self._over:
            return self._over[number, past]
        paths = self.paths.trial(number)
        lines = records.read(paths.attempts)
        made = cost.of_trial(number, lines, paths, {}, self.share)
        counted = sum(line.get("attempt", 0) <= past for line in lines)
        hours = sum(cost.weight(each, self.unit) * each.seconds for each in made[:counted]) / HOUR
        settled = counted < len(lines) or (counted and "outcome" in lines[counted - 1])
        if settled:
            self._over[number, past] = hours
        return hours


def of_study(shared: SharedStudy) -> Reached | None:
    """The budget that keeps the study's trials from starting."""
    found: dict[str, Any] | None = shared.study.user_attrs.get(REACHED)
    return Reached(**found) if found else None


def note(shared: SharedStudy, reached: Reached | None) -> None:
    """Keep for others to see that the budget is used up, or that it is not."""
    found = reached._asdict() if reached else None
    if shared.study.user_attrs.get(REACHED) != found:
        shared.study.set_user_attr(REACHED, found)
