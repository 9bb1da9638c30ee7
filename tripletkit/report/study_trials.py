"""Panels of a study's trials: how good they are, one after another and epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from tripletkit.monitor.status import Study
from tripletkit.report.panels import BLUE, GREEN, GREY, ORANGE, VERMILION, Panel, Table, new_figure
from tripletkit.tune import claims

if TYPE_CHECKING:
    import plotly.graph_objects as go

CURVES = 300  # trials whose reports are drawn


class Look(NamedTuple):
    """How a state shows."""

    name: str
    color: str
    symbol: str


LOOKS = {
    TrialState.COMPLETE: Look("complete", BLUE, "circle"),
    TrialState.PRUNED: Look("pruned", ORANGE, "x"),
    TrialState.RUNNING: Look("running", GREEN, "circle-open"),
    TrialState.FAIL: Look("failed", VERMILION, "triangle-up"),
}


Direction = str  # "maximize" or "minimize"


def value_of(trial: FrozenTrial) -> float | None:
    """The objective: the final value, or the newest report of one that has none. None: not finite."""
    value = trial.value if trial.state.is_finished() else None
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if value is not None and math.isfinite(value) else None


def ranked(trials: Sequence[FrozenTrial], direction: Direction) -> list[FrozenTrial]:
    """The complete trials with a finite value, the best first; of equal ones the older first."""
    sign = -1 if direction == "maximize" else 1
    complete = [(value_of(t), t) for t in trials if t.state == TrialState.COMPLETE]
    found = [(value, t) for value, t in complete if value is not None]
    return [t for _, t in sorted(found, key=lambda pair: (sign * pair[0], pair[1].number))]


def thinned(
    trials: Sequence[FrozenTrial], direction: Direction, room: int
) -> tuple[list[FrozenTrial], str]:
    """At most `room` of the trials, and a sentence that says which if that is not all.

    A third of the room is for the best ones; the others come at even steps of their number.
    """
    if len(trials) <= room:
        return list(trials), ""
    kept = {t.number for t in ranked(trials, direction)[: room // 3]}
    best = len(kept)
    others = [t for t in trials if t.number not in kept]
    count = room - best
    kept |= {others[i * len(others) // count].number for i in range(count)}
    said = (
        f" Shown are {len(kept):,} of {len(trials):,} trials: the {best:,} best, and of the "
        "others every so many."
    )
    return [t for t in trials if t.number in kept], said


def parameters(trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Every parameter that some trial has, with the range of the newest one."""
    return {key: range_ for t in trials for key, range_ in t.distributions.items()}


# Panels


def progress_panels(trials: Sequence[FrozenTrial], facts: Study) -> list[Panel]:
    """How the search went."""
    if not trials:
        return [Panel("history", "No trials yet", "`tripletkit tune` starts them.")]
    up = facts.direction == "maximize"
    panels = [
        Panel(
            "history",
            "Optimisation history",
            f"The {facts.objective} of each trial by its number; {'higher' if up else 'lower'} is "
            "better. The line is the best complete trial so far: once it is flat for long, more "
            "trials of the same search bring little. Pruned and running trials stand at their "
            "newest epoch, failed ones have no value and lie at the bottom.",
            figure=history(trials, facts.objective, facts.direction),
            wide=True,
        )
    ]
    if any(t.intermediate_values for t in trials):
        some, rule = thinned(trials, facts.direction, CURVES)
        panels.append(
            Panel(
                "intermediate-values",
                "Trials, epoch by epoch",
                f"The {facts.objective} that each trial reported. A cross marks where a trial was "
                f"pruned; the thick curve is the best one.{rule}",
                figure=curves(some, facts.objective, facts.best.number if facts.best else None),
                wide=True,
            )
        )
    return panels


def trial_panels(trials: Sequence[FrozenTrial], facts: Study) -> list[Panel]:
    """Every trial in a table."""
    if not trials:
        return []
    names = list(parameters(trials))
    columns = ["trial", "state", facts.objective, "epoch", *names, "seconds", "job", "attempts"]
    return [
        Panel(
            "trials",
            "All trials",
            "Click on a column to sort by it. The seconds are those of the newest attempt.",
            table=Table(columns, [_row(trial, names) for trial in trials]),
            wide=True,
        )
    ]


def _row(trial: FrozenTrial, names: Sequence[str]) -> list[str | float | None]:
    mark: Mapping[str, Any] = claims.owner(trial) or {}
    took = trial.duration
    return [
        trial.number,
        trial.state.name.lower(),
        value_of(trial),
        max(trial.intermediate_values, default=None),
        *(_cell(trial.params.get(name)) for name in names),
        round(took.total_seconds()) if took is not None else None,
        mark.get("job", ""),
        mark.get("attempt"),
    ]


def _cell(value: Any) -> str | float | None:
    """A parameter's value; what is neither a number nor absent, as text."""
    return value if value is None or type(value) in (int, float) else str(value)


# Figures


def history(trials: Sequence[FrozenTrial], objective: str, direction: Direction) -> go.Figure:
    """Value by trial, the best so far, and trials without a value below the others."""
    figure = new_figure("trial", objective, height=420)
    if len(trials) <= 10:
        figure.update_xaxes(dtick=1)
    values = [value for t in trials if (value := value_of(t)) is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    floor = low - 0.07 * (high - low or abs(low) or 1.0)
    steps: list[tuple[int, float]] = []
    better = max if direction == "maximize" else min
    for trial in trials:
        value = value_of(trial)
        if trial.state != TrialState.COMPLETE or value is None:
            continue
        before = steps[-1][1] if steps else value
        steps += [(trial.number, before), (trial.number, better(before, value))]
    if steps:
        steps.append((trials[-1].number, steps[-1][1]))
        figure.add_scatter(
            x=[number for number, _ in steps],
            y=[value for _, value in steps],
            name="best so far",
            mode="lines",
            line={"color": GREY, "width": 2},
            hoverinfo="skip",
        )
    for state, look in LOOKS.items():
        these = [t for t in trials if t.state == state]
        lost = state == TrialState.FAIL
        points = [(t, floor if lost else value_of(t)) for t in these]
        points = [(t, y) for t, y in points if y is not None]
        if not points:
            continue
        figure.add_scatter(
            x=[t.number for t, _ in points],
            y=[y for _, y in points],
            name=look.name,
            mode="markers",
            marker={
                "color": look.color,
                "symbol": look.symbol,
                "size": 8 if len(trials) < 500 else 5,
            },
            hovertemplate="trial %{x}"
            + ("" if lost else ": %{y:.4f}")
            + f"<extra>{look.name}</extra>",
        )
    return figure


def curves(trials: Sequence[FrozenTrial], objective: str, best: int | None) -> go.Figure:
    """Reports by epoch, a curve per trial, and crosses where trials were pruned."""
    figure = new_figure("epoch", objective, height=440)
    if max((max(t.intermediate_values, default=0) for t in trials), default=0) <= 10:
        figure.update_xaxes(dtick=1)  # there are no halves of epochs
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
        look = LOOKS[state]
        _strands(
            figure,
            [t for t in trials if t.state == state and t.number != best],
            name=look.name,
            line={"color": look.color, "width": 1},
            opacity=0.45,
        )
    ends = [
        (t.number, max(reports), reports[max(reports)])
        for t in trials
        if t.state == TrialState.PRUNED and (reports := _finite(t))
    ]
    if ends:
        look = LOOKS[TrialState.PRUNED]
        figure.add_scatter(
            x=[epoch for _, epoch, _ in ends],
            y=[value for *_, value in ends],
            customdata=[number for number, *_ in ends],
            name="pruned there",
            mode="markers",
            marker={"color": look.color, "symbol": look.symbol, "size": 7},
            hovertemplate="trial %{customdata} was pruned at epoch %{x}: %{y:.4f}<extra></extra>",
        )
    _strands(
        figure,
        [t for t in trials if t.number == best],
        name=f"best, trial {best}",
        line={"color": LOOKS[TrialState.COMPLETE].color, "width": 4},
    )
    return figure


def _strands(figure: go.Figure, trials: Sequence[FrozenTrial], **look: Any) -> None:
    """Many curves as one trace, with gaps between them: browsers bear few traces."""
    points: list[tuple[int | None, float | None, int]] = []
    for trial in trials:
        points += [(epoch, value, trial.number) for epoch, value in sorted(_finite(trial).items())]
        points.append((None, None, trial.number))
    if any(epoch is not None for epoch, *_ in points):
        figure.add_scatter(
            x=[epoch for epoch, *_ in points],
            y=[value for _, value, _ in points],
            customdata=[number for *_, number in points],
            mode="lines",
            connectgaps=False,
            hovertemplate="trial %{customdata}, epoch %{x}: %{y:.4f}<extra></extra>",
            **look,
        )


def _finite(trial: FrozenTrial) -> dict[int, float]:
    return {epoch: v for epoch, v in trial.intermediate_values.items() if math.isfinite(v)}
