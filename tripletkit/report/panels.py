"""What a report is made of: panels, each a figure, a table or a note, in one look.

Whoever makes panels starts each figure with `new_figure` and builds it from the traces that
`tripletkit.report.static` can draw too: scatter, bar and parcoords. Numbers are put in
as they are: the page and the static figures round.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tripletkit.errors import ConfigError

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito 2008: told apart by everyone. Yellow is left out, as it drowns on white.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#8A8F98"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, GREY)
# The same two things have the same two colours everywhere.
RAW, TRAINED = GREY, BLUE
# For what has an order, after cividis (Nunez et al. 2018): from blue to yellow, ever lighter, so that
# the colour-blind and grey printers keep the order; its dark end is lifted, for dark paper.
SEQUENTIAL = (
    "#3A62AE", "#5A6F9A", "#76797F", "#8A8678", "#A59C74", "#C3B369", "#E1CC55", "#FEE838",
)  # fmt: skip
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
# Text and lines on light and on dark paper; the page swaps them.
LIGHT = {"ink": "#1F2328", "line": "#D0D7DE"}
DARK = {"ink": "#E6EDF3", "line": "#3D444D"}


@dataclass(frozen=True)
class Table:
    """Rows under columns. A column of numbers sorts and aligns as numbers; None is a gap."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True)
class Panel:
    """One thing to look at; with neither figure nor table, a note, such as what is missing.

    The frames of a figure, if it has any, are its views: the page has a switch between them, and
    shows the last one first, which must be the figure's own data; on paper they are side by side.
    """

    id: str  # slug: the anchor in the page and the name of the static figure
    title: str
    text: str  # one or two plain sentences: what is shown, how to read it
    figure: go.Figure | None = None
    table: Table | None = None
    wide: bool = False  # the whole width of the page; two columns of a paper


@dataclass(frozen=True)
class Report:
    """A page: facts at the top, then groups of panels under their titles."""

    title: str
    facts: Mapping[str, str]
    groups: Mapping[str, Sequence[Panel]] = field(default_factory=dict)

    def panels(self) -> list[Panel]:
        """Every panel, in its order."""
        return [panel for panels in self.groups.values() for panel in panels]


def require_plotly() -> None:
    """Raise ConfigError if the extra is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError("the report needs plotly", hint="pip install 'tripletkit[plots]'")


def check_writable(path: Path, option: str) -> None:
    """Raise ConfigError where a file could not be written, before the work for it begins."""
    there = next(each for each in path.absolute().parents if each.exists())
    if path.is_dir() or not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "is a folder" if path.is_dir() else f"cannot be written in {there}"
        raise ConfigError(f"{path} {why}", hint=f"{option} says where else")


def new_figure(
    x: str | None = None, y: str | None = None, *, height: int = 380, **layout: Any
) -> go.Figure:
    """An empty figure in our look; `x` and `y` title the axes, `layout` is plotly's."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": template(), "height": height, **layout})
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def template() -> go.layout.Template:
    """Our look: transparent paper, thin grid along y only, legend above, no boxes."""
    import plotly.graph_objects as go

    axis = {
        "automargin": True,
        "linecolor": LIGHT["line"],
        "tickcolor": LIGHT["line"],
        "gridcolor": LIGHT["line"],
        "zeroline": False,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    return go.layout.Template(
        layout={
            "colorway": PALETTE,
            "colorscale": {"sequential": colorscale()},
            "font": {"family": FONT, "size": 13, "color": LIGHT["ink"]},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 16, "t": 16, "b": 44},
            "xaxis": {**axis, "showgrid": False, "showline": True, "ticks": "outside"},
            "yaxis": {**axis, "showgrid": True, "showline": False},
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "xanchor": "left",
                "yanchor": "bottom",
            },
            "hovermode": "closest",
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
            "hoverlabel": {"font": {"family": FONT}},
        }
    )


def colorscale() -> list[tuple[float, str]]:
    """SEQUENTIAL as plotly wants it."""
    return [(i / (len(SEQUENTIAL) - 1), color) for i, color in enumerate(SEQUENTIAL)]


def ordered_colors(count: int) -> list[str]:
    """So many colours for things that have an order, dark to light."""
    last = len(SEQUENTIAL) - 1
    return [SEQUENTIAL[round(i * last / max(1, count - 1))] for i in range(count)]
