"""What is known of a checkpoint: from itself, and from the folder of its run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tripletkit import __version__, fsio, provenance
from tripletkit import config as configuration
from tripletkit.config import Config, TrainingModel
from tripletkit.errors import ConfigError, DataError
from tripletkit.log import logger
from tripletkit.paths import RunPaths, StudyPaths, run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.checkpoint import Checkpoint
from tripletkit.train.collapse import NO_METRICS
from tripletkit.train.trackers import read_metrics

OF_A_RECORD = ("epoch", "step", "train_loss", "val_loss", "raw", "bands")  # beside the metrics
# Names in the checkpoint's `data`, the key of [paths] behind each, and what the card calls it.
SOURCES = {
    "training embeddings": ("train_parquet_path", "training"),
    "validation embeddings": ("val_parquet_path", "validation"),
    "difficulty bands": ("difficulty_metadata_path", "difficulty bands"),
}


class Source(NamedTuple):
    """One of the inputs of the training."""

    what: str
    name: str  # without its folder: cards are published
    rows: int | None
    buildings: int | None
    key: str  # as the run saw it, a sample of the buildings included


class Tested(NamedTuple):
    """What `tripletkit evaluate` found of these very weights on the test split."""

    name: str  # of the data, without its folder
    fingerprint: str
    queries: int
    buildings: int  # that the queries are of
    images: int  # in the gallery
    level: float  # of the intervals
    metrics: Mapping[str, tuple[float, float, float, float]]  # raw, head, interval of the head


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint. Empty where nothing is: other trainers record little."""

    section: TrainingModel
    checkpoint: str
    sha256: str
    epoch: int | None
    state: str  # of the run: sentences, or nothing
    raw: Mapping[str, float]
    trained: Mapping[str, float]
    tested: Tested | None
    sources: tuple[Source, ...]
    training: Mapping[str, Any]
    origin: Mapping[str, str]  # the run, and the study and trial that it comes from
    started: str | None  # the run, the first time
    start: Mapping[str, Any]  # of the run, the newest, as its provenance has it


def gather(
    config: Config, checkpoint: Path, state: Checkpoint, sha256: str, section: TrainingModel
) -> Facts:
    """Everything that checkpoint and run folder tell; `sha256` is that of the checkpoint."""
    run = run_paths(checkpoint.absolute().parent)
    ours = "progress" in state
    progress, epoch = state.get("progress", {}), state.get("epoch")
    record = provenance.read(run.root)
    known = (record or {}).get("data") or {}
    starts = (record or {}).get("starts") or [{}]
    return Facts(
        section=section,
        checkpoint=checkpoint.name,
        sha256=sha256,
        epoch=epoch if isinstance(epoch, int) else None,
        state=_how_far(state, run) if ours else "",
        raw=_numbers(progress.get("raw")),
        trained=_numbers(_validated(state, run)),
        tested=_tested(run, sha256),
        sources=tuple(_sources(run_config(config, run), state["data"], known)) if ours else (),
        training={"seed": state["config"]["seed"], **state["config"]["training"]} if ours else {},
        origin=_origin(run) if ours else {},
        started=starts[0].get("started") if ours else None,
        start=provenance.newest(record) if ours else {},
    )


def run_config(config: Config, run: RunPaths) -> Config:
    """The configuration that the run was trained with, if it is readable; else `config`."""
    if not run.config.exists():
        return config
    try:
        return configuration.load(run.config, environ={})
    except ConfigError as error:
        logger.warning("%s is not used: %s", run.config, error.message)
        return config


def labels(facts: Facts) -> dict[str, str]:
    """The origin in a few words, for the files that may travel without the card."""
    short = {
        "tripletkit": __version__,
        "checkpoint": facts.checkpoint,
        "checkpoint_sha256": facts.sha256,
        "epoch": facts.epoch,
        **facts.origin,
        **{f"{source.what} fingerprint": source.key for source in facts.sources},
        "commit": commit(facts.start),
    }
    return {key: str(value) for key, value in short.items() if value not in (None, "")}


def _how_far(state: Checkpoint, run: RunPaths) -> str:
    """How the run ended, if it has, and which of its states the weights are."""
    last = state
    if run.final.exists():
        with contextlib.suppress(DataError):
            last = checkpoints.load(run.final)
    epochs, wanted = last["epoch"], state["config"]["training"]["num_epochs"]
    if last is state and not run.config.exists():
        ended = "How far the run got is not known here."
    elif not last.get("finished"):
        ended = f"The run was not finished when this was exported: it is to have {wanted} epochs."
    elif last["progress"]["early_stopped"]:
        ended = f"The run stopped early, after {epochs} of {wanted} epochs."
    else:
        ended = f"The run is finished: {epochs} epochs."
    progress = state["progress"]
    which = f"These are the weights after epoch {progress['epoch']}"
    if progress["place"]:
        which += " and a part of the next"
    elif progress["best_epoch"] == progress["epoch"]:
        which += ", the best so far"
    return f"{ended} {which}."


def _validated(state: Checkpoint, run: RunPaths) -> object:
    """The validation metrics of these very weights; nothing if they were not validated."""
    progress = state.get("progress")
    if progress is None:
        metrics = state.get("metrics")
        return (metrics.get("val_metrics") or {}) if isinstance(metrics, Mapping) else {}
    records = _records(run)
    if records:
        here = (progress["epoch"], progress["global_step"])
        return next((r for r in reversed(records) if (r.get("epoch"), r.get("step")) == here), {})
    training = state["config"]["training"]
    epoch = progress["epoch"]
    validated = (
        epoch in (progress["best_epoch"], training["num_epochs"])
        or epoch % training["validate_every_n_epochs"] == 0
    )
    return progress["metrics"] if validated and not progress["place"] else {}


def _tested(run: RunPaths, sha256: str) -> Tested | None:
    """From the evaluation in the run's folder, if it is of these weights."""
    path = run.evaluation("test").report
    try:
        report = fsio.parse_json(path.read_text())
        data, (raw, *columns) = report["data"], report["columns"]
        head = next((column for column in columns if column["sha256"] == sha256), None)
        if head is None:
            return None
        return Tested(
            name=Path(data["source"]).name,
            fingerprint=str(data["fingerprint"]),
            queries=int(data["queries"]),
            buildings=int(data["queried_buildings"]),
            images=int(data["images"]),
            level=float(report["bootstrap"]["level"]),
            metrics={
                str(name): (
                    float(raw["metrics"][name]),
                    float(head["metrics"][name]),
                    float(low),
                    float(high),
                )
                for name, (low, high) in head["intervals"].items()
            },
        )
    except FileNotFoundError:
        return None
    except (
        OSError,
        ArithmeticError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        logger.warning("%s is not used: %s", path, error)
        return None


def _records(run: RunPaths) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, if they can be read."""
    try:
        return read_metrics(run.metrics)
    except (OSError, DataError) as error:
        logger.warning("%s is not used: %s", run.metrics, error)
        return []


def _numbers(metrics: object) -> dict[str, float]:
    """The metrics of retrieval among whatever a record holds."""
    if not isinstance(metrics, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in metrics.items()
        if name not in (*OF_A_RECORD, *NO_METRICS) and isinstance(value, int | float)
    }


def _sources(
    config: Config, keys: Mapping[str, str], known: Mapping[str, Mapping[str, Any]]
) -> Iterable[Source]:
    """What the run saw, by the keys in the checkpoint; the files as the run recorded them."""
    for name, (setting, what) in SOURCES.items():
        if not (key := keys.get(name)):
            continue
        facts = known.get(name, {})
        if facts.get("fingerprint") != key:
            facts = {}  # of a start with other data
        path = facts.get("source") or getattr(config.paths, setting)
        file = Path(path).name if path else ""
        yield Source(what, file, facts.get("rows"), facts.get("buildings"), key)


def _origin(run: RunPaths) -> dict[str, str]:
    found = {"run": run.root.name} if run.config.exists() else {}
    try:
        best = fsio.parse_json(run.origin.read_text())
        found["parameters from"] = str(best["source"])
        found["value there"] = f"{best['metric']} {best['value']:.4f}"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s is not used: %s", run.origin, error)
    study = StudyPaths(run.root.parent)
    trial = re.fullmatch(r"trial_(\d+)", run.root.name)
    if trial and study.identity.exists():
        found |= {"study": study.root.name, "trial": str(int(trial[1]))}
    return found


def commit(start: Mapping[str, Any]) -> str:
    """The commit of tripletkit that a start of the run had, if it came from a repository."""
    code = (start.get("code") or {}).get("tripletkit") or {}
    commit = code.get("commit") or ""
    changed = code.get("changes") or code.get("diff")
    return f"{commit} with uncommitted changes" if commit and changed else commit
