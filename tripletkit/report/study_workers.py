"""Panels of a study's workers: when they did what, what it cost, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from tripletkit.cluster.jobs import LOCAL
from tripletkit.monitor.inventory import Inventory
from tripletkit.report.panels import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Panel,
    Table,
    new_figure,
)
from tripletkit.tune import claims
from tripletkit.tune.cost import Attempt, Spent

if TYPE_CHECKING:
    import plotly.graph_objects as go

BARS = 4000  # attempts in the time line
LINES = 200  # interrupted attempts in their table
# How an attempt ended, in the order of the legend.
OUTCOMES = {
    "complete": BLUE, "pruned": ORANGE, "running": GREEN, "stopped": SKY, "killed": PURPLE,
    "failed": VERMILION,
}  # fmt: skip
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
ROW, ROWS = 26, 1600  # pixels of a worker's line; and of all of them together at the most


def worker_panels(
    inventory: Inventory,
    attempts: Sequence[Attempt],
    spent: Spent,
    trials: Sequence[FrozenTrial],
) -> list[Panel]:
    """Who worked when, and what it cost."""
    if not attempts:
        if not trials:
            return []
        why = f"{inventory.paths.root} has no attempts.jsonl in its folders of trials."
        return [Panel("timeline", "No record of the workers", why)]
    drawn = sorted(attempts, key=lambda each: each.started)[-BARS:]
    rule = f" The newest {BARS:,} of {len(attempts):,} attempts." * (len(drawn) < len(attempts))
    return [
        Panel(
            "timeline",
            "Time line of the workers",
            "A line per worker, a bar per attempt at a trial. Gaps are time in which a worker had "
            "no trial: it waited, started, or was not there. A trial that was stopped or killed "
            f"goes on at the next free worker.{rule}",
            figure=timeline(drawn),
            wide=True,
        ),
        Panel(
            "cost",
            f"{spent.unit} spent, wasted and saved",
            "Useful is work that led to where the trials are now. Wasted is what had to be done "
            "again after an interruption, and all of the trials that failed. Saved is what "
            "pruned trials would have taken to their last epoch; it was not spent.",
            figure=cost(spent),
            table=_cost_table(spent, trials),
        ),
    ]


def _cost_table(spent: Spent, trials: Sequence[FrozenTrial]) -> Table:
    total = spent.gpu_hours
    complete = sum(t.state == TrialState.COMPLETE for t in trials)
    rows: list[list[str | float | None]] = [
        [name, hours, f"{hours / total:.1%}" if total else ""]
        for name, hours in {
            "spent": total,
            "useful": spent.useful,
            "wasted": spent.wasted,
            "saved by pruning": spent.saved,
        }.items()
    ]
    if complete:
        rows.append(["spent per complete trial", total / complete, ""])
    return Table(["what", spent.unit, "of what was spent"], rows)


def failure_panels(
    inventory: Inventory, trials: Sequence[FrozenTrial], attempts: Sequence[Attempt]
) -> list[Panel]:
    """Trials that failed, and attempts that were broken off."""
    panels = []
    if failed := [t for t in trials if t.state == TrialState.FAIL]:
        panels.append(
            Panel(
                "failures",
                "Failed trials",
                "What ended them, as their workers said. `tripletkit why N` tells more of trial "
                "N, and what to do.",
                table=Table(
                    ["trial", "cause", "message", "job", "host", "attempts", "log"],
                    [_failure(inventory, trial) for trial in failed],
                ),
                wide=True,
            )
        )
    if broken := [each for each in attempts if each.outcome in ("stopped", "killed")]:
        newest = sorted(broken, key=lambda each: each.started)[-LINES:]
        rule = f" The newest {LINES} of {len(broken):,}." * (len(newest) < len(broken))
        panels.append(
            Panel(
                "interruptions",
                "Interrupted attempts",
                "Stopped ones saved their state when they were asked to leave; killed ones had no "
                f"time for that, and lost what came after their newest checkpoint.{rule}",
                table=Table(
                    ["trial", "how", "started (UTC)", "seconds", "seconds lost", "job", "host"],
                    [
                        [
                            each.trial, each.outcome, _clock(each.started), round(each.seconds),
                            round(each.ended - each.kept), each.job, each.host,
                        ]
                        for each in newest
                    ],
                ),
                wide=True,
            )
        )  # fmt: skip
    return panels


def _failure(inventory: Inventory, trial: FrozenTrial) -> list[str | float | None]:
    mark: Mapping[str, Any] = claims.owner(trial) or {}
    cause: Mapping[str, str] = trial.user_attrs.get(claims.CAUSE, {})
    log: Path = inventory.paths.trial(trial.number).log
    return [
        trial.number,
        cause.get("kind", "unknown"),
        cause.get("message", ""),
        mark.get("job", ""),
        mark.get("host", ""),
        mark.get("attempt"),
        f"{log.parent.name}/{log.name}" if log.exists() else "",
    ]


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


# Figures


def unit_of_time(seconds: float) -> tuple[float, str]:
    """Length and name of the unit in which so many seconds are a handy number."""
    return next((unit for unit in UNITS if seconds >= 2 * unit[0]), UNITS[-1])


def timeline(attempts: Sequence[Attempt]) -> go.Figure:
    """A line per worker, the first to start at the top; a bar per attempt."""
    ordered = sorted(attempts, key=lambda each: each.started)
    began, ended = ordered[0].started, max(each.ended for each in ordered)
    length, unit = unit_of_time(ended - began)
    name = _namer(ordered)
    rows = list(dict.fromkeys(map(name, ordered)))
    since = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M UTC")
    figure = new_figure(
        f"{unit} since {since}", height=min(ROWS, 130 + ROW * len(rows)), barmode="overlay"
    )
    for outcome, color in OUTCOMES.items():
        these = [each for each in ordered if each.outcome == outcome]
        if not these:
            continue
        figure.add_bar(
            orientation="h",
            y=[name(each) for each in these],
            base=[(each.started - began) / length for each in these],
            x=[each.seconds / length for each in these],
            customdata=[[each.trial, each.host] for each in these],
            name=outcome,
            width=0.72,
            # A thin edge in no colour: attempts that follow each other stay two.
            marker={"color": color, "line": {"width": 1, "color": "rgba(255,255,255,0.8)"}},
            hovertemplate="trial %{customdata[0]} on %{customdata[1]}: %{x:.2f} "
            f"{unit}<extra>{outcome}</extra>",
        )
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=rows, autorange="reversed",
        showgrid=False, title_text="job",
    )  # fmt: skip
    figure.update_xaxes(showgrid=True, rangemode="tozero")
    return figure


def _namer(attempts: Sequence[Attempt]) -> Callable[[Attempt], str]:
    """Names the worker of an attempt: its job, and which of its processes if it has several.

    Each host numbers its background processes anew.
    """
    several = {each.job for each in attempts if each.slot > 0}
    hosts = {each.host for each in attempts if each.job.startswith(LOCAL)}

    def name(each: Attempt) -> str:
        slot = f" #{each.slot}" if each.job in several else ""
        host = f" on {each.host}" if len(hosts) > 1 and each.job.startswith(LOCAL) else ""
        return each.job + slot + host

    return name


def cost(spent: Spent) -> go.Figure:
    """What was useful, what was wasted, and what pruning saved."""
    figure = new_figure(spent.unit, height=240)
    bars = {
        "saved by pruning": (spent.saved, GREEN),
        "wasted": (spent.wasted, VERMILION),
        "useful": (spent.useful, BLUE),
    }
    figure.add_bar(
        orientation="h",
        y=list(bars),
        x=[hours for hours, _ in bars.values()],
        marker={"color": [color for _, color in bars.values()]},
        hovertemplate="%{y}: %{x:.3g} " + spent.unit + "<extra></extra>",
        showlegend=False,
    )
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_xaxes(showgrid=True, rangemode="tozero")
    return figure
