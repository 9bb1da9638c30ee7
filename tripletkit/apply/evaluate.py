"""`tripletkit evaluate`: checkpoints beside the raw embeddings, how sure that is, what they confuse."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tripletkit import __version__, fsio, inputs, log
from tripletkit.apply import confusion, intervals, tables
from tripletkit.apply.tables import Report
from tripletkit.config import Config
from tripletkit.data import parquet
from tripletkit.data.store import open_store
from tripletkit.device import choose_device, choose_precision
from tripletkit.errors import ConfigError
from tripletkit.log import logger
from tripletkit.paths import EvaluationPaths, run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.evaluation import Evaluation
from tripletkit.train.head import Head

FORMAT = 1  # of evaluation.json
FEW = 30  # buildings; the intervals of fewer are rough
RAW = "raw"


def evaluate(
    config: Config,
    split: str,
    paths: Sequence[Path],
    *,
    output: Path | None,
    top: int,
    resamples: int,
    as_json: bool,
) -> None:
    """Compare checkpoints (default: the best of the run) with the raw embeddings of a split.

    Prints the tables, or the report as JSON; keeps both in `output`, by default in the folder of
    the first checkpoint.
    """
    paths = _asked(config, paths)
    kept = _place(split, paths[0], output)
    report = compare(config, split, paths, top=top, resamples=resamples)
    if kept:
        write(report, kept)
    if as_json:
        log.out.print(json.dumps(report, indent=2), soft_wrap=True)
        return
    tables.show(report)
    if kept:
        log.out.print(f"{kept.markdown}, {kept.report.name}", soft_wrap=True)


def check(config: Config, split: str, paths: Sequence[Path], output: Path | None) -> None:
    """What `evaluate` with the same arguments reads and writes, before a job waits for it."""
    paths = _asked(config, paths)
    _place(split, paths[0], output)
    _open_heads(config, paths)
    files = parquet.find_files(inputs.parquet_path(config, split))
    parquet.open_table(files, [parquet.BUILDING, parquet.EMBEDDING])


def _asked(config: Config, paths: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(paths)) or [inputs.best_checkpoint(config)]


class _Opened(NamedTuple):
    """A checkpoint as it was when it was read; the file may be another one by now."""

    path: Path
    head: Head
    epoch: int | None
    sha256: str


def _open_heads(config: Config, paths: Sequence[Path]) -> list[_Opened]:
    """The checkpoints' heads, which take vectors of the same width."""
    opened: list[_Opened] = []
    for path in paths:
        state, sha256 = checkpoints.load_with_sha256(path)
        width = opened[0].head.input_layer.in_features if opened else None
        with checkpoints.understood(path):
            head = inputs.head_of(state, inputs.head_section(config, state), path, width)
        opened.append(_Opened(path, head, state.get("epoch"), sha256))
        inputs.warn_if_unfinished(path, state.get("epoch"))
    return opened


def compare(
    config: Config, split: str, paths: Sequence[Path], *, top: int, resamples: int
) -> Report:
    """The report: metrics and intervals of each column, their differences, what is confused.

    Each checkpoint projects the split once. Raises DataError for files that cannot be used.
    """
    source = inputs.parquet_path(config, split)
    opened = _open_heads(config, paths)
    width = opened[0].head.input_layer.in_features
    store = open_store(source, config.cache_dir, dim=width)
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
    for name, (path, head, epoch, sha256) in zip(column_names(paths), opened, strict=True):
        logger.info("%s: %s", split, path)
        column, scores = _column(evaluation, head.to(device), top)
        columns.append(
            {"name": name, "checkpoint": str(path), "sha256": sha256, "epoch": epoch} | column
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
    column = {
        "metrics": {"val_loss": evaluation.loss(projected), **evaluation.summary(found)},
        "mistakes": int((found.first_hit_rank > 1).sum()),
        "weakest": [],
        "pairs": [],
    }
    if top:  # it is a second search
        astray = confusion.mistakes(projected, codes.to(projected.device), found)
        pairs = confusion.confused_pairs(store, rows, projected, top, found=astray)
        weak = confusion.weakest(store, rows, projected, found, top, found=astray)
        column["weakest"] = [asdict(each) for each in weak]
        column["pairs"] = [asdict(each) for each in pairs]
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


def column_names(paths: Sequence[Path]) -> list[str]:
    """Short names that tell checkpoints apart: the run's folder and which of its checkpoints."""
    parts = [[*path.parts[:-1], path.stem.removeprefix("checkpoint_")] for path in paths]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]).replace("//", "/") for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# --- files -------------------------------------------------------------------------------------


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
    """Write the JSON and the markdown, each whole; an error leaves both as they were.

    The JSON comes last: a kill in between leaves it as it was, beside new markdown.
    """
    with (
        fsio.tidied(place.report),
        fsio.tidied(place.markdown),
        fsio.atomic_write(place.report, "w") as as_json,
        fsio.atomic_write(place.markdown, "w") as as_markdown,
    ):
        as_json.write(json.dumps(report, indent=2) + "\n")
        as_json.flush()  # a full disk shows before either has its name
        as_markdown.write(tables.markdown(report))
