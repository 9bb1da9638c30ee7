"""Axes, ticks, grid and legend of the figures on paper, as plotly's layout has them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tripletkit.report.panels import LIGHT

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches: a column of a paper, and the two.
SINGLE, DOUBLE = 3.5, 7.2
PIXELS = 540.0  # of the page, that a column of paper stands for
POINTS = SINGLE * 72 / PIXELS  # of a pixel
DASHES = {
    None: "-",
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
}

# Categories of the axes "x" and "y".
Names = Mapping[str, Sequence[str]]


def text(value: Any) -> str:
    """A name as it is read: plotly's has entities, matplotlib takes dollars for mathematics."""
    return html.unescape(str(value)).replace("$", r"\$")


def color(value: Any) -> Any:
    """A colour of plotly's in matplotlib's words."""
    if isinstance(value, str) and value.startswith("rgb"):
        numbers = [float(part) for part in value.partition("(")[2].rstrip(")").split(",")]
        return (*(part / 255 for part in numbers[:3]), *numbers[3:])
    return value


def places(values: Iterable[Any] | None, names: Sequence[str]) -> np.ndarray[Any, Any]:
    """Coordinates; those of categories are their numbers. None is a gap."""
    values = [] if values is None else list(values)
    if names:
        return np.array([names.index(str(value)) for value in values], float)
    return np.array([np.nan if value is None else value for value in values], float)


def categories(figure: go.Figure, which: str) -> list[str]:
    """The categories of an axis in order; none of one with numbers."""
    axis = figure.layout[f"{which}axis"]
    values = [
        value
        for trace in figure.data
        if trace.type != "parcoords" and trace[which] is not None
        for value in trace[which]
    ]
    if axis.type != "category" and not any(isinstance(value, str) for value in values):
        return []
    return list(dict.fromkeys(map(str, [*(axis.categoryarray or ()), *values])))


def finish(ax: Axes, layout: Any, names: Names) -> None:
    """Scales, ticks, grid and lines as the layout and our template have them."""
    if not ax.axison:
        return
    for which, axis, default in (
        ("x", layout.xaxis, layout.template.layout.xaxis),
        ("y", layout.yaxis, layout.template.layout.yaxis),
    ):
        grid = default.showgrid if axis.showgrid is None else axis.showgrid
        _finish_axis(ax, which, axis, names[which], grid=grid)
    for shape in layout.shapes:
        look = {
            "color": color(shape.line.color),
            "lw": max((shape.line.width or 2) * POINTS, 0.5),
            "ls": DASHES[shape.line.dash],
            "zorder": 1,
        }
        if shape.type == "line" and shape.yref == "y domain":
            ax.axvline(shape.x0, **look)
        elif shape.type == "line" and shape.xref == "x domain":
            ax.axhline(shape.y0, **look)
        else:
            raise ValueError(f"static figures do not know the shape {shape.type!r}")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    if layout.yaxis.scaleanchor:
        ax.set_aspect("equal", adjustable="box")
    if layout.xaxis.visible is False and layout.yaxis.visible is False:
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set(visible=True, color=LIGHT["line"])


def _finish_axis(ax: Axes, which: str, axis: Any, names: Sequence[str], *, grid: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    own = ax.xaxis if which == "x" else ax.yaxis
    limits = ax.set_xlim if which == "x" else ax.set_ylim
    if axis.title.text:
        own.set_label_text(text(axis.title.text))
    if axis.type == "log":
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        own.set_minor_formatter(NullFormatter())
        own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if names:
        own.set_ticks(range(len(names)), [text(name) for name in names])
    if axis.tickvals is not None:
        own.set_ticks(list(axis.tickvals), [text(each) for each in axis.ticktext or axis.tickvals])
    if axis.tickformat and axis.tickformat.endswith("%"):
        own.set_major_formatter(PercentFormatter(1.0, decimals=int(axis.tickformat[1:-1])))
    if axis.range is not None:
        low, high = (10.0**each if axis.type == "log" else each for each in axis.range)
        limits(low, high)
    elif axis.rangemode == "tozero" and axis.type != "log":
        (ax.set_xlim if which == "x" else ax.set_ylim)(0)
    if axis.autorange == "reversed":
        (ax.invert_xaxis if which == "x" else ax.invert_yaxis)()
    if grid:
        ax.grid(visible=True, axis=which, color=LIGHT["line"], lw=0.4)  # type: ignore[arg-type]


# --- legend ------------------------------------------------------------------------------------


def label(trace: Any) -> str:
    """Its name in the legend; what begins with _ has none, for matplotlib."""
    if trace.showlegend is False or not trace.name:
        return "_"
    name = text(trace.name)
    return f"\u200b{name}" if name.startswith("_") else name


def legend(drawn: Figure, ax: Axes, figure: go.Figure, width: float) -> None:
    """Above the plot, in as many columns as fit into `width` inches; none for a single thing."""
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) < 2 or figure.layout.showlegend is False:
        return
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), int(width * 17 / (longest + 6))))
    drawn.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False,
        handlelength=1.6, columnspacing=1.2, borderaxespad=0.2, handletextpad=0.5,
    )  # fmt: skip
