"""`tripletkit evaluate`: checkpoints beside the raw embeddings, how sure that is, what they confuse."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tripletkit import __version__, fsio, inputs, log
from tripletkit.apply import confusion, intervals
from tripletkit.config import Config
from tripletkit.data.store import open_store
from tripletkit.device import choose_device, choose_precision
from tripletkit.errors import ConfigError
from tripletkit.log import logger
from tripletkit.paths import EvaluationPaths, run_paths
from tripletkit.train.evaluation import Evaluation, metric_names
from tripletkit.train.head import Head

FORMAT = 1  # of evaluation.json
FEW = 30  # buildings; the intervals of fewer are rough
SHOWN = 5  # buildings and pairs on the terminal
RAW = "raw"

Report = dict[str, Any]  # evaluation.json; docs/reference/metrics.md says what is in it


def evaluate(
    config: Config,
    split: str,
    checkpoints: Sequence[Path],
    *,
    output: Path | None,
    top: int,
    resamples: int,
    as_json: bool,
) -> None:
    """Compare the checkpoints (default: the best of the run) with the raw embeddings of a split.

    Prints the tables, or the report as JSON; keeps both in `output`, by default in the folder of
    the first checkpoint.
    """
    checkpoints = list(dict.fromkeys(checkpoints)) or [inputs.best_checkpoint(config)]
    kept = _place(split, checkpoints[0], output)
    report = compare(config, split, checkpoints, top=top, resamples=resamples)
    if kept:
        write(report, kept)
    if as_json:
        log.out.print(json.dumps(report, indent=2), soft_wrap=True)
        return
    _show(report)
    if kept:
        log.out.print(f"{kept.markdown}, {kept.report.name}", soft_wrap=True)


def compare(
    config: Config, split: str, checkpoints: Sequence[Path], *, top: int, resamples: int
) -> Report:
    """The report: metrics and intervals of each column, their differences, what is confused.

    Each checkpoint projects the split once. Raises DataError for files that cannot be used.
    """
    first = inputs.load_head(config, checkpoints[0])
    width = first[0].input_layer.in_features
    store = open_store(inputs.parquet_path(config, split), config.cache_dir, dim=width)
    heads = [first, *(inputs.load_head(config, path, width) for path in checkpoints[1:])]
    device = choose_device(config.training.device)
    evaluation = Evaluation(
        store,
        None,
        config.training,
        seed=config.global_.seed,
        device=device,
        precision=choose_precision(config.training.precision, device),
    )
    codes = evaluation.building.numpy()
    top_k = config.training.retrieval_metric_top_k

    logger.info("%s: the raw embeddings of %s", split, store.source)
    found = evaluation.retrieval(evaluation.embeddings())
    data = {
        "source": str(store.source),
        "fingerprint": store.fingerprint,
        "dim": width,
        "images": len(codes),
        "buildings": len(np.unique(codes)),
        "singletons": found.singletons,
        "queries": len(found.query_rows),
        "max_queries": config.training.retrieval_metric_max_queries,
    }
    columns: list[Report] = [{"name": RAW, "metrics": evaluation.summary(found)}]
    sums = [intervals.by_building(found, codes, top_k)]
    names = column_names(checkpoints)
    for name, path, (head, epoch) in zip(names, checkpoints, heads, strict=True):
        logger.info("%s: %s", split, path)
        column, scores = _column(evaluation, head.to(device), top)
        columns.append(
            {"name": name, "checkpoint": str(path), "sha256": _sha256(path), "epoch": epoch}
            | column
        )
        sums.append(scores)

    data["queried_buildings"] = len(sums[0].building)
    if len(sums[0].building) < FEW:
        logger.warning(
            "%d buildings with two or more images: the intervals are rough", len(sums[0].building)
        )
    differences = _add_intervals(columns, sums, resamples, config.global_.seed)
    return {
        "format": FORMAT,
        "tripletkit": __version__,
        "created": fsio.timestamp(),
        "split": split,
        "checkpoint": columns[1]["checkpoint"],
        "epoch": columns[1]["epoch"],
        "raw": columns[0]["metrics"],
        "head": columns[1]["metrics"],
        "seed": config.global_.seed,
        "data": data,
        "bootstrap": {
            "unit": "building",
            "interval": "percentile",
            "level": intervals.LEVEL,
            "resamples": resamples,
        },
        "columns": columns,
        "differences": differences,
    }


def _column(evaluation: Evaluation, head: Head, top: int) -> tuple[Report, intervals.Sums]:
    """All that is asked of one head; its projection is gone afterwards."""
    store, rows, codes = evaluation.store, evaluation.rows, evaluation.building
    projected = evaluation.projected(head)
    found = evaluation.retrieval(projected)
    astray = confusion.mistakes(projected, codes.to(projected.device), found)
    pairs = confusion.confused_pairs(store, rows, projected, top, found=astray)
    weak = confusion.weakest(store, rows, projected, found, top, found=astray)
    column = {
        "metrics": {"val_loss": evaluation.loss(projected), **evaluation.summary(found)},
        "mistakes": len(astray.query),
        "weakest": [asdict(each) for each in weak],
        "pairs": [asdict(each) for each in pairs],
    }
    top_k = evaluation.section.retrieval_metric_top_k
    return column, intervals.by_building(found, codes.numpy(), top_k)


def _add_intervals(
    columns: list[Report], sums: Sequence[intervals.Sums], resamples: int, seed: int
) -> list[Report]:
    """Put an interval to each metric of each column; returns the paired differences."""
    names = list(sums[0].scores)
    scores = np.column_stack([each.scores[name] for each in sums for name in names])
    draws = intervals.resample(sums[0].queries, scores, resamples, seed)
    draws = draws.reshape(resamples, len(columns), len(names))
    for c, column in enumerate(columns):
        column["intervals"] = {
            name: intervals.interval(draws[:, c, m]) for m, name in enumerate(names)
        }
    return [
        {
            "of": columns[later]["name"],
            "minus": columns[earlier]["name"],
            "metrics": {
                name: columns[later]["metrics"][name] - columns[earlier]["metrics"][name]
                for name in names
            },
            "intervals": {
                name: intervals.interval(draws[:, later, m] - draws[:, earlier, m])
                for m, name in enumerate(names)
            },
        }
        for earlier, later in combinations(range(len(columns)), 2)
    ]


def column_names(checkpoints: Sequence[Path]) -> list[str]:
    """Short names that tell the files apart: the run's folder and which of its checkpoints."""
    parts = [[*path.parts[:-1], path.stem.removeprefix("checkpoint_")] for path in checkpoints]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]).replace("//", "/") for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in checkpoints]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- files and tables --------------------------------------------------------------------------


def _place(split: str, checkpoint: Path, output: Path | None) -> EvaluationPaths | None:
    """Where the report goes, looked at before the work; None if the default cannot be written."""
    place = EvaluationPaths(output) if output else run_paths(checkpoint.parent).evaluation(split)
    there = next(each for each in (place.root, *place.root.parents) if each.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return place
    if output:
        raise ConfigError(f"--output {output}: {there} is no folder that can be written to")
    logger.warning("%s cannot be written: the report is not kept, --output FOLDER keeps it", there)
    return None


def write(report: Report, place: EvaluationPaths) -> None:
    """Write the JSON and the markdown: both or none."""
    with (
        fsio.atomic_write(place.report, "w") as as_json,
        fsio.atomic_write(place.markdown, "w") as as_markdown,
    ):
        as_json.write(json.dumps(report, indent=2) + "\n")
        as_json.flush()  # a full disk shows before either has its name
        as_markdown.write(markdown(report))


class Grid(NamedTuple):
    """A table, however it is drawn."""

    title: str
    header: list[str]
    rows: list[list[str]]


def markdown(report: Report) -> str:
    """The report as a page of tables."""
    columns = report["columns"]
    lines = [f"# Evaluation on {report['split']}", "", f"{_basis(report)}.", ""]
    lines += [
        f"- `{each['name']}`: `{each['checkpoint']}`, epoch {each['epoch']}, "
        f"sha256 `{each['sha256'][:16]}...`"
        for each in columns[1:]
    ]
    lines += [
        f"- data: `{report['data']['source']}`, fingerprint `{report['data']['fingerprint']}`",
        f"- tripletkit {report['tripletkit']}, {report['created']}, seed {report['seed']}",
    ]
    grids = [_metrics(report), _differences(report)]
    for column in columns[1:]:
        grids += [_pairs(column), _weakest(column)]
    for grid in grids:
        lines += ["", f"## {grid.title}", ""]
        if not grid.rows:
            lines += ["None."]
            continue
        lines += [_line(grid.header), "|" + "---|" * len(grid.header), *map(_line, grid.rows)]
    return "\n".join(lines) + "\n"


def _show(report: Report) -> None:
    from rich.table import Column, Table

    log.out.print(_basis(report), soft_wrap=True)
    for each in report["columns"][1:]:
        log.out.print(
            f"{each['name']}: {each['checkpoint']}, epoch {each['epoch']}", soft_wrap=True
        )
    grids = [_metrics(report), _differences(report)]
    for column in report["columns"][1:]:
        pairs = _pairs(column, SHOWN)
        names = slice(0, -2)  # the images' ids would not fit
        pairs = pairs._replace(header=pairs.header[names], rows=[row[names] for row in pairs.rows])
        grids += [pairs, _weakest(column, SHOWN)]
    for grid in grids:
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


def _metrics(report: Report) -> Grid:
    columns = report["columns"]
    rows = [
        [name, *(_cell(column, name) for column in columns)]
        for name in metric_names(columns[0]["metrics"])
    ]
    return Grid("Metrics", ["metric", *(column["name"] for column in columns)], rows)


def _differences(report: Report) -> Grid:
    differences = report["differences"]
    rows = [
        [name, *(_cell(each, name, "+.4f") for each in differences)]
        for name in differences[0]["metrics"]
    ]
    header = ["metric", *(f"{each['of']} - {each['minus']}" for each in differences)]
    return Grid("Differences, paired", header, rows)


def _cell(column: Report, name: str, form: str = ".4f") -> str:
    low, high = column["intervals"][name]
    return f"{column['metrics'][name]:{form}} [{low:{form}},{high:{form}}]"


def _pairs(column: Report, count: int | None = None) -> Grid:
    rows = [
        [
            each["building"],
            each["other"],
            f"{each['mistakes']:,}",
            f"{each['similarity']:.4f}",
            *each["images"],
        ]
        for each in column["pairs"][:count]
    ]
    header = ["building", "other", "mistakes", "similarity", "image", "image of the other"]
    title = f"Most confused pairs, {column['name']}: {column['mistakes']:,} mistakes in all"
    return Grid(title, header, rows)


def _weakest(column: Report, count: int | None = None) -> Grid:
    rows = [
        [
            each["building"],
            f"{each['images']:,}",
            f"{each['recall_at_1']:.4f}",
            f"{each['map_at_r']:.4f}",
            each["taken_for"],
        ]
        for each in column["weakest"][:count]
    ]
    header = ["building", "images", "recall@1", "map@r", "taken for"]
    return Grid(f"Weakest buildings, {column['name']}", header, rows)


def _line(cells: Sequence[str]) -> str:
    """A row of a markdown table."""
    clean = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + " | ".join(clean) + " |"
