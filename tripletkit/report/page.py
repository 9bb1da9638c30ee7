"""A report as one HTML file that needs nothing else: no network, no folder beside it.

The page's own policy forbids it to fetch anything. What comes from users is text everywhere: it is
escaped in HTML, and no string can end the script that holds the figures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tripletkit import fsio
from tripletkit.report.panels import DARK, LIGHT, Panel, Report, Table, require_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

FILTERED = 12  # tables with more rows have a field to filter them
# In JSON inside HTML these are written as escapes, so that it holds no tag and no comment.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def write(report: Report, path: Path) -> None:
    """Write the page, whole or not at all. Raises ConfigError without plotly."""
    require_plotly()
    text = render(report)
    with fsio.tidied(path), fsio.atomic_write(path) as file:
        file.write(text.encode())


def render(report: Report) -> str:
    """The page."""
    from plotly.offline import get_plotlyjs

    ids = [panel.id for panel in report.panels()]
    assert len(ids) == len(set(ids)), f"two panels share an id: {sorted(ids)}"
    figures = {panel.id: panel.figure for panel in report.panels() if panel.figure is not None}
    looks = {
        "light": {**LIGHT, "card": "#ffffff"},
        "dark": {**DARK, "card": "#161b22"},
    }
    values = {
        "title": escape(report.title),
        "facts": "\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
            for name, value in report.facts.items()
        ),
        "contents": "\n".join(_contents(title, group) for title, group in _groups(report)),
        "groups": "\n".join(_group(title, group) for title, group in _groups(report)),
        "plotly": get_plotlyjs(),
        "figures": _figures(figures),
        "looks": json.dumps(looks),
    }
    template = resources.files("tripletkit.report").joinpath("page.html").read_text()
    # In one pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _groups(report: Report) -> list[tuple[str, list[Panel]]]:
    return [(title, list(panels)) for title, panels in report.groups.items()]


def _contents(title: str, panels: list[Panel]) -> str:
    lines = "".join(f'<li><a href="#{panel.id}">{escape(panel.title)}</a></li>' for panel in panels)
    return f'<p><a href="#{panels[0].id}">{escape(title)}</a></p><ul>{lines}</ul>'


def _group(title: str, panels: list[Panel]) -> str:
    inside = "\n".join(_panel(panel) for panel in panels)
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n<div class="panels">\n{inside}\n</div>\n</section>'
    )


def _panel(panel: Panel) -> str:
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", panel.id), f"not a slug: {panel.id!r}"
    note = panel.figure is None and panel.table is None
    kind = " note" if note else " wide" if panel.wide else ""
    parts = [
        f'<article class="panel{kind}" id="{panel.id}">',
        f"<h3>{escape(panel.title)}</h3>",
        f"<p>{escape(panel.text)}</p>",
    ]
    if panel.figure is not None:
        parts += [_views(panel.id, panel.figure), _plot(panel)]
    if panel.table is not None:
        parts.append(_table(f"table-{panel.id}", panel.table))
    return "\n".join(part for part in [*parts, "</article>"] if part)


def _plot(panel: Panel) -> str:
    assert panel.figure is not None
    height = panel.figure.layout.height or 380  # kept free, so that nothing jumps
    return (
        f'<div class="plot" id="plot-{panel.id}" role="figure" '
        f'aria-label="{escape(panel.title)}" style="min-height:{height:.0f}px"></div>'
    )


def _views(name: str, figure: go.Figure) -> str:
    if not figure.frames:
        return ""
    *_, last = figure.frames
    buttons = "".join(
        f'<button type="button" data-view="{escape(frame.name)}" '
        f'aria-pressed="{str(frame is last).lower()}">{escape(frame.name)}</button>'
        for frame in figure.frames
    )
    return (
        f'<div class="views" role="group" aria-label="View" data-plot="plot-{name}">{buttons}</div>'
    )


def _table(name: str, table: Table) -> str:
    numeric = [
        all(_is_number(row[column]) or row[column] is None for row in table.rows)
        and any(row[column] is not None for row in table.rows)
        for column in range(len(table.columns))
    ]
    heads = "".join(
        f'<th scope="col"{_class(number)}><button type="button">{escape(title)}</button></th>'
        for title, number in zip(table.columns, numeric, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(_cell(value, number=n) for value, n in zip(row, numeric, strict=True))
        + "</tr>"
        for row in table.rows
    )
    shown = f'<div class="scroll" tabindex="0"><table id="{name}"><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    return (_filter(name, len(table.rows)) if len(table.rows) > FILTERED else "") + shown


def _filter(name: str, count: int) -> str:
    return (
        f'<div class="filter"><label>Filter <input type="search" data-table="{name}"></label>'
        f"<output>{count} of {count}</output></div>"
    )


def _cell(value: str | float | None, *, number: bool) -> str:
    if not number:
        return f"<td>{escape(shown(value))}</td>"
    exact = "" if value is None or not math.isfinite(float(value)) else repr(value)
    return f'<td class="number" data-value="{exact}">{escape(shown(value))}</td>'


def shown(value: str | float | None) -> str:
    """A cell as people read it: four decimals of what is small, thousands apart."""
    if value is None:
        return "\u2013"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.4f}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _figures(figures: Mapping[str, go.Figure]) -> str:
    """All figures by id, as JSON that is safe inside a script."""
    each = (f"{json.dumps(name)}:{figure.to_json()}" for name, figure in figures.items())
    return f"{{{','.join(each)}}}".translate(_ESCAPES)
