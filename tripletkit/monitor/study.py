"""`tripletkit study`: what a study is about, its best trial, and all of it as a table."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tripletkit import config as configuration
from tripletkit import fsio, log
from tripletkit.config import Choice, Range, section_of
from tripletkit.errors import ConfigError
from tripletkit.monitor.inventory import Inventory
from tripletkit.monitor.status import study_of
from tripletkit.monitor.tables import counted, shown_value, simple_table
from tripletkit.tune import best as best_trial
from tripletkit.tune import claims

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 5  # of the best trials
ENOUGH = 10  # complete trials, below which importances are guesses


def show(inventory: Inventory) -> None:
    """Print what the study is about and how far it is. Raises StorageError if there is none."""
    study = inventory.study().study
    trials = study.get_trials(deepcopy=False)
    facts, tuning = study_of(inventory, trials, ()), inventory.config.tuning
    table = simple_table("study", facts.name)
    for key, value in {
        "storage": facts.storage,
        "objective": f"{facts.objective}, {facts.direction}",
        "sampler": tuning.sampler,
        "pruner": tuning.pruner,
        "trials": f"{', '.join(counted(facts)) or 'none yet'}, of {facts.total}",
        **({"budget": facts.budget} if facts.budget else {}),
        "epochs": str(facts.max_epochs),
        "folder": str(inventory.paths.root),
        **{key: _range(range_) for key, range_ in tuning.space.items()},
    }.items():
        table.add_row(key, value)
    log.out.print(table)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if complete:
        log.out.print()
        log.out.print(_best_table(complete, facts.objective, facts.direction))
    shares = importances(study, complete)
    if shares:
        log.out.print()
        table = simple_table("parameter", "importance (PED-ANOVA)")
        for key, share in shares.items():
            table.add_row(key, f"{share:.2f}")
        log.out.print(table)
    elif shares is None:
        log.out.print(
            f"\nimportance of the parameters: after {ENOUGH} complete trials", soft_wrap=True
        )


def best(inventory: Inventory, *, as_json: bool) -> None:
    """Print the best trial, its parameters as lines for config.toml.

    With `as_json`: number, metric, value, epoch, params. Raises StorageError without a complete
    trial.
    """
    found = best_trial.from_study(inventory.study().study, inventory.config.tuning.objective)
    if as_json:
        wanted = ("number", "metric", "value", "epoch", "params")
        log.out.print_json(json.dumps(_as_json({key: getattr(found, key) for key in wanted})))
        return
    log.out.print("\n".join(config_lines(found)), soft_wrap=True)


def config_lines(found: best_trial.Best) -> list[str]:
    """A trial as lines for config.toml."""
    epoch = f" in epoch {found.epoch}" if found.epoch is not None else ""
    lines = [f"# {found.source}: {found.metric} {shown_value(found.value)}{epoch}"]
    for section in ("training", "training_model"):
        values = {k: v for k, v in found.params.items() if section_of(k) == section}
        lines += [f"[{section}]"] if values else []
        lines += [f"{key} = {configuration.toml_value(value)}" for key, value in values.items()]
    return lines


def export(inventory: Inventory, path: Path) -> None:
    """Write every trial to a .csv, .json or .parquet file, a row per trial.

    number, state, value, datetime_start, datetime_complete (local time of the worker), duration
    (seconds, of the newest start), params, user_attrs, job, attempts. In a table params and
    user_attrs are columns `params_*` and `user_attrs_*`, the latter as JSON. Raises ConfigError
    for another suffix.
    """
    writers: dict[str, Callable[[Sequence[FrozenTrial]], bytes]] = {
        ".csv": _csv,
        ".json": _json,
        ".parquet": _parquet,
    }
    if path.suffix not in writers:
        raise ConfigError(f"{path}: no format has this suffix", hint=f"one of {', '.join(writers)}")
    trials = inventory.study().study.get_trials(deepcopy=False)
    with fsio.atomic_write(path) as file:
        file.write(writers[path.suffix](trials))
    log.out.print(f"wrote {path}: {len(trials)} trials", soft_wrap=True)


def importances(study: optuna.Study, complete: Sequence[FrozenTrial]) -> dict[str, float] | None:
    """Share of each parameter in what makes trials good; None while there are too few.

    Empty where nobody can say: there are no parameters, or the values of the trials are all alike.
    """
    if len(complete) < ENOUGH:
        return None
    if len({t.value for t in complete if t.value is not None and math.isfinite(t.value)}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        warnings.filterwarnings("error", ".*importances will be equal")
        try:
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
        except UserWarning:
            return {}


def _range(range_: Range) -> str:
    if isinstance(range_, Choice):
        return f"one of {', '.join(map(str, range_.choices))}"
    step = getattr(range_, "step", 1)
    extras = [" (log)"] if range_.log else [f" (step {step})"] if step != 1 else []
    return "".join([f"{range_.low} to {range_.high}", *extras])


def _best_table(complete: Sequence[FrozenTrial], objective: str, direction: str) -> Any:
    keys = list(dict.fromkeys(key for trial in complete for key in trial.params))
    table = simple_table("trial", objective, *keys)
    ranked = sorted(complete, key=lambda t: t.value or 0.0, reverse=direction == "maximize")
    for trial in ranked[:SHOWN]:
        params = [trial.params.get(key, "") for key in keys]
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in params]
        table.add_row(str(trial.number), shown_value(trial.value), *cells)
    return table


# Rows


def _row(trial: FrozenTrial) -> dict[str, Any]:
    mark = claims.owner(trial) or {}
    return {
        "number": trial.number,
        "state": trial.state.name,
        "value": trial.value,
        "datetime_start": trial.datetime_start,
        "datetime_complete": trial.datetime_complete,
        "duration": trial.duration.total_seconds() if trial.duration else None,
        "params": dict(trial.params),
        "user_attrs": dict(trial.user_attrs),
        "job": mark.get("job"),
        "attempts": mark.get("attempt"),
    }


def _as_json(value: Any) -> Any:
    """The same for JSON, which has neither times nor infinite numbers: those are null."""
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.isoformat() if isinstance(value, datetime) else value


def _columns(trials: Sequence[FrozenTrial]) -> dict[str, list[Any]]:
    """The rows side by side, with a column for each parameter and attribute."""
    rows = [_row(trial) for trial in trials]
    columns: dict[str, list[Any]] = {}
    for name in _row(optuna.trial.create_trial(value=0.0)):
        if name not in ("params", "user_attrs"):
            columns[name] = [row[name] for row in rows]
            continue
        for key in sorted({key for row in rows for key in row[name]}):
            values = [row[name].get(key) for row in rows]
            if name == "user_attrs":
                values = [None if v is None else json.dumps(_as_json(v)) for v in values]
            columns[f"{name}_{key}"] = values
    return columns


def _json(trials: Sequence[FrozenTrial]) -> bytes:
    rows = [_as_json(_row(trial)) for trial in trials]
    return (json.dumps(rows, indent=2) + "\n").encode()


def _csv(trials: Sequence[FrozenTrial]) -> bytes:
    columns = _columns(trials)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for values in zip(*columns.values(), strict=True):
        writer.writerow(v.isoformat() if isinstance(v, datetime) else v for v in values)
    return text.getvalue().encode()


def _parquet(trials: Sequence[FrozenTrial]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Also where nothing is known yet: tables of two studies must go together.
    moment = pa.timestamp("us")
    known = {
        "number": pa.int64(), "state": pa.string(), "value": pa.float64(),
        "datetime_start": moment, "datetime_complete": moment, "duration": pa.float64(),
        "job": pa.string(), "attempts": pa.int64(),
    }  # fmt: skip
    columns = _columns(trials).items()
    table = pa.table({name: _array(values, known.get(name)) for name, values in columns})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _array(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    import pyarrow as pa

    if {bool, str} & set(map(type, values)) and len({type(v) for v in values if v is not None}) > 1:
        values = [None if value is None else str(value) for value in values]  # a mixed choice
    return pa.array(values, kind)
