"""The report of a study: how it went, which parameters matter, and what its workers did."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from tripletkit import __version__, fsio
from tripletkit.monitor.inventory import Inventory
from tripletkit.monitor.status import Study, study_of
from tripletkit.monitor.tables import counted, shown_value
from tripletkit.report import study_parameters, study_trials, study_workers
from tripletkit.report.panels import Report, require_plotly
from tripletkit.tune import cost
from tripletkit.tune.cost import Spent


def report(inventory: Inventory) -> Report:
    """The report of the study, as far as it is. Raises StorageError if there is none."""
    require_plotly()
    study = inventory.study().study
    trials = study.get_trials(deepcopy=False)
    facts = study_of(inventory, trials, ())
    attempts = cost.attempts(inventory.paths)
    spent = cost.spent(inventory.paths, study, attempts)
    groups = {
        "Progress": study_trials.progress_panels(trials, facts),
        "Parameters": study_parameters.parameter_panels(study, trials, facts),
        "Workers and cost": study_workers.worker_panels(inventory, attempts, spent, trials),
        "What went wrong": study_workers.failure_panels(inventory, trials, attempts),
        "Trials": study_trials.trial_panels(trials, facts),
    }
    return Report(
        title=f"Study {facts.name}",
        facts=_facts(inventory, trials, facts, spent),
        groups={title: panels for title, panels in groups.items() if panels},
    )


def _facts(
    inventory: Inventory, trials: Sequence[FrozenTrial], facts: Study, spent: Spent
) -> dict[str, str]:
    tuning = inventory.config.tuning
    config = _option(inventory)
    told = {
        "study": facts.name,
        "objective": f"{facts.objective}, {facts.direction}",
        "trials": f"{', '.join(counted(facts)) or 'none yet'}, of {facts.total}",
    }
    if facts.best is not None:
        epoch = f" in epoch {facts.best.epoch}" if facts.best.epoch is not None else ""
        told["best"] = (
            f"trial {facts.best.number}, {facts.objective} {shown_value(facts.best.value)}{epoch}"
        )
    if spent.gpu_hours:
        told["spent"] = f"{spent.gpu_hours:.3g} {spent.unit}"
    told["search"] = (
        f"sampler {tuning.sampler}, pruner {tuning.pruner}, {facts.max_epochs} epochs a trial"
    )
    told |= {"storage": facts.storage, "folder": str(inventory.paths.root)}
    open_ = sum(facts.states.values()) < facts.total or any(
        facts.states[state] for state in ("RUNNING", "WAITING")
    )
    if open_:
        told["to go on"] = f"tripletkit tune{config}"
    told["to look closer"] = f"tripletkit study dashboard{config}"
    if facts.best is not None:
        told["to train with the best"] = f"tripletkit submit-best{config}"
    if any(t.state == TrialState.FAIL for t in trials):
        first = next(t.number for t in trials if t.state == TrialState.FAIL)
        told["why one failed"] = f"tripletkit why {first}{config}"
    told["report"] = f"tripletkit {__version__}, optuna {optuna.__version__}, {fsio.timestamp()}"
    return told


def _option(inventory: Inventory) -> str:
    """What names this study to any command."""
    path = inventory.paths.config
    return f" --config {shlex.quote(str(path.absolute()))}" if path.exists() else ""
