"""The report of a run: what is in its folder, measured where needed, as panels."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tripletkit import __version__, fsio, inputs, provenance
from tripletkit.config import Config
from tripletkit.data.store import open_store
from tripletkit.errors import DataError, TripletkitError
from tripletkit.log import logger
from tripletkit.paths import RunPaths
from tripletkit.report import curves, intervals, maps, measure, space
from tripletkit.report.curves import History
from tripletkit.report.panels import Panel, Report
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.checkpoint import Checkpoint
from tripletkit.train.trackers import read_metrics

MISSING = "Not in this report"
KNOWN_AS = {"train": "training embeddings", "val": "validation embeddings"}  # to the provenance


@dataclass
class _Page:
    """A report on its way: groups without panels are left out."""

    facts: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Sequence[Panel]] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def add(self, group: str, panels: Sequence[Panel]) -> None:
        if panels:
            self.groups[group] = [*self.groups.get(group, ()), *panels]

    def lacks(self, what: str, why: str) -> None:
        """Say what is not there, at the end of the page and in the log."""
        logger.info("not in the report: %s: %s", what, why)
        self.missing.append((what, why))


def run_report(config: Config, paths: RunPaths, *, split: str = "val") -> Report:
    """The report of the run in `paths`, with the embeddings of `split`.

    `config` is the run's. What is not there is named in the report, never an error, save for a
    folder that holds no run at all: DataError.
    """
    if not (paths.metrics.exists() or paths.config.exists() or paths.saved()):
        raise DataError(
            f"{paths.root} is not the folder of a run: it has neither metrics nor checkpoints",
            hint="train first, or name another folder, a trial or a study",
        )
    history = read_history(paths.metrics, config.training.monitor)
    found = _checkpoint(paths)
    page = _Page(facts=run_facts(config, paths, history, found[1] if found else None))
    _add_history(page, history)
    page.add("Evaluation", intervals.panels(paths, lacks=page.lacks))
    if found:
        _add_embeddings(page, config, found[0], split)
    else:
        page.lacks(
            "ranks, distances, maps and confused pairs",
            "there is no checkpoint yet: make the report again once the run has written one",
        )
    if page.missing:
        page.groups[MISSING] = [
            Panel(f"missing-{number}", what, why)
            for number, (what, why) in enumerate(page.missing, 1)
        ]
    page.facts["report"] = (
        f"tripletkit {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {fsio.timestamp()}"
    )
    return Report(f"Run {'/'.join(paths.root.parts[-2:])}", page.facts, page.groups)


def read_history(path: Path, monitor: str) -> History:
    """A run's metrics.jsonl; empty if there is none."""
    return History(read_metrics(path), monitor)


def _checkpoint(paths: RunPaths) -> tuple[Path, Checkpoint] | None:
    """What to look through: the best, or else what there is, the newest first."""
    for path in (paths.best, paths.final, paths.last):
        if path.exists():
            return path, checkpoints.load(path)
    epochs = [path for path in paths.saved() if path not in (paths.best, paths.final, paths.last)]
    return checkpoints.newest(epochs)


def _add_history(page: _Page, history: History) -> None:
    page.add("Result", curves.result_panels(history))
    page.add("Training", curves.training_panels(history))
    page.add("Difficulty bands", curves.band_panels(history))
    if not history.records:
        page.lacks("learning curves", "no epoch has been recorded yet")
        return
    if history.best is None:
        page.lacks(
            "retrieval metrics and validation loss",
            "the run has no validation data (paths.val_parquet_path) or has not validated yet",
        )
    if not history.banded:
        page.lacks("difficulty bands over time", "no epoch of training is over yet")
    elif not history.bands:
        page.lacks(
            "difficulty bands over time",
            "the run drew random negatives only: it had no paths.difficulty_metadata_path",
        )


def _add_embeddings(page: _Page, config: Config, checkpoint: Path, split: str) -> None:
    group = f"Embeddings of the {split} split"
    try:
        head, epoch = inputs.load_head(config, checkpoint)
        store = open_store(
            inputs.parquet_path(config, split), config.cache_dir, dim=head.input_layer.in_features
        )
        logger.info("measuring %s: %s images", store.source, f"{len(store.by_building):,}")
        seen = measure.look(
            store,
            head,
            seed=config.global_.seed,
            device=config.training.device,
            precision=config.training.precision,
        )
    except TripletkitError as error:
        why = error.message + (f" ({error.hint})" if error.hint else "")
        page.lacks(f"ranks, distances, maps and confused pairs of the {split} split", why)
        return
    said = f"{checkpoint.name}, epoch {epoch}; " if epoch is not None else f"{checkpoint.name}; "
    page.facts["embeddings"] = f"{split}, {said}{space.what_was_sampled(seen)}"
    page.add(group, [*space.space_panels(seen), *_maps(page, seen.points, config.global_.seed)])
    page.add("Mistakes", space.mistake_panels(seen))


def _maps(page: _Page, points: maps.Points, seed: int) -> list[Panel]:
    grey = int((points.shown < 0).sum())
    said = (
        f"{len(points.names)} buildings in colour, drawn from those with the most images, and "
        f"{grey:,} other images in grey. Each dot is an image; buildings are told apart where "
        "dots of one colour lie together and alone."
    )
    panels = [
        space.map_panel(
            points,
            maps.pca(points),
            "PCA",
            f"{said} The plane is the one in which the coloured images spread most.",
        )
    ]
    if maps.umap_installed():
        logger.info("UMAP of %s images", f"{len(points.places):,}")
        text = f"{said} UMAP keeps neighbours together; distances between groups mean little."
        panels.append(space.map_panel(points, maps.umap(points, seed), "UMAP", text))
    else:
        page.lacks("a map by UMAP", "it needs umap-learn: pip install 'tripletkit[umap]'")
    return panels


def run_facts(
    config: Config, paths: RunPaths, history: History, checkpoint: Checkpoint | None
) -> dict[str, str]:
    """What a reader asks first, in that order."""
    training, model = config.training, config.training_model
    facts = {"folder": str(paths.root), "state": _state(config, paths, history)}
    if best := history.best:
        facts["best"] = f"{history.monitor} {best[history.monitor]:.4f} in epoch {best['epoch']}"
        if history.monitor in history.raw:
            facts["best"] += f"; raw {history.raw[history.monitor]:.4f}"
    if origin := _json(paths.origin):
        facts["parameters of"] = str(origin.get("name") or f"trial {origin.get('number')}")
    facts["head"] = (
        f"{model.num_hidden_layers} hidden layer{'s' * (model.num_hidden_layers > 1)} of "
        f"{model.hidden_dim}, output {model.output_dim}, {model.activation}, "
        f"dropout {model.dropout:g}, start {training.init}"
    )
    if checkpoint is not None:
        weights = checkpoint["model_state_dict"]
        count = sum(weight.numel() for weight in weights.values())
        facts["head"] += f"; {count:,} parameters"
        if "input_layer.weight" in weights:
            facts["head"] += f", input {weights['input_layer.weight'].shape[1]:,}"
    facts["training"] = (
        f"{training.num_epochs} epochs, batches of {training.batch_size}, learning rate "
        f"{training.learning_rate:g}, weight decay {training.weight_decay:g}, margin "
        f"{training.margin:g} ({training.loss_distance}), seed {config.global_.seed}"
    )
    facts["negatives"] = training.negative_sampler
    if training.negative_sampler == "ucb":
        facts["negatives"] += f", reward {training.ucb_reward}, discount {training.ucb_discount:g}"
    if history.banded:
        facts["negatives"] += f"; {history.bands} bands and random"
    facts.update(_data(config, paths))
    facts.update(_origin(paths))
    return facts


def _data(config: Config, paths: RunPaths) -> dict[str, str]:
    """The files of each split, and what the run's provenance says is in them."""
    facts = {}
    known = (provenance.read(paths.root) or {}).get("data") or {}
    for name in ("train", "val", "test"):
        if path := getattr(config.paths, f"{name}_parquet_path"):
            facts[f"{name} data"] = str(path)
            if about := known.get(KNOWN_AS.get(name, "")):
                facts[f"{name} data"] += (
                    f": {about['rows']:,} images of {about['buildings']:,} buildings, "
                    f"fingerprint {about['fingerprint']}"
                )
    return facts


def _state(config: Config, paths: RunPaths, history: History) -> str:
    last = history.records[-1]["epoch"] if history.records else 0
    if paths.final.exists():
        return f"finished after epoch {last}"
    return f"epoch {last} of {config.training.num_epochs} so far"


def _origin(paths: RunPaths) -> dict[str, str]:
    """Where the run took place, and with which code, as far as its provenance says."""
    start = provenance.newest(provenance.read(paths.root))
    facts = {}
    codes = [(name, code) for name, code in (start.get("code") or {}).items() if code]
    if said := [
        f"{name} {code['commit'][:12]}{' with changes' if code.get('diff') else ''}"
        for name, code in codes
        if code.get("commit")
    ]:
        facts["code"] = ", ".join(said)
    machine = start.get("machine") or {}
    gpus = Counter(gpu["name"] for gpu in machine.get("gpus") or ())
    parts: list[Any] = [f"{count} x {name}" for name, count in gpus.items()]
    parts = parts or [machine.get("cpu")]
    if job := (start.get("slurm") or {}).get("job"):
        parts.append(f"Slurm job {job}")
    parts = [start.get("host"), *parts]
    if any(parts):
        facts["machine"] = ", ".join(str(part) for part in parts if part)
    return facts


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = fsio.parse_json(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
