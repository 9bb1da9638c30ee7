"""Which parameters a trial gets: the seed decides, its number, and the trials that have ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from tripletkit import fsio


class Numbered(BaseSampler):
    """A sampler whose draws depend on the trial and the parameter, not on what was drawn before.

    A worker that is started again goes on with the parameters that the trials would have had
    anyway, also in the middle of a trial's. And workers do not propose the same, with one seed for
    all of them, since no two trials have one number.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        """`make(seed)` is the sampler."""
        self._make = make
        self._seed = seed
        self._lasting = make(seed)  # it remembers the search space of the trials that it has seen

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """As the sampler does."""
        return self._lasting.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the sampler does, with a seed of this trial."""
        return self._seeded(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """As the sampler does, with a seed of this parameter of this trial."""
        sampler = self._seeded(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _seeded(self, trial: FrozenTrial, *more: str) -> BaseSampler:
        key = fsio.digest([str(self._seed), str(trial.number), *more])
        return self._make(int(key, 16) % 2**31)
