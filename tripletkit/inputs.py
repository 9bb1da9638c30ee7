"""Opening what a configuration names: embeddings, bands, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tripletkit import config as configuration
from tripletkit.config import Config, TrainingModel
from tripletkit.errors import ConfigError, DataError
from tripletkit.log import logger
from tripletkit.paths import TrialPaths, run_paths
from tripletkit.tune import attempts

if TYPE_CHECKING:
    from tripletkit.data.store import Store
    from tripletkit.train.assembly import Data
    from tripletkit.train.checkpoint import Checkpoint
    from tripletkit.train.head import Head


def check_files(config: Config) -> None:
    """That the files a training reads are there, before jobs wait in a queue for them."""
    from tripletkit.data.parquet import find_files, open_table

    for split in ("train", "val"):
        if getattr(config.paths, f"{split}_parquet_path") is not None or split == "train":
            open_table(find_files(parquet_path(config, split)), ["building_id", "embedding"])
    metadata = config.paths.difficulty_metadata_path
    if metadata is not None and not metadata.exists():
        raise _no_metadata(metadata)


def open_head(config: Config, split: str, checkpoint: Path) -> tuple[Store, Head, int | None]:
    """The embeddings of a split, the head of a checkpoint to go with them, and its epoch."""
    from tripletkit.data.store import open_store

    head, epoch = load_head(config, checkpoint)
    dim = head.input_layer.in_features
    return open_store(parquet_path(config, split), config.cache_dir, dim=dim), head, epoch


def load_head(config: Config, checkpoint: Path, dim: int | None = None) -> tuple[Head, int | None]:
    """The head of a checkpoint, on the CPU and in eval mode, and its epoch if known.

    `dim` is the width of the embeddings it has to take. Raises DataError if the file is no good
    checkpoint, or its weights do not fit.
    """
    from tripletkit.train import checkpoint as checkpoints

    state = checkpoints.load(checkpoint)
    with checkpoints.understood(checkpoint):
        return head_of(state, head_section(config, state), checkpoint, dim), state.get("epoch")


def head_section(config: Config, state: Checkpoint) -> TrainingModel:
    """What the head of a loaded checkpoint was built as, with its `input_dim` where known."""
    section = config.training_model
    if "progress" in state:  # ours: what it was trained as counts, not what the file says today
        section = TrainingModel(**state["config"]["training_model"])
    if section.input_dim is None and "input_layer.weight" in state["model_state_dict"]:
        width = state["model_state_dict"]["input_layer.weight"].shape[-1]
        section = section.model_copy(update={"input_dim": width})
    return section


def head_of(
    state: Checkpoint, section: TrainingModel, checkpoint: Path, dim: int | None = None
) -> Head:
    """The head of a loaded checkpoint; `checkpoint` and `dim` as in `load_head`."""
    import torch

    from tripletkit.train.head import Head, check_weights, load_weights

    width = section.input_dim or dim or 1  # without a width there are no weights
    with torch.device("meta"):  # in no memory: the file may tell of any head
        check_weights(Head(section, width), state["model_state_dict"], checkpoint)
    head = Head(section, width)
    load_weights(head, state["model_state_dict"], checkpoint)
    if dim not in (None, section.input_dim):
        raise DataError(
            f"the head of {checkpoint} takes vectors of {section.input_dim} numbers, not {dim}",
            hint="give it the embeddings of the model that it was trained on",
        )
    return head.eval()


def best_checkpoint(config: Config) -> Path:
    """The one to use of a finished run, or of one on its way."""
    paths = run_paths(config.checkpoint_dir)
    for path in (paths.best, paths.final):
        if path.exists():
            return path
    raise DataError(
        f"{paths.checkpoints} holds neither {paths.best.name} nor {paths.final.name}",
        hint="train first, or name one with --checkpoint",
    )


def warn_if_unfinished(checkpoint: Path, epoch: int | None) -> None:
    """Say so if a checkpoint is the best so far of a run that has epochs to come."""
    run = run_paths(checkpoint.absolute().parent)
    over = run.final.exists() and not run.last.exists()
    # A trial that ended may have been pruned, or keep nothing but its best.
    attempt = attempts.read(TrialPaths(run.root, run.root).attempts)[-1:]
    over |= any(each.get("outcome") in ("complete", "pruned", "failed") for each in attempt)
    if checkpoint.name != run.best.name or epoch is None or over or not run.config.exists():
        return
    try:
        epochs = configuration.load(run.config, environ={}).training.num_epochs
    except ConfigError:  # of another version
        return
    logger.warning(
        "%s is of epoch %d of %d: its run is not over, and a later epoch may be better",
        checkpoint, epoch, epochs,
    )  # fmt: skip


def training_data(config: Config) -> Data:
    """Open, check and subsample what `train` needs."""
    from tripletkit.data.bands import open_bands
    from tripletkit.data.store import check_leakage, open_store, subsample
    from tripletkit.train.assembly import Data

    section, seed = config.training, config.global_.seed
    full = open_store(
        parquet_path(config, "train"), config.cache_dir, dim=config.training_model.input_dim
    )
    train = subsample(
        full, fraction=section.sample_fraction, buildings=section.sample_buildings, seed=seed
    )
    val = None
    if config.paths.val_parquet_path is not None:
        full_val = open_store(
            config.paths.val_parquet_path, config.cache_dir, dim=full.embeddings.shape[1]
        )
        check_leakage({"train": full, "val": full_val})
        val = subsample(
            full_val,
            fraction=section.val_sample_fraction,
            buildings=section.val_sample_buildings,
            seed=seed,
        )
    metadata = config.paths.difficulty_metadata_path
    if metadata is None:
        return Data(train, val=val)
    if not metadata.exists():
        raise _no_metadata(metadata)
    bands = open_bands(metadata, train, config.cache_dir)
    val_bands = None
    if val is not None:
        try:
            val_bands = open_bands(metadata, val, config.cache_dir)
        except DataError:
            logger.info(
                "%s does not cover the validation images: their negatives are random", metadata
            )
    return Data(train, bands, val, val_bands)


def remembering(load: Callable[[Config], Data]) -> Callable[[Config], Data]:
    """`load`, but trials that use the same data share one copy."""
    last: list[tuple[str, Data]] = []

    def remembered(config: Config) -> Data:
        samples = {k: v for k, v in config.training.model_dump().items() if "sample_" in k}
        key = repr((config.global_.seed, config.paths.model_dump(exclude={"checkpoint_dir"})))
        key += repr((samples, config.training_model.input_dim))
        if not last or last[0][0] != key:
            last[:] = [(key, load(config))]
        return last[0][1]

    return remembered


def parquet_path(config: Config, split: str) -> Path:
    """The configured file of a split. Raises ConfigError if there is none."""
    path: Path | None = getattr(config.paths, f"{split}_parquet_path")
    if path is None:
        raise missing(split)
    return path


def _no_metadata(path: Path) -> DataError:
    return DataError(
        f"{path}: no such file", hint="`tripletkit data bands` builds the difficulty bands"
    )


def missing(split: str) -> ConfigError:
    """The error of a split that is not configured."""
    return ConfigError(
        f"paths.{split}_parquet_path is not set",
        hint=f"set it in config.toml, as TRIPLET_TRAINING_{split.upper()}_PARQUET_PATH or with "
        f"--set paths.{split}_parquet_path=FILE",
    )
