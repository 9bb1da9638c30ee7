"""Where a run is, and its way into a checkpoint and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from tripletkit.config import Config
from tripletkit.data.bands import Bands
from tripletkit.data.store import Store
from tripletkit.errors import ConfigError, DataError, RunError
from tripletkit.log import logger
from tripletkit.paths import RunPaths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.assembly import Pieces
from tripletkit.train.checkpoint import Checkpoint
from tripletkit.train.head import load_weights
from tripletkit.train.step import DeviceStep

# Keys of [training] that may change between a run and its continuation without a word.
HARMLESS = {
    "best_training_metric_name",
    "best_training_trial_name_pattern",
    "checkpoint_every_minutes",
    "device",
    "num_epochs",
    "placement",
    "resume_from_checkpoint",
    "save_every_n_epochs",
}


@dataclass
class Progress:
    """Where a run is and what it has found; plain values, saved as they are."""

    epoch: int = 0  # completed
    place: int = 0  # anchors of the current epoch that are done
    global_step: int = 0
    evaluated_start: bool = False
    finished: bool = False
    early_stopped: bool = False
    waited: int = 0  # validations since the best one
    best_value: float | None = None
    best_epoch: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_val_loss: float | None = None
    best_val_epoch: int | None = None
    train_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    raw: dict[str, float] = field(default_factory=dict)
    metrics_bytes: int = 0  # length of metrics.jsonl


def find(config: Config, paths: RunPaths) -> tuple[Path, Checkpoint] | None:
    """The checkpoint to go on from, as `resume_from_checkpoint` wants it."""
    wanted, saved = config.training.resume_from_checkpoint, paths.saved()
    if wanted == "none" and saved:
        raise ConfigError(
            f"{paths.checkpoints} holds checkpoints of an earlier run ({saved[0].name}, ...) "
            'and resume_from_checkpoint is "none"',
            hint='delete them, choose another paths.checkpoint_dir, or resume with "auto"',
        )
    if saved:  # a named one starts a run; from then on the run's own count, also after a requeue
        return checkpoints.newest(saved)
    if wanted in ("auto", "none"):
        return None
    return Path(wanted), checkpoints.load(Path(wanted))


def move_in(progress: Progress) -> None:
    """Go on in another folder than the checkpoint's: its best and its metric log stay there."""
    progress.evaluated_start = progress.finished = progress.early_stopped = False
    progress.metrics_bytes = 0
    _forget_best(progress)


def _forget_best(progress: Progress) -> None:
    progress.best_value = progress.best_epoch = None
    progress.best_val_loss = progress.best_val_epoch = None
    progress.best_metrics = {}
    progress.waited = 0


def save(pieces: Pieces, progress: Progress, *paths: Path) -> None:
    """Write the whole state under each of the names.

    `metrics` and the first three entries are what earlier trainers wrote, and readers expect.
    """
    checkpoint = {
        "model_state_dict": _on_cpu(pieces.learner.head.state_dict()),
        "optimizer_state_dict": _on_cpu(pieces.learner.optimizer.state_dict()),
        "epoch": progress.epoch,
        "metrics": {
            "train_loss": progress.train_loss,
            "val_loss": progress.metrics.get("val_loss"),
            "best_val_loss": progress.best_val_loss,
            "best_val_epoch": progress.best_val_epoch,
            "epochs_completed": progress.epoch,
            "early_stopped": progress.early_stopped,
            "val_metrics": progress.metrics,
        },
        "global_step": progress.global_step,
        "finished": progress.finished,
        "progress": dataclasses.asdict(progress),
        "bandit": pieces.bandit.state_dict(),
        "step": pieces.step.state_dict(),
        "tally": pieces.learner.tally.cpu(),
        "config": {
            "seed": pieces.config.global_.seed,
            "training_model": pieces.model_section.model_dump(),
            "training": pieces.config.training.model_dump(),
        },
        "data": pieces.fingerprints,
    }
    try:
        checkpoints.save(checkpoint, *paths)
    except OSError as error:
        raise RunError(
            f"{paths[0]}: cannot be written: {error.strerror or error}",
            hint="make room or choose another paths.checkpoint_dir; the same command goes on from "
            "the newest checkpoint",
        ) from None


def restore(pieces: Pieces, path: Path, state: Checkpoint) -> Progress:
    """Take over the state of `path`; a checkpoint of another trainer gives its weights only.

    Raises DataError for one that does not fit, or is not what we write.
    """
    with checkpoints.understood(path):
        return _restore(pieces, path, state)


def _restore(pieces: Pieces, path: Path, state: Checkpoint) -> Progress:
    load_weights(pieces.learner.head, state["model_state_dict"], path)
    if "progress" not in state:
        logger.info("starting from the weights of %s, which another trainer wrote", path)
        return Progress()
    other = [name for name, key in pieces.fingerprints.items() if state["data"].get(name) != key]
    if other:
        raise DataError(
            f"{path} comes from a run with other data; these differ: {', '.join(other)}",
            hint="give the new data (or the new sample_* keys) its own paths.checkpoint_dir",
        )
    training, then = pieces.config.training, state["config"]
    if then["training_model"]["activation"] != pieces.model_section.activation:
        raise DataError(
            f"{path} was trained with the activation {then['training_model']['activation']!r}, "
            f"training_model.activation is {pieces.model_section.activation!r}",
            hint="make [training_model] what the checkpoint was trained with",
        )
    changed = _changes("training.", then["training"], training.model_dump())
    changed |= _changes(
        "training_model.", then["training_model"], pieces.model_section.model_dump()
    )
    changed |= _changes("global.", {"seed": then["seed"]}, {"seed": pieces.config.global_.seed})
    for key, (before, now) in changed.items():
        logger.warning("%s is now %s; %s had %s", key, now, path, before)
    optimizer = pieces.learner.optimizer
    # The settings of today count, and those of this device: the run may have moved to a GPU.
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.load_state_dict(state["optimizer_state_dict"])
    for group in optimizer.param_groups:
        group.update(settings)
    pieces.bandit.load_state_dict(state["bandit"])
    pieces.step.load_state_dict(state["step"])
    pieces.learner.tally.copy_(state["tally"])
    progress = TypeAdapter(Progress).validate_python(state["progress"])
    if min(progress.epoch, progress.place, progress.global_step, progress.metrics_bytes) < 0:
        raise ValueError("a place in the run is negative")
    if changed.keys() & {"training.monitor", "training.margin", "training.loss_distance"}:
        _forget_best(progress)  # its value does not compare with those to come
    progress.early_stopped = 0 < training.early_stopping_patience <= progress.waited
    if progress.epoch < training.num_epochs and not progress.early_stopped:
        progress.finished = False
    logger.info(
        "resuming from %s after %d epochs and %d anchors", path, progress.epoch, progress.place
    )
    return progress


def about_data(
    pieces: Pieces, train: Store, val: Store | None, bands: Bands | None
) -> dict[str, dict[str, Any]]:
    """What a run is made of, for people, under the names of the fingerprints."""
    facts: dict[str, dict[str, Any]] = {
        name: {
            "source": str(store.source),
            "content": store.fingerprint,
            "rows": len(store.by_building),
            "buildings": int((store.starts[1:] > store.starts[:-1]).sum()),
            "dim": store.embeddings.shape[1],
        }
        for name, store in (("training embeddings", train), ("validation embeddings", val))
        if store is not None
    }
    if bands is not None:
        source = pieces.config.paths.difficulty_metadata_path
        facts["difficulty bands"] = {"source": source and str(source), "bands": bands.count}
    return {
        name: {"fingerprint": pieces.fingerprints[name], **each} for name, each in facts.items()
    }


def about_trainer(
    pieces: Pieces, progress: Progress, paths: RunPaths, start: Path | None
) -> dict[str, Any]:
    """How this process computes, and from where it goes on; `start` is the checkpoint, if any."""
    learner = pieces.learner
    elsewhere = start is not None and start.parent.absolute() != paths.checkpoints.absolute()
    return {
        "device": str(learner.device),
        "precision": str(learner.precision).removeprefix("torch."),
        "placement": "device" if isinstance(pieces.step, DeviceStep) else "host",
        "threads": torch.get_num_threads(),
        "processes": learner.group.size,
        "from_step": progress.global_step,
        "from_checkpoint": str(start) if elsewhere else None,
    }


def _changes(prefix: str, then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys, apart from the harmless, that both have with different values: (then, now)."""
    return {
        prefix + key: (then[key], now[key])
        for key in sorted(then.keys() & now.keys() - HARMLESS)
        if then[key] != now[key]
    }


def _on_cpu(value: Any) -> Any:
    """Nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value
