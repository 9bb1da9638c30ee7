"""The tables of `tripletkit evaluate`: on the terminal, and as markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tripletkit import log
from tripletkit.apply.card import escape
from tripletkit.train.evaluation import metric_names

SHOWN = 5  # buildings and pairs on the terminal

Report = dict[str, Any]  # evaluation.json; docs/reference/metrics.md says what is in it


class Grid(NamedTuple):
    """A table, however it is drawn."""

    title: str
    header: list[str]
    rows: list[list[str]]


def markdown(report: Report) -> str:
    """The report as a page of tables."""
    data = report["data"]
    lines = [f"# Evaluation on {report['split']}", "", f"{_basis(report)}.", ""]
    lines += [
        f"- {escape(each['name'])}: {escape(each['checkpoint'])}, "
        f"epoch {each['epoch']}, sha256 `{each['sha256'][:16]}...`"
        for each in report["columns"][1:]
    ]
    lines += [
        f"- data: {escape(data['source'])}, fingerprint `{data['fingerprint']}`",
        f"- tripletkit {report['tripletkit']}, {report['created']}, seed {report['seed']}",
    ]
    for grid in _grids(report, escape):
        lines += ["", f"## {grid.title}", ""]
        if not grid.rows:
            lines += ["None."]
            continue
        lines += [_line(grid.header), "|" + "---|" * len(grid.header), *map(_line, grid.rows)]
    return "\n".join(lines) + "\n"


def show(report: Report) -> None:
    """Print the tables, with the first of each list."""
    from rich.table import Column, Table

    log.out.print(_basis(report), soft_wrap=True)
    for each in report["columns"][1:]:
        log.out.print(
            f"{each['name']}: {each['checkpoint']}, epoch {each['epoch']}", soft_wrap=True
        )
    for grid in _grids(report, str, SHOWN):
        log.out.print(f"\n{grid.title}", soft_wrap=True)
        if not grid.rows:
            log.out.print("none")
            continue
        table = Table(*(Column(name, overflow="fold") for name in grid.header))
        for row in grid.rows:
            table.add_row(*row)
        log.out.print(table)


def _basis(report: Report) -> str:
    data, bootstrap = report["data"], report["bootstrap"]
    return (
        f"{report['split']}: {data['queries']:,} queries of {data['queried_buildings']:,} buildings "
        f"in a gallery of {data['images']:,} images; {bootstrap['level']:.0%} intervals of "
        f"{bootstrap['resamples']:,} resamples of the buildings"
    )


def _grids(report: Report, shown: Callable[[str], str], count: int | None = None) -> list[Grid]:
    """The tables, with names as `shown` shows them; `count`: the first of each list, no images."""
    grids = [_metrics(report, shown), _differences(report, shown)]
    for column in report["columns"][1:]:
        if column["pairs"] or not column["mistakes"]:  # else they were not asked for
            pairs = _pairs(column, shown)
            if count:  # the images' ids would not fit
                rows = [row[:-2] for row in pairs.rows[:count]]
                pairs = Grid(pairs.title, pairs.header[:-2], rows)
            weakest = _weakest(column, shown)
            grids += [pairs, weakest._replace(rows=weakest.rows[:count])]
    return grids


def _metrics(report: Report, shown: Callable[[str], str]) -> Grid:
    columns = report["columns"]
    rows = [
        [name, *(_cell(column, name) for column in columns)]
        for name in metric_names(columns[0]["metrics"])
    ]
    return Grid("Metrics", ["metric", *(shown(column["name"]) for column in columns)], rows)


def _differences(report: Report, shown: Callable[[str], str]) -> Grid:
    differences = report["differences"]
    rows = [
        [name, *(_cell(each, name, "+.4f") for each in differences)]
        for name in differences[0]["metrics"]
    ]
    header = ["metric", *(f"{shown(e['of'])} - {shown(e['minus'])}" for e in differences)]
    return Grid("Differences, paired", header, rows)


def _cell(column: Report, name: str, form: str = ".4f") -> str:
    low, high = column["intervals"][name]
    return f"{column['metrics'][name]:{form}} [{low:{form}},{high:{form}}]"


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


def _line(cells: Sequence[str]) -> str:
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"
