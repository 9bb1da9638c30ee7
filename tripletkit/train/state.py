"""All that a run is made of, and its way into a checkpoint and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tripletkit.config import Config, TrainingModel
from tripletkit.errors import ConfigError, DataError
from tripletkit.log import logger
from tripletkit.paths import RunPaths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train.bandit import Bandit
from tripletkit.train.checkpoint import Checkpoint
from tripletkit.train.evaluation import Evaluation
from tripletkit.train.head import load_weights
from tripletkit.train.step import DeviceStep, HostStep, Learner

# Keys of [training] that may change between a run and its continuation without a word.
HARMLESS = {
    "best_training_metric_name",
    "best_training_trial_name_pattern",
    "checkpoint_every_minutes",
    "device",
    "num_epochs",
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


@dataclass(frozen=True)
class Pieces:
    """The working parts of a run."""

    config: Config
    model_section: TrainingModel  # with the data's input_dim
    fingerprints: dict[str, str]
    bandit: Bandit
    learner: Learner
    step: DeviceStep | HostStep
    evaluation: Evaluation | None

    @property
    def anchors(self) -> int:
        """Anchors per epoch."""
        return len(self.step.index.anchors)


def find(config: Config, paths: RunPaths) -> tuple[Path, Checkpoint] | None:
    """The checkpoint to go on from, as `resume_from_checkpoint` wants it."""
    wanted, saved = config.training.resume_from_checkpoint, paths.saved()
    if wanted == "auto":
        return checkpoints.newest(saved)
    if wanted == "none":
        if saved:
            raise ConfigError(
                f"{paths.checkpoints} holds checkpoints of an earlier run ({saved[0].name}, ...) "
                'and resume_from_checkpoint is "none"',
                hint='delete them, choose another paths.checkpoint_dir, or resume with "auto"',
            )
        return None
    return Path(wanted), checkpoints.load(Path(wanted))


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
    checkpoints.save(checkpoint, *paths)


def restore(pieces: Pieces, path: Path, state: Checkpoint) -> Progress:
    """Take over the state of `path`; a checkpoint of another trainer gives its weights only."""
    load_weights(pieces.learner.head, state["model_state_dict"], path)
    if "progress" not in state:
        logger.info("starting from the weights of %s, which another trainer wrote", path)
        return Progress()
    if state["data"] != pieces.fingerprints:
        raise DataError(
            f"{path} was trained on other embeddings than train_parquet_path and the sample_* keys "
            "give now",
            hint="give the new data its own paths.checkpoint_dir",
        )
    training = pieces.config.training
    then, now = state["config"]["training"], training.model_dump()
    for key in sorted(now.keys() - HARMLESS):
        if then.get(key, now[key]) != now[key]:
            logger.warning("training.%s is now %s; %s had %s", key, now[key], path, then[key])
    optimizer = pieces.learner.optimizer
    # The settings of today count, and those of this device: the run may have moved to a GPU.
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.load_state_dict(state["optimizer_state_dict"])
    for group in optimizer.param_groups:
        group.update(settings)
    pieces.bandit.load_state_dict(state["bandit"])
    pieces.step.load_state_dict(state["step"])
    pieces.learner.tally.copy_(state["tally"])
    progress = Progress(**state["progress"])
    if progress.epoch < training.num_epochs and not progress.early_stopped:
        progress.finished = False
    logger.info(
        "resuming from %s after %d epochs and %d anchors", path, progress.epoch, progress.place
    )
    return progress


def _on_cpu(value: Any) -> Any:
    """Nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value
