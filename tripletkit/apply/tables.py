"""The tables of `tripletkit evaluate`: on the terminal, and as markdown."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len

from tripletkit import log
from tripletkit.apply.card import escape
from tripletkit.train.evaluation import metric_names

SHOWN = 5  # buildings and pairs on the terminal
PAGE = 80  # characters that a line of numbers may have in markdown, to be read as it is

Report = dict[str, Any]  # evaluation.json; docs/reference/metrics.md says what is in it


class Grid(NamedTuple):
    """A table, however it is drawn."""

    title: str
    header: list[str]
    rows: list[list[str]]
    block: int = 1  # so many rows have the same first cell


class Style(NamedTuple):
    """How a report is drawn: on a terminal, or in a file."""

    shown: Callable[[str], str]  # a name as it is to be written
    fits: Callable[[Grid], bool]  # whether no number of a table would be broken
    first: int | None = None  # so many of each list, without images


def markdown(report: Report) -> str:
    """The report as a page of tables."""
    data = report["data"]
    lines = [f"# Evaluation on {report['split']}", "", f"{_basis(report)}.", ""]
    style = Style(escape, lambda grid: max(map(len, _lines(grid))) <= PAGE)
    labels = _labels(report, style)
    lines += [
        f"- {called}: {escape(each['checkpoint'])}, "
        f"epoch {each['epoch']}, sha256 `{each['sha256'][:16]}...`"
        for called, each in _legend(report, labels, escape)
    ]
    lines += [
        f"- data: {escape(data['source'])}, fingerprint `{data['fingerprint']}`",
        f"- tripletkit {report['tripletkit']}, {report['created']}, seed {report['seed']}",
    ]
    for grid in _grids(report, labels, style):
        lines += ["", f"## {grid.title}", "", *(_lines(grid) if grid.rows else ["None."])]
    return "\n".join(lines) + "\n"


def show(report: Report) -> None:
    """Print the tables, with the first of each list."""
    from rich.table import Column, Table

    log.out.print(_basis(report), soft_wrap=True)
    style = Style(str, lambda grid: _width(grid) <= log.out.width, SHOWN)
    labels = _labels(report, style)
    for called, each in _legend(report, labels, str):
        log.out.print(f"{called}: {each['checkpoint']}, epoch {each['epoch']}", soft_wrap=True)
    for grid in _grids(report, labels, style):
        log.out.print(f"\n{grid.title}", soft_wrap=True)
        if not grid.rows:
            log.out.print("none")
            continue
        table = Table(*(Column(name, overflow="fold") for name in grid.header))
        for number, row in enumerate(grid.rows):
            again = number % grid.block > 0
            last = number % grid.block == grid.block - 1
            table.add_row(
                *([""] if again else row[:1]), *row[1:], end_section=last and grid.block > 1
            )
        log.out.print(table)


def _basis(report: Report) -> str:
    data, bootstrap = report["data"], report["bootstrap"]
    return (
        f"{report['split']}: {data['queries']:,} queries of {data['queried_buildings']:,} buildings "
        f"in a gallery of {data['images']:,} images; {bootstrap['level']:.0%} intervals of "
        f"{bootstrap['resamples']:,} resamples of the buildings"
    )


def _labels(report: Report, style: Style) -> dict[str, str]:
    """What the columns are called in the tables: their names if these fit, else letters."""
    names = {each["name"]: style.shown(each["name"]) for each in report["columns"]}
    if all(style.fits(wide) for wide, _ in _numbers(report, names)):
        return names
    raw, *others = names
    return {raw: names[raw], **dict(zip(others, _letters(), strict=False))}


def _letters() -> Iterator[str]:
    """A to Z, A1 to Z1, ..."""
    for turn in itertools.count():
        yield from (f"{letter}{turn or ''}" for letter in string.ascii_uppercase)


def _legend(
    report: Report, labels: dict[str, str], shown: Callable[[str], str]
) -> Iterator[tuple[str, Report]]:
    """Each checkpoint, and what it is called."""
    for each in report["columns"][1:]:
        name, label = shown(each["name"]), labels[each["name"]]
        yield (name if label == name else f"{label}, {name}"), each


def _grids(report: Report, labels: dict[str, str], style: Style) -> list[Grid]:
    grids = [wide if style.fits(wide) else long for wide, long in _numbers(report, labels)]
    for column in report["columns"][1:]:
        if column["pairs"] or not column["mistakes"]:  # else they were not asked for
            pairs = _pairs(column, style.shown)
            if style.first:  # the images' ids would not fit
                rows = [row[:-2] for row in pairs.rows[: style.first]]
                pairs = Grid(pairs.title, pairs.header[:-2], rows)
            weakest = _weakest(column, style.shown)
            grids += [pairs, weakest._replace(rows=weakest.rows[: style.first])]
    return grids


def _numbers(report: Report, labels: dict[str, str]) -> Iterator[tuple[Grid, Grid]]:
    """Metrics, and their differences: with a column for each, and with a row for each."""
    level = f"{report['bootstrap']['level']:.0%} interval"
    columns, differences = report["columns"], report["differences"]
    names = metric_names(columns[0]["metrics"])
    called = [labels[each["name"]] for each in columns]
    yield _both("Metrics", ["embeddings", level], names, called, columns, ".4f")
    called = [f"{labels[each['of']]} - {labels[each['minus']]}" for each in differences]
    names = list(differences[0]["metrics"])
    title = "Differences, paired"
    yield _both(title, ["difference", level], names, called, differences, "+.4f")


def _both(
    title: str,
    words: Sequence[str],
    names: Sequence[str],
    called: Sequence[str],
    columns: Sequence[Report],
    form: str,
) -> tuple[Grid, Grid]:
    def value(column: Report, name: str) -> list[str]:
        low, high = column["intervals"][name]
        return [f"{column['metrics'][name]:{form}}", f"[{low:{form}},{high:{form}}]"]

    wide = [[name, *(" ".join(value(column, name)) for column in columns)] for name in names]
    long = [
        [name, label, *value(column, name)]
        for name in names
        for label, column in zip(called, columns, strict=True)
    ]
    what, level = words
    return (
        Grid(title, ["metric", *called], wide),
        Grid(title, ["metric", what, "value", level], long, block=len(columns)),
    )


def _width(grid: Grid) -> int:
    """Of a table on the terminal, where only the words of its header may be on several lines."""
    return 1 + sum(
        3 + max(map(cell_len, [*header.split(), *cells]))
        for header, *cells in zip(grid.header, *grid.rows, strict=True)
    )


def _pairs(column: Report, shown: Callable[[str], str]) -> Grid:
    rows = [
        [
            shown(each["building"]),
            shown(each["other"]),
            f"{each['mistakes']:,}",
            f"{each['similarity']:.4f}",
            *map(shown, each["images"]),
        ]
        for each in column["pairs"]
    ]
    header = ["building", "other", "mistakes", "similarity", "image", "image of the other"]
    title = f"Most confused pairs, {shown(column['name'])}: {column['mistakes']:,} mistakes in all"
    return Grid(title, header, rows)


def _weakest(column: Report, shown: Callable[[str], str]) -> Grid:
    rows = [
        [
            shown(each["building"]),
            f"{each['images']:,}",
            f"{each['recall_at_1']:.4f}",
            f"{each['map_at_r']:.4f}",
            shown(each["taken_for"]),
        ]
        for each in column["weakest"]
    ]
    header = ["building", "images", "recall@1", "map@r", "taken for"]
    return Grid(f"Weakest buildings, {shown(column['name'])}", header, rows)


def _lines(grid: Grid) -> list[str]:
    """A table in markdown."""
    header, *rows = ("| " + " | ".join(cells) + " |" for cells in (grid.header, *grid.rows))
    return [header, "|" + "---|" * len(grid.header), *rows]
