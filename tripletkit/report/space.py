"""Panels of a split's embeddings: ranks, distances, maps, mistakes. Pure: numbers to figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tripletkit.report.measure import Look, Space
from tripletkit.report.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RAW,
    SKY,
    TRAINED,
    VERMILION,
    Panel,
    Table,
    new_figure,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tripletkit.report.maps import Coordinates, Points

BINS = 80
COLORS = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE)
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x")
VIEWS = {"raw": "before (raw)", "trained": "after (trained)"}


def space_panels(look: Look) -> list[Panel]:
    """Ranks and distances."""
    raw, trained = (look.spaces[name].first_hit_rank for name in ("raw", "trained"))
    return [
        Panel(
            "first-hit-rank",
            "How far down the first right image is",
            "Share of the queries that find an image of their building within the first r of all "
            f"images. Median rank: raw {np.median(raw):,.0f}, trained {np.median(trained):,.0f}; "
            f"95 of 100 queries: raw {_within(raw, 0.95):,}, trained {_within(trained, 0.95):,}.",
            figure=_first_hits(look),
        ),
        Panel(
            "distances",
            "Distances within and between buildings",
            "Distances between unit vectors, from random pairs of one building, random pairs of "
            "two, and of each query to its nearest image of another building. The less the first "
            "overlaps the last, the better the embedding tells buildings apart.",
            figure=_distances(look),
        ),
    ]


def map_panel(points: Points, coordinates: Coordinates, method: str, text: str) -> Panel:
    """One map with a switch between before and after."""
    return Panel(
        f"map-{method.lower()}",
        f"Map of the embeddings ({method})",
        text,
        figure=_map(points, coordinates),
        wide=True,
    )


def mistake_panels(look: Look) -> list[Panel]:
    """Who is taken for whom."""
    asked = f"{look.queries:,} queries"
    return [
        Panel(
            "confused-pairs",
            "Most confused pairs of buildings",
            f"Buildings whose images have each other's as the nearest, most often first, by the "
            f"trained embeddings over {asked}. The two images are the most similar of the pair: "
            "look at them first. Twins in the list are often one building under two ids.",
            table=Table(
                ["building", "other building", "mistakes", "similarity", "image", "other image"],
                [
                    [pair.building, pair.other, pair.mistakes, pair.similarity, *pair.images]
                    for pair in look.pairs
                ],
            ),
            wide=True,
        ),
        Panel(
            "weakest-buildings",
            "Weakest buildings",
            f"Buildings whose images find each other least, by the trained embeddings over {asked}.",
            table=Table(
                ["building", "images", "queries", "recall@1", "map@r", "most often taken for"],
                [
                    [
                        each.building,
                        each.images,
                        each.queries,
                        each.recall_at_1,
                        each.map_at_r,
                        each.taken_for,
                    ]
                    for each in look.weak
                ],
            ),
            wide=True,
        ),
    ]


def what_was_sampled(look: Look) -> str:
    """One or two sentences on what the figures stand on."""
    said = f"{look.images:,} images of {look.buildings:,} buildings"
    if look.left_out:
        said += f" (a sample: {look.left_out:,} other buildings of the split were left out)"
    if look.queries < look.could_ask:
        said += f"; {look.queries:,} of the {look.could_ask:,} images that could ask, at random"
    else:
        said += f"; all {look.queries:,} images with another one of their building asked"
    pairs = len(look.spaces["raw"].positive)
    return f"{said}; {pairs:,} random pairs of either sort for the distances."


def _within(ranks: NDArray[np.int64], share: float) -> int:
    """The rank within which this share of the queries has its first hit."""
    return int(np.quantile(ranks, share, method="inverted_cdf"))


def _first_hits(look: Look) -> go.Figure:
    last = max(int(space.first_hit_rank.max()) for space in look.spaces.values())
    # Each of the first hundred, then as many as the eye tells apart.
    at = np.unique(np.concatenate([np.arange(1, 101), np.geomspace(1, max(last, 2), 300)]).round())
    at = at[at <= max(last, 2)].astype(np.int64)
    figure = new_figure("rank of the first hit, r", "share of the queries")
    for name, color in (("raw", RAW), ("trained", TRAINED)):
        ranks = np.sort(look.spaces[name].first_hit_rank)
        figure.add_scatter(
            x=at,
            y=np.searchsorted(ranks, at, side="right") / len(ranks),
            name=name,
            mode="lines",
            line={"color": color, "width": 2.5, "shape": "hv"},
            hovertemplate="within %{x:,}: %{y:.2%}<extra>" + name + "</extra>",
        )
    figure.update_xaxes(type="log", exponentformat="none", separatethousands=True, dtick=1)
    figure.update_yaxes(tickformat=".0%")
    return figure


def _distances(look: Look) -> go.Figure:
    """One frame for each kind of embedding, on the same axes."""
    import plotly.graph_objects as go

    everything = np.concatenate(
        [x for space in look.spaces.values() for x in _kinds(space).values()]
    )
    everything = everything[np.isfinite(everything)]
    edges = np.linspace(0, max(float(everything.max()), 1e-6) if len(everything) else 2, BINS + 1)
    height = 0.0
    views: dict[str, list[go.Scatter]] = {}
    for name, space in look.spaces.items():
        traces = views[VIEWS[name]] = []
        for (kind, values), color in zip(
            _kinds(space).items(), (BLUE, VERMILION, GREY), strict=True
        ):
            density = _density(values, edges)
            height = max(height, float(density.max()))
            traces.append(
                go.Scatter(
                    x=(edges[:-1] + edges[1:]) / 2,
                    y=density,
                    name=kind,
                    mode="lines",
                    fill="tozeroy",
                    line={"color": color, "width": 2, "shape": "hvh"},
                    fillcolor=_faint(color),
                    hovertemplate="%{x:.2f}: %{y:.2f}<extra>" + kind + "</extra>",
                )
            )
    figure = new_figure("distance", "density")
    figure.update_xaxes(range=[0, float(edges[-1])])
    figure.update_yaxes(range=[0, 1.05 * height or 1.0])
    return with_views(figure, views)


def _kinds(space: Space) -> dict[str, NDArray[np.float32]]:
    return {
        "same building": space.positive,
        "nearest other building": space.nearest_negative,
        "another building": space.negative,
    }


def _density(values: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    count, _ = np.histogram(values[np.isfinite(values)], edges)
    return np.asarray(count / max(1, count.sum()) / np.diff(edges))


def _map(points: Points, coordinates: Coordinates) -> go.Figure:
    import plotly.graph_objects as go

    views = {
        VIEWS[name]: [
            _background(points, xy),
            *(_building(points, xy, number) for number in range(len(points.names))),
        ]
        for name, xy in coordinates.items()
    }
    figure = new_figure(height=620)
    hidden: dict[str, Any] = {"visible": False, "range": [-1.05, 1.05]}
    figure.update_xaxes(**hidden)
    figure.update_yaxes(**hidden, scaleanchor="x")
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend={"orientation": "v", "x": 1.01, "y": 1, "yanchor": "top", "itemsizing": "constant"},
    )
    assert all(isinstance(trace, go.Scatter) for traces in views.values() for trace in traces)
    return with_views(figure, views)


def _background(points: Points, xy: NDArray[np.float64]) -> go.Scatter:
    return _dots(
        points, xy, np.flatnonzero(points.shown < 0), "other buildings",
        {"color": GREY, "size": 4, "opacity": 0.35},
    )  # fmt: skip


def _building(points: Points, xy: NDArray[np.float64], number: int) -> go.Scatter:
    look = {
        "color": COLORS[number % len(COLORS)],
        "symbol": SYMBOLS[number // len(COLORS) % len(SYMBOLS)],
        "size": 8,
        "opacity": 0.9,
        "line": {"width": 0.5, "color": "#FFFFFF"},
    }
    name = html.escape(points.names[number])
    return _dots(points, xy, np.flatnonzero(points.shown == number), name, look)


def _dots(
    points: Points,
    xy: NDArray[np.float64],
    which: NDArray[np.int64],
    name: str,
    marker: dict[str, Any],
) -> go.Scatter:
    import plotly.graph_objects as go

    # Single precision halves the page. Names of the user's are escaped: plotly reads tags in them.
    return go.Scatter(
        x=xy[which, 0].astype(np.float32),
        y=xy[which, 1].astype(np.float32),
        customdata=[
            [html.escape(points.buildings[i]), html.escape(points.images[i])] for i in which
        ],
        name=name,
        mode="markers",
        marker=marker,
        hovertemplate="building %{customdata[0]}<br>image %{customdata[1]}<extra></extra>",
    )


def with_views(figure: go.Figure, views: dict[str, Sequence[Any]] | dict[str, Any]) -> go.Figure:
    """Add the views (name: traces) as frames; the last is shown first."""
    import plotly.graph_objects as go

    *_, last = views.values()
    figure.add_traces(last)
    figure.frames = [go.Frame(name=name, data=traces) for name, traces in views.items()]
    return figure


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
