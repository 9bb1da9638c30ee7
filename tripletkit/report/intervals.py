"""Panels of what `tripletkit evaluate` left in a run's folder: metrics with their intervals."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tripletkit import fsio
from tripletkit.paths import RunPaths
from tripletkit.report.panels import PALETTE, RAW, TRAINED, Panel, Table, new_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

SPLITS = ("test", "val", "train")
SYMBOLS = ("square", "circle", "diamond", "triangle-up")

Evaluation = Mapping[str, Any]  # evaluation.json


def panels(paths: RunPaths, *, lacks: Callable[[str, str], None]) -> list[Panel]:
    """Two for each split that was evaluated; what cannot be read is told to `lacks`."""
    found: list[Panel] = []
    for split in SPLITS:
        path = paths.evaluation(split).report
        try:
            evaluation = fsio.parse_json(path.read_text())
            found += _panels(evaluation, split)
        except FileNotFoundError:
            continue
        except (
            OSError, ValueError, KeyError, TypeError, IndexError, AttributeError,
        ):  # fmt: skip
            lacks(f"the evaluation on {split}", f"{path} cannot be read: evaluate again")
    if not found:
        lacks("metrics with intervals", f"`tripletkit evaluate` has not been run in {paths.root}")
    return found


def _panels(evaluation: Evaluation, split: str) -> list[Panel]:
    data, bootstrap = evaluation["data"], evaluation["bootstrap"]
    basis = (
        f"{data['queries']:,} queries of {data['queried_buildings']:,} buildings among "
        f"{data['images']:,} images. Bars are {bootstrap['level']:.0%} intervals of "
        f"{bootstrap['resamples']:,} bootstrap resamples of the buildings."
    )
    return [
        Panel(
            f"evaluation-{split}",
            f"Metrics on {split}, with intervals",
            basis,
            figure=_figure(evaluation),
        ),
        Panel(
            f"differences-{split}",
            f"Differences on {split}",
            "Each resample scores both on the same buildings, so an interval that leaves out zero "
            "is a difference, even where the bars of the two overlap.",
            table=_differences(evaluation),
        ),
    ]


def _figure(evaluation: Evaluation) -> go.Figure:
    names = _metrics(evaluation)
    columns = evaluation["columns"]
    figure = new_figure(None, "value")
    for number, column in enumerate(columns):
        # Side by side: points of one metric would hide each other.
        shift = 0.16 * (number - (len(columns) - 1) / 2)
        values = [column["metrics"][name] for name in names]
        bounds = [column["intervals"][name] for name in names]
        color = (RAW, TRAINED, *PALETTE[1:-1])[number % 7]
        figure.add_scatter(
            x=[place + shift for place in range(len(names))],
            y=values,
            name=html.escape(column["name"]),
            mode="markers",
            marker={"color": color, "size": 8, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            error_y={
                "type": "data",
                "array": [high - value for value, (_, high) in zip(values, bounds, strict=True)],
                "arrayminus": [value - low for value, (low, _) in zip(values, bounds, strict=True)],
                "color": color,
                "thickness": 1.5,
                "width": 4,
            },
            customdata=[
                [name, f"{low:.4f} to {high:.4f}"]
                for name, (low, high) in zip(names, bounds, strict=True)
            ],
            hovertemplate="%{customdata[0]}: %{y:.4f} (%{customdata[1]})",
        )
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names)
    return figure


def _differences(evaluation: Evaluation) -> Table:
    rows: list[list[str | float | int | None]] = [
        [f"{each['of']} \u2212 {each['minus']}", name, each["metrics"][name], *bounds]
        for each in evaluation["differences"]
        for name, bounds in each["intervals"].items()
    ]
    return Table(["difference", "metric", "value", "from", "to"], rows)


def _metrics(evaluation: Evaluation) -> list[str]:
    """recall@k by k, then the others."""
    names = list(evaluation["columns"][0]["intervals"])
    recalls = sorted((n for n in names if re.fullmatch(r"recall@\d+", n)), key=lambda n: int(n[7:]))
    return [*recalls, *(name for name in names if name not in recalls)]
