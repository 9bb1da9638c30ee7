"""Panels of a study's parameters: which matter, and which values are good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from tripletkit.monitor import study as studies
from tripletkit.monitor.status import Study
from tripletkit.report.panels import BLUE, SKY, Panel, Table, new_figure
from tripletkit.report.study_trials import LOOKS, parameters, ranked, thinned, value_of
from tripletkit.tune import best

if TYPE_CHECKING:
    import plotly.graph_objects as go

DOTS = 1500  # trials in the figure of one parameter
# From the worst to the best; both ends show on light and on dark paper.
RANKS = [(0.0, "#B4BAC3"), (0.5, "#9FB9CC"), (0.8, SKY), (1.0, BLUE)]


def parameter_panels(
    study: optuna.Study, trials: Sequence[FrozenTrial], facts: Study
) -> list[Panel]:
    """What the parameters are worth; nothing of a study that tunes none."""
    complete = ranked(trials, facts.direction)
    names = parameters([t for t in trials if t.params])
    if not names:
        return []
    panels = [_importance(study, complete)]
    if facts.best is not None:
        lines = studies.config_lines(best.from_study(study, facts.objective, facts.best.number))
        panels.append(
            Panel(
                "best-parameters",
                "Parameters of the best trial",
                "As lines for config.toml; `tripletkit study best` prints them too.",
                table=Table(["config.toml"], [[line] for line in lines]),
            )
        )
    whole = [t for t in complete if names.keys() <= t.params.keys()]
    if len(whole) > 1:
        left_out = len(complete) - len(whole)
        lacking = f" {left_out} trials that lack one of the parameters are left out."
        panels.append(
            Panel(
                "parallel-coordinates",
                "Parallel coordinates",
                "A line per complete trial across the values of its parameters, from grey for the "
                "worst to blue for the best. Drag along an axis to see only the trials that pass there, double-click "
                f"it to see all again.{lacking * bool(left_out)}",
                figure=parallel(whole, facts.objective),
                wide=True,
            )
        )
    shown = [t for t in trials if value_of(t) is not None]
    some, rule = thinned(shown, facts.direction, DOTS)
    for name, range_ in names.items():
        if any(name in t.params for t in some):
            panels.append(
                Panel(
                    f"slice-{name.replace('.', '-')}",
                    f"{facts.objective} by {name}",
                    f"Each dot is a trial. A slope or a hump means that {name} matters; dots that "
                    f"are dense on one side, that the search went there.{rule}",
                    figure=slice_of(name, range_, some, facts.objective),
                )
            )
    return panels


def _importance(study: optuna.Study, complete: Sequence[FrozenTrial]) -> Panel:
    shares = studies.importances(study, complete)
    title = "Importance of the parameters"
    if shares:
        text = (
            "How much each parameter decides whether a trial is among the best (PED-ANOVA). What "
            "matters little need not be searched again."
        )
        if len(complete) < 3 * studies.ENOUGH:
            text += f" From {len(complete)} complete trials this is a rough guess."
        return Panel("importances", title, text, figure=importances(shares))
    why = (
        f"Told after {studies.ENOUGH} complete trials; there are {len(complete)}."
        if shares is None
        else "Nobody can tell: the values of the complete trials are all alike."
    )
    return Panel("importances", title, why)


# Figures


def importances(shares: Mapping[str, float]) -> go.Figure:
    """A bar per parameter, the longest at the top."""
    figure = new_figure("share of what makes trials good", height=130 + 34 * len(shares))
    names = list(shares)[::-1]
    figure.add_bar(
        x=[shares[name] for name in names],
        y=names,
        orientation="h",
        marker={"color": BLUE},
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(range=[0, max(1.05 * max(shares.values()), 0.1)])
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def parallel(complete: Sequence[FrozenTrial], objective: str) -> go.Figure:
    """A line per trial across the axes of its parameters; `complete` is ranked, the best first."""
    import plotly.graph_objects as go

    worst_first = complete[::-1]
    dimensions = [
        _axis(name, range_, [t.params[name] for t in worst_first])
        for name, range_ in parameters(complete).items()
    ]
    values = [value_of(t) for t in worst_first]
    figure = new_figure(height=460)
    figure.add_trace(
        go.Parcoords(
            dimensions=[*dimensions, {"label": objective, "values": values}],
            # By rank: a few bad trials would leave all others in one colour.
            line={"color": list(range(len(values))), "colorscale": RANKS, "showscale": False},
        )
    )
    figure.update_layout(margin={"l": 70, "r": 60, "t": 60, "b": 30})
    return figure


def _axis(name: str, range_: BaseDistribution, values: Sequence[Any]) -> dict[str, Any]:
    """An axis of `parallel`: logarithms where the range is logarithmic, and names for choices."""
    if names := _names(range_, values):
        return {
            "label": name,
            "values": [names.index(str(value)) for value in values],
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [-0.2, len(names) - 0.8],
        }
    if getattr(range_, "log", False):
        ends = min(values), max(values)
        ticks = {tick: f"{tick:g}" for tick in log_ticks(*ends)}
        for end in ends:  # the axis is drawn from its first tick to its last
            ticks.setdefault(end, "")
        return {
            "label": f"{name} (log)",
            "values": [math.log10(value) for value in values],
            "tickvals": [math.log10(tick) for tick in sorted(ticks)],
            "ticktext": [ticks[tick] for tick in sorted(ticks)],
        }
    return {"label": name, "values": list(values)}


def log_ticks(low: float, high: float, room: int = 7) -> list[float]:
    """Round numbers from low to high, `room` of them at the most; the ends if there is only one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    sparse = (((1,), every) for every in range(1, len(powers) + 1))
    for steps, every in (((1, 2, 5), 1), ((1, 3), 1), *sparse):
        found = [float(f"{step}e{power}") for power in powers[::every] for step in steps]
        ticks = [tick for tick in found if low <= tick <= high]
        if len(ticks) <= room:
            break
    return ticks if len(ticks) > 1 else list(dict.fromkeys([low, high]))


def slice_of(
    name: str, range_: BaseDistribution, trials: Sequence[FrozenTrial], objective: str
) -> go.Figure:
    """Value against one parameter; the dots of a choice lie side by side, so that all are seen."""
    figure = new_figure(name, objective, height=320)
    having = [t for t in trials if name in t.params]
    names = _names(range_, [t.params[name] for t in having])
    for state in (TrialState.COMPLETE, TrialState.PRUNED):
        look = LOOKS[state]
        points = [
            (t, value) for t in having if t.state == state and (value := value_of(t)) is not None
        ]
        if not points:
            continue
        figure.add_scatter(
            x=[
                names.index(str(t.params[name])) + _aside(t.number) if names else t.params[name]
                for t, _ in points
            ],
            y=[value for _, value in points],
            customdata=[[t.number, str(t.params[name])] for t, _ in points],
            name=look.name,
            mode="markers",
            marker={"color": look.color, "symbol": look.symbol, "size": 7, "opacity": 0.7},
            hovertemplate="trial %{customdata[0]}: %{y:.4f} at %{customdata[1]}"
            f"<extra>{look.name}</extra>",
        )
    if names:
        figure.update_xaxes(
            tickvals=list(range(len(names))), ticktext=names, range=[-0.6, len(names) - 0.4]
        )
    elif getattr(range_, "log", False):
        found = [t.params[name] for t in having]
        ticks = log_ticks(min(found), max(found))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def _names(range_: BaseDistribution, values: Sequence[Any]) -> list[str]:
    """The choices of a categorical parameter, also former ones; none of a numerical one."""
    if not isinstance(range_, CategoricalDistribution):
        return []
    return list(dict.fromkeys([*map(str, range_.choices), *map(str, values)]))


def _aside(number: int) -> float:
    """A place from -0.25 to 0.25, far from those of the trials before and after."""
    return (number * 0.618034 % 1 - 0.5) / 2
