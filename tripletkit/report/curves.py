"""Panels of a run's metrics.jsonl: what was learned, and from which negatives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    ordered_colors,
)
from tripletkit.train.collapse import NO_METRICS

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLORS = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, GREY)


@dataclass(frozen=True)
class History:
    """A run's metrics.jsonl."""

    records: Sequence[Mapping[str, Any]]  # a line each, by epoch
    monitor: str

    @property
    def raw(self) -> Mapping[str, float]:
        """Retrieval metrics of the embeddings as they are; empty without validation."""
        found: Mapping[str, float] = self.records[0].get("raw", {}) if self.records else {}
        return found

    @property
    def validated(self) -> list[Mapping[str, Any]]:
        """The epochs with validation fields."""
        return [record for record in self.records if self.monitor in record]

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best epoch in `monitor`, the earliest of equal ones; None without validation."""
        sign = -1 if self.monitor == "val_loss" else 1
        return max(self.validated, key=lambda record: sign * record[self.monitor], default=None)

    @property
    def metrics(self) -> list[str]:
        """Names of the retrieval metrics, in order."""
        return [name for name in self.raw if name not in ("val_loss", *NO_METRICS)]

    @property
    def ks(self) -> list[int]:
        """The k of recall@k."""
        names = (name.removeprefix("recall@") for name in self.metrics)
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def banded(self) -> list[Mapping[str, Any]]:
        """The epochs that trained."""
        return [record for record in self.records if record.get("bands")]

    @property
    def bands(self) -> int:
        """How many bands there are, the random negatives not counted."""
        return len(self.banded[0]["bands"]["share"]) - 1 if self.banded else 0


def result_panels(history: History) -> list[Panel]:
    """Raw embeddings against the head, at its start and at its best."""
    if history.best is None:
        return []
    return [
        Panel(
            "metrics",
            "Retrieval metrics, raw and trained",
            "Every metric on the validation images: of the embeddings as they are, of the head "
            "before its first step, and of its best epoch. The last column is the gain over raw.",
            table=_metric_table(history, history.best),
        ),
        Panel(
            "recall-at-k",
            "Recall at k, raw and trained",
            "The share of validation images with an image of their building among the k nearest. "
            "The higher curve is better; the space between the two is what training gained.",
            figure=_recall_at_k(history, history.best),
        ),
    ]


def training_panels(history: History) -> list[Panel]:
    """Learning curves."""
    panels = []
    if any("train_loss" in record or "val_loss" in record for record in history.records):
        text = (
            "Mean triplet loss of each epoch. Training draws negatives of its own choice with "
            "dropout on, validation always the same triplets, so compare slopes and not heights."
        )
        panels.append(Panel("loss", "Loss", text + _best_line(history), figure=_loss(history)))
    if history.best is None:
        return panels
    if history.monitor != "val_loss":
        text = (
            f"What the run chooses its best epoch by: {history.monitor} on the validation images. "
            "The dashed line is that of the raw embeddings; epoch 0 is the head before training."
        )
        panels.append(
            Panel(
                "monitor",
                f"Chosen by {history.monitor}",
                text,
                figure=_over_epochs(history, [history.monitor]),
            )
        )
    recalls = [f"recall@{k}" for k in history.ks]
    if recalls:
        text = (
            "Recall at each k, epoch by epoch. The dashed line of the same colour is that of the "
            "raw embeddings."
        )
        panels.append(
            Panel(
                "recall-over-epochs",
                "Recall over the epochs",
                text,
                figure=_over_epochs(history, recalls),
            )
        )
    others = [name for name in history.metrics if not name.startswith("recall@")]
    if others := [name for name in others if name != history.monitor]:
        text = (
            "The other retrieval metrics, epoch by epoch. The dashed line of the same colour is "
            "that of the raw embeddings."
        )
        panels.append(
            Panel(
                "metrics-over-epochs",
                "Other metrics over the epochs",
                text,
                figure=_over_epochs(history, others),
            )
        )
    return panels


def band_panels(history: History) -> list[Panel]:
    """From which difficulty bands the negatives came, and what they did."""
    if not history.bands:
        return []
    what = "Band 0 holds the hardest negatives of each image, those of the nearest buildings."
    return [
        Panel(
            "band-share",
            "Where negatives came from",
            f"Share of each epoch's triplets by the band of their negative. {what}",
            figure=_shares(history),
        ),
        Panel(
            "band-reward",
            "Reward of the bands",
            "Mean reward that the negatives of a band earned, which is what the bandit maximises "
            "(training.ucb_reward). The closer the lines, the more evenly it draws.",
            figure=_by_band(history, "reward", "mean reward"),
        ),
        Panel(
            "band-loss",
            "Loss by band",
            "Mean loss of the triplets of each band. It should fall in all of them; where only the "
            "easy bands fall, the hard ones may be full of mislabelled images.",
            figure=_by_band(history, "loss", "mean loss"),
        ),
        Panel(
            "band-violations",
            "Triplets that still teach",
            "Share of the triplets of each band with a loss above zero. The rest gives no gradient.",
            figure=_by_band(history, "violation_rate", "share with loss > 0"),
        ),
    ]


def _metric_table(history: History, best: Mapping[str, Any]) -> Table:
    start = history.records[0]
    columns = ["metric", "raw", f"epoch {start['epoch']}", f"epoch {best['epoch']} (best)", "gain"]
    rows: list[list[str | float | int | None]] = []
    for name in ["val_loss", *history.metrics]:
        raw, first, last = history.raw.get(name), start.get(name), best.get(name)
        gain = None if raw is None or last is None else last - raw
        rows.append([name, raw, first, last, gain])
    return Table(columns, rows)


def _recall_at_k(history: History, best: Mapping[str, Any]) -> go.Figure:
    ks = [k for k in history.ks if f"recall@{k}" in best]
    figure = new_figure("k", "recall@k")
    for name, values, color, symbol in (
        ("raw", history.raw, RAW, "square"),
        (f"trained, epoch {best['epoch']}", best, TRAINED, "circle"),
    ):
        figure.add_scatter(
            x=ks,
            y=[values[f"recall@{k}"] for k in ks],
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2.5},
            marker={"symbol": symbol, "size": 8},
            hovertemplate="recall@%{x}: %{y:.4f}<extra>" + name + "</extra>",
        )
    figure.update_xaxes(type="log", tickvals=ks, ticktext=[f"{k:,}" for k in ks])
    return figure


def _loss(history: History) -> go.Figure:
    figure = new_figure("epoch", "mean triplet loss")
    for key, name, color in (
        ("train_loss", "training", VERMILION),
        ("val_loss", "validation", TRAINED),
    ):
        _line(figure, history.records, key, name, color)
    figure.update_yaxes(rangemode="tozero")
    _mark_best(figure, history, "val_loss")
    return figure


def _over_epochs(history: History, names: Sequence[str]) -> go.Figure:
    """Validation metrics by epoch, raw as dashed lines; the best epoch is marked."""
    alone = names[0] if len(names) == 1 else None
    figure = new_figure("epoch", alone or "value")
    span = [history.records[0]["epoch"], max(history.records[-1]["epoch"], 1)]
    colors = itertools.cycle(COLORS)
    for name in names:
        color = TRAINED if alone else next(colors)
        _line(figure, history.validated, name, name, color)
        if name in history.raw:
            figure.add_scatter(
                x=span,
                y=[history.raw[name]] * 2,
                name=f"raw {name}",
                mode="lines",
                line={"color": RAW if alone else color, "width": 1.5, "dash": "dash"},
                showlegend=bool(alone),
                legendgroup=name,
                hovertemplate="%{y:.4f}<extra>raw " + name + "</extra>",
            )
    _mark_best(figure, history, alone)
    return figure


def _line(
    figure: go.Figure, records: Sequence[Mapping[str, Any]], key: str, name: str, color: str
) -> None:
    points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if not points:
        return
    figure.add_scatter(
        x=[epoch for epoch, _ in points],
        y=[value for _, value in points],
        name=name,
        legendgroup=name,
        mode="lines+markers" if len(points) <= 40 else "lines",
        line={"color": color, "width": 2},
        marker={"size": 6},
        hovertemplate="epoch %{x}: %{y:.4f}<extra>" + name + "</extra>",
    )


def _mark_best(figure: go.Figure, history: History, key: str | None) -> None:
    """A thin line at the best epoch, and a ring on the curve of `key`."""
    best = history.best
    if best is None:
        return
    figure.add_vline(
        x=best["epoch"], line={"color": GREY, "width": 1, "dash": "dot"}, layer="below"
    )
    if key is not None and key in best:
        figure.add_scatter(
            x=[best["epoch"]],
            y=[best[key]],
            name=f"best epoch, {best['epoch']}",
            mode="markers",
            marker={
                "symbol": "circle-open",
                "size": 14,
                "color": TRAINED,
                "line": {"width": 2, "color": TRAINED},
            },
            hovertemplate="best epoch %{x}: %{y:.4f}<extra></extra>",
        )


def _best_line(history: History) -> str:
    if history.best is None:
        return ""
    return f" The dotted line marks the best epoch, {history.best['epoch']}, by {history.monitor}."


def band_names(count: int) -> list[str]:
    """Names of so many bands, and of the random negatives."""
    return [
        *(f"band {band}" + (" (hardest)" if band == 0 else "") for band in range(count)),
        "random",
    ]


def _band_looks(count: int) -> list[tuple[str, str, str]]:
    """Name, colour and symbol of each band; random is grey and dashed everywhere."""
    names = band_names(count)
    return [
        *(
            (name, color, "solid")
            for name, color in zip(names, ordered_colors(count), strict=False)
        ),
        (names[-1], PURPLE, "dash"),
    ]


def _shares(history: History) -> go.Figure:
    figure = new_figure("epoch", "share of the triplets")
    epochs = [record["epoch"] for record in history.banded]
    for band, (name, color, _) in enumerate(_band_looks(history.bands)):
        shares = [record["bands"]["share"][band] for record in history.banded]
        figure.add_scatter(
            x=epochs,
            y=shares,
            name=name,
            mode="lines",
            stackgroup="bands",
            line={"color": color, "width": 0.5},
            fillcolor=color,
            hovertemplate="epoch %{x}: %{y:.1%}<extra>" + name + "</extra>",
        )
    if len(epochs) == 1:  # an area has no width there
        for trace in figure.data:
            trace.update(x=[epochs[0] - 0.5, epochs[0] + 0.5], y=[trace.y[0]] * 2)
    figure.update_yaxes(range=[0, 1], tickformat=".0%")
    figure.update_layout(legend={"traceorder": "normal"})
    return figure


def _by_band(history: History, key: str, title: str) -> go.Figure:
    figure = new_figure("epoch", title)
    for band, (name, color, dash) in enumerate(_band_looks(history.bands)):
        points = [
            (record["epoch"], value)
            for record in history.banded
            if (value := record["bands"][key][band]) is not None
        ]
        if not points:
            continue
        figure.add_scatter(
            x=[epoch for epoch, _ in points],
            y=[value for _, value in points],
            name=name,
            mode="lines+markers" if len(history.banded) <= 40 else "lines",
            line={"color": color, "width": 2, "dash": dash},
            marker={"size": 5},
            hovertemplate="epoch %{x}: %{y:.4f}<extra>" + name + "</extra>",
        )
    return figure
