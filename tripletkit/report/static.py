"""The figures of a report on paper: PNG and PDF, drawn by matplotlib from plotly's numbers.

Plotly itself would need a browser for that, which a cluster does not have. What it can draw is
scatter (lines, markers, areas, error bars), bar and parcoords, on one pair of axes; anything else,
also a property of these that it does not know, is an error: nothing is left out in silence.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tripletkit import fsio
from tripletkit.errors import ConfigError
from tripletkit.report.panels import LIGHT, Report
from tripletkit.report.static_axes import (
    DASHES,
    DOUBLE,
    PIXELS,
    POINTS,
    SINGLE,
    Names,
    categories,
    color,
    finish,
    label,
    legend,
    places,
    text,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 7,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.edgecolor": "#57606A",
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,  # text stays text, in fonts that journals take
    "ps.fonttype": 42,
    "text.usetex": False,
    "axes.unicode_minus": True,
}
STEPS = {
    None: "default",
    "linear": "default",
    "hv": "steps-post",
    "vh": "steps-pre",
    "hvh": "steps-mid",
}
SYMBOLS = {
    None: "o", "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^",
    "triangle-down": "v", "cross": "P", "x": "X", "star": "*",
}  # fmt: skip
# What is drawn; hover texts and the like, which paper has no use for, come on top.
ONLY_ON_SCREEN = {
    "type", "uid", "customdata", "hoverinfo", "hovertemplate", "hovertext", "hoverlabel", "ids",
    "legendgroup", "connectgaps", "cliponaxis", "xaxis", "yaxis", "visible",
}  # fmt: skip
DRAWN = {
    "scatter": {"x", "y", "name", "mode", "line", "marker", "fill", "fillcolor", "opacity",
                "stackgroup", "error_y", "showlegend"},
    "bar": {"x", "y", "name", "orientation", "base", "width", "marker", "opacity", "showlegend"},
    "parcoords": {"dimensions", "line", "name"},
}  # fmt: skip


def write(report: Report, folder: Path) -> list[Path]:
    """Write every figure as ID.png and ID.pdf; returns the files. ConfigError without matplotlib."""
    require_matplotlib()
    from matplotlib import rc_context

    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for panel in report.panels():
        if panel.figure is None:
            continue
        with rc_context(STYLE):
            drawn = draw(panel.figure, wide=panel.wide)
            drawn.draw_without_rendering()
            drawn.set_layout_engine("none")  # the layout holds; finding it takes longest
            for suffix, more in (
                (".png", {"dpi": DPI}),
                (".pdf", {"metadata": {"CreationDate": None}}),
            ):
                path = folder / f"{panel.id}{suffix}"
                buffer = io.BytesIO()
                drawn.savefig(buffer, format=suffix[1:], **more)
                with fsio.atomic_write(path) as file:
                    file.write(buffer.getvalue())
                written.append(path)
    return written


def require_matplotlib() -> None:
    """Raise ConfigError if the extra is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--figures needs matplotlib", hint="pip install 'tripletkit[plots]'")


def draw(figure: go.Figure, *, wide: bool = False) -> Figure:
    """A plotly figure as one of matplotlib's; views side by side, on the same axes."""
    from matplotlib.figure import Figure

    _check_layout(figure)
    views = [(frame.name, frame.data) for frame in figure.frames] or [("", figure.data)]
    width = DOUBLE if wide or len(views) > 1 else SINGLE
    height = (figure.layout.height or 380) / PIXELS * SINGLE
    if len(views) > 1:
        height = min(height, width / len(views) + 0.4)
    drawn = Figure(figsize=(width, height), layout="constrained")
    for _, traces in views:
        for trace in traces:
            _check(trace)
    names = {which: categories(figure, which) for which in "xy"}
    axes = drawn.subplots(1, len(views), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (name, traces) in zip(axes, views, strict=True):
        _draw_traces(ax, traces, figure.layout, names)
        finish(ax, figure.layout, names)
        if name:
            ax.set_title(text(name), fontsize=7, loc="left")
    for ax in axes[1:]:
        ax.set_ylabel("")
    legend(drawn, axes[0], figure, width)
    return drawn


# --- traces ------------------------------------------------------------------------------------


def _draw_traces(ax: Axes, traces: Sequence[Any], layout: Any, names: Names) -> None:
    stacks: dict[str, np.ndarray[Any, Any]] = {}
    for number, trace in enumerate(traces):
        fallback = layout.template.layout.colorway[number % len(layout.template.layout.colorway)]
        match trace.type:
            case "scatter":
                _scatter(ax, trace, names, stacks, fallback)
            case "bar":
                _bar(ax, trace, names, fallback)
            case "parcoords":
                _parcoords(ax, trace)
            case other:
                raise AssertionError(other)
    bars = [trace for trace in traces if trace.type == "bar"]
    if len(bars) > 1 and layout.barmode != "overlay":
        raise ValueError(
            f"static figures overlay bars, they do not {layout.barmode or 'group'} them"
        )


def _check(trace: Any) -> None:
    """Raise ValueError for what would be lost."""
    if trace.type not in DRAWN:
        raise ValueError(f"static figures do not know the trace {trace.type!r}")
    unknown = set(trace.to_plotly_json()) - DRAWN[trace.type] - ONLY_ON_SCREEN
    if unknown:
        raise ValueError(f"static figures do not know {sorted(unknown)} of {trace.type!r}")
    if trace.type != "parcoords" and (trace.xaxis or "x", trace.yaxis or "y") != ("x", "y"):
        raise ValueError("static figures have one pair of axes")


def _check_layout(figure: go.Figure) -> None:
    if figure.layout.annotations:
        raise ValueError("static figures do not know annotations")


def _scatter(
    ax: Axes, trace: Any, names: Names, stacks: dict[str, np.ndarray[Any, Any]], fallback: str
) -> None:
    x, y = places(trace.x, names["x"]), places(trace.y, names["y"])
    mode = trace.mode or "lines+markers"
    if not set(mode.split("+")) <= {"lines", "markers"}:
        raise ValueError(f"static figures do not know the mode {mode!r}")
    line, marker = trace.line, trace.marker
    base = color(
        line.color or (marker.color if isinstance(marker.color, str) else None) or fallback
    )
    look: dict[str, Any] = {"label": label(trace), "alpha": trace.opacity, "zorder": 2}
    if trace.stackgroup:
        under = stacks.get(trace.stackgroup, np.zeros(len(y)))
        stacks[trace.stackgroup] = under + y
        ax.fill_between(x, under, under + y, color=color(trace.fillcolor or base), lw=0, **look)
        return
    steps = STEPS[line.shape]
    if trace.fill == "tozeroy":
        step: Any = steps.removeprefix("steps-") if steps != "default" else None
        ax.fill_between(x, 0, y, step=step, color=color(trace.fillcolor or base), lw=0)
    elif trace.fill not in (None, "none"):
        raise ValueError(f"static figures do not know fill={trace.fill!r}")
    if trace.error_y.array is not None:
        up = np.asarray(trace.error_y.array, float)
        down = (
            up if trace.error_y.arrayminus is None else np.asarray(trace.error_y.arrayminus, float)
        )
        ax.errorbar(
            x, y, (down, up), fmt="none", ecolor=color(trace.error_y.color or base),
            elinewidth=0.8, capsize=1.6, capthick=0.8, zorder=2,
        )  # fmt: skip
    if "lines" in mode:
        look |= {
            "color": base,
            "linewidth": max((2 if line.width is None else line.width) * POINTS, 0.4),
            "linestyle": DASHES[line.dash],
            "drawstyle": steps,
        }
        size = marker.size or 6
        if "markers" in mode:
            look |= _marker(marker, base) | {"markersize": size * POINTS}
        ax.plot(x, y, **look)
    else:
        _markers(ax, x, y, marker, base, look)


def _markers(ax: Axes, x: Any, y: Any, marker: Any, base: Any, look: dict[str, Any]) -> None:
    shape = _marker(marker, base)
    opacity = look.pop("alpha")
    several = not isinstance(marker.color, str | None)
    colors = [color(each) for each in marker.color] if several else color(marker.color or base)
    hollow = shape.get("markerfacecolor") == "none"
    edge = marker.line.width or 0
    ax.scatter(
        x, y, s=((marker.size or 6) * POINTS) ** 2, marker=shape["marker"],
        facecolors="none" if hollow else colors,
        edgecolors=colors if hollow else color(marker.line.color) if edge else "none",
        linewidths=max(edge * POINTS, 0.2) if edge else 1.0 * hollow,
        alpha=marker.opacity if opacity is None else opacity, **look,
    )  # fmt: skip


def _marker(marker: Any, base: Any) -> dict[str, Any]:
    name, _, kind = (marker.symbol or "circle").partition("-open")
    look: dict[str, Any] = {"marker": SYMBOLS[name]}
    if (marker.symbol or "").endswith("-open") and not kind:
        look |= {"markerfacecolor": "none", "markeredgecolor": base}
    else:
        look |= {"markeredgewidth": 0}
    return look


def _bar(ax: Axes, trace: Any, names: Names, fallback: str) -> None:
    flat = trace.orientation == "h"
    along, across = (trace.x, trace.y) if flat else (trace.y, trace.x)
    place = places(across, names["y" if flat else "x"])
    colors = trace.marker.color
    colors = color(colors or fallback) if isinstance(colors, str | None) else [*map(color, colors)]
    edge = trace.marker.line.width or 0
    start = 0 if trace.base is None else np.asarray(trace.base, float)
    look: dict[str, Any] = {
        "color": colors,
        "edgecolor": color(trace.marker.line.color) if edge else "none",
        "linewidth": edge * POINTS,
        "label": label(trace),
        "alpha": trace.opacity,
    }
    length, thickness = np.asarray(along, float), 0.8 if trace.width is None else trace.width
    if flat:
        ax.barh(place, length, height=thickness, left=start, **look)
    else:
        ax.bar(place, length, width=thickness, bottom=start, **look)


def _parcoords(ax: Axes, trace: Any) -> None:
    """Axes side by side, a line across them for each thing."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    scaled = []
    for place, dimension in enumerate(trace.dimensions):
        values = np.asarray(dimension.values, float)
        low, high = dimension.range or (values.min(), values.max())
        span = (high - low) or 1.0
        scaled.append((values - low) / span)
        ticks = np.linspace(low, high, 5) if dimension.tickvals is None else dimension.tickvals
        labels = (
            [f"{tick:.3g}" for tick in ticks] if dimension.ticktext is None else dimension.ticktext
        )
        ax.axvline(place, color=STYLE["axes.edgecolor"], lw=0.6, zorder=3)
        for tick, name in zip(ticks, labels, strict=True):
            ax.annotate(
                text(name), (place, (tick - low) / span), (2, 0), textcoords="offset points",
                fontsize=5.5, va="center", zorder=4,
                bbox={"boxstyle": "square,pad=0.1", "fc": (1, 1, 1, 0.75), "ec": "none"},
            )  # fmt: skip
        ax.annotate(
            text(dimension.label), (place, 1), (0, 6), textcoords="offset points",
            ha="center", va="bottom", fontsize=6.5, annotation_clip=False,
        )  # fmt: skip
    lines = [*np.stack([np.stack([np.full(len(y), i), y], 1) for i, y in enumerate(scaled)], 1)]
    scale = list(trace.line.colorscale or [(0, LIGHT["ink"]), (1, LIGHT["ink"])])
    if trace.line.reversescale:
        scale = [(1 - at, each) for at, each in reversed(scale)]
    many = LineCollection(
        lines, cmap=LinearSegmentedColormap.from_list("scale", scale), lw=0.7, alpha=0.8
    )
    colors = np.asarray(trace.line.color, float)
    many.set_array(colors)
    ax.add_collection(many)
    ax.set_xlim(-0.15, len(scaled) - 0.6)
    ax.set_ylim(-0.03, 1.03)
    ax.set_axis_off()
