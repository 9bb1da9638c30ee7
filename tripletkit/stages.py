"""What the commands and jobs do: plain functions from a configuration to an exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tripletkit import log
from tripletkit.config import Config
from tripletkit.errors import DONE, ConfigError, DataError, Interrupted
from tripletkit.log import logger
from tripletkit.paths import run_paths

if TYPE_CHECKING:
    from tripletkit.data.store import Store
    from tripletkit.train.head import Head
    from tripletkit.train.loop import Data

SPLITS = ("train", "val", "test")


def train(config: Config) -> int:
    """Train, or go on with, the run in `checkpoint_dir`; prints raw versus trained."""
    from tripletkit.cluster import preempt
    from tripletkit.train import loop

    paths = run_paths(config.checkpoint_dir)
    with preempt.watch() as stop_requested, log.also_to(paths.log, config.logging.log_file):
        result = loop.train(config, training_data(config), paths, should_stop=stop_requested)
    if result.status == "stopped":
        raise Interrupted(
            f"stopped in epoch {result.epochs + 1}; the state is in {paths.last}",
            hint="the same command goes on from there",
        )
    if result.best_epoch is not None:
        _print_metrics(
            f"validation, {config.checkpoint_dir}",
            {"raw": result.raw, f"head, epoch {result.best_epoch}": result.best_metrics},
        )
    log.out.print(f"checkpoints, metrics and log: {paths.root}", soft_wrap=True)
    return DONE


def evaluate(config: Config, *, split: str, checkpoint: Path | None, as_json: bool) -> int:
    """Print the retrieval metrics of one split, raw and through a checkpoint's head."""
    from tripletkit.train.device import choose_device, choose_precision
    from tripletkit.train.evaluation import Evaluation

    checkpoint = checkpoint or _best_checkpoint(config)
    store, head, epoch = open_head(config, split, checkpoint)
    device = choose_device(config.training.device)
    evaluation = Evaluation(
        store,
        None,
        config.training,
        seed=config.global_.seed,
        device=device,
        precision=choose_precision(config.training.precision, device),
    )
    results = {"raw": evaluation.raw(), "head": evaluation.of(head.to(device))}
    if as_json:
        report = {"split": split, "checkpoint": str(checkpoint), "epoch": epoch}
        log.out.print_json(json.dumps({**report, **results}))
    else:
        _print_metrics(f"{split}, {checkpoint}", results)
    return DONE


def open_head(config: Config, split: str, checkpoint: Path) -> tuple[Store, Head, int | None]:
    """The embeddings of a split, the head of a checkpoint to go with them, and its epoch."""
    from tripletkit.config import TrainingModel
    from tripletkit.data.store import open_store
    from tripletkit.train import checkpoint as checkpoints
    from tripletkit.train.head import Head, load_weights

    state = checkpoints.load(checkpoint)
    section = config.training_model
    if "progress" in state:  # ours: what it was trained as counts, not what the file says today
        section = TrainingModel(**state["config"]["training_model"])
    store = open_store(_parquet(config, split), config.cache_dir, dim=section.input_dim)
    head = Head(section, store.embeddings.shape[1])
    load_weights(head, state["model_state_dict"], checkpoint)
    return store, head, state.get("epoch")


def _best_checkpoint(config: Config) -> Path:
    paths = run_paths(config.checkpoint_dir)
    for path in (paths.best, paths.final):
        if path.exists():
            return path
    raise DataError(
        f"{paths.checkpoints} holds neither {paths.best.name} nor {paths.final.name}",
        hint="train first, or name one with --checkpoint",
    )


def check_data(config: Config) -> int:
    """Validate every configured file and print what is in it."""
    from rich.table import Table

    from tripletkit.data.bands import open_bands
    from tripletkit.data.store import check_leakage, describe, open_store

    configured = [s for s in SPLITS if getattr(config.paths, f"{s}_parquet_path")]
    if not configured:
        raise _missing("train")
    stores = {
        split: open_store(
            _parquet(config, split), config.cache_dir, dim=config.training_model.input_dim
        )
        for split in configured
    }
    described = {split: describe(store) for split, store in stores.items()}
    table = Table("", *described)
    for key in next(iter(described.values())):
        table.add_row(key, *(str(facts[key]) for facts in described.values()))
    log.out.print(table)
    widths = {store.embeddings.shape[1] for store in stores.values()}
    if len(widths) > 1:
        raise DataError(
            "the splits have embeddings of different widths: "
            + ", ".join(f"{k} {s.embeddings.shape[1]}" for k, s in stores.items())
        )
    check_leakage(stores)
    log.out.print("no building is in two splits")
    metadata = config.paths.difficulty_metadata_path
    if metadata is not None and not metadata.exists():
        log.out.print(f"no {metadata} yet: `tripletkit data bands` builds it", soft_wrap=True)
    elif metadata is not None and "train" in stores:
        bands = open_bands(metadata, stores["train"], config.cache_dir)
        cells = bands.offsets[1:] > bands.offsets[:-1]
        per_band = cells.reshape(-1, bands.count).mean(0)
        log.out.print(
            f"{bands.count} difficulty bands; anchors that have neighbours in them: "
            + ", ".join(f"{share:.0%}" for share in per_band)
        )
    return DONE


def build_bands(config: Config, *, neighbors: int, k0: int, force: bool) -> int:
    """Write `difficulty_metadata_path` from the training embeddings."""
    from tripletkit.data import bands
    from tripletkit.data.store import open_store
    from tripletkit.train.device import choose_device

    path = config.paths.difficulty_metadata_path
    if path is None:
        raise ConfigError(
            "paths.difficulty_metadata_path is not set", hint="it says where the bands are written"
        )
    if path.exists() and not force:
        raise DataError(f"{path} exists", hint="--force replaces it")
    device = choose_device(config.training.device)
    store = open_store(
        _parquet(config, "train"), config.cache_dir, dim=config.training_model.input_dim
    )
    bands.build_bands(store, path, neighbors=neighbors, k0=k0, device=device)
    log.out.print(f"wrote {path}", soft_wrap=True)
    return DONE


def split_data(source: Path, out: Path, *, fractions: Mapping[str, float], seed: int) -> int:
    """Split a parquet file by building into train, val and test files."""
    from tripletkit.data.split import split_parquet

    rows = split_parquet(source, out, fractions=fractions, seed=seed)
    for name, count in rows.items():
        log.out.print(f"{out / name}.parquet: {count:,} rows", soft_wrap=True)
    return DONE


def training_data(config: Config) -> Data:
    """Open, check and subsample what `train` needs."""
    from tripletkit.data.bands import open_bands
    from tripletkit.data.store import check_leakage, open_store, subsample
    from tripletkit.train.loop import Data

    section, seed = config.training, config.global_.seed
    full = open_store(
        _parquet(config, "train"), config.cache_dir, dim=config.training_model.input_dim
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
        raise DataError(
            f"{metadata}: no such file", hint="`tripletkit data bands` builds the difficulty bands"
        )
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


def _parquet(config: Config, split: str) -> Path:
    path: Path | None = getattr(config.paths, f"{split}_parquet_path")
    if path is None:
        raise _missing(split)
    return path


def _missing(split: str) -> ConfigError:
    return ConfigError(
        f"paths.{split}_parquet_path is not set",
        hint=f"set it in config.toml, as TRIPLET_TRAINING_{split.upper()}_PARQUET_PATH or with "
        f"--set paths.{split}_parquet_path=FILE",
    )


def _print_metrics(title: str, results: Mapping[str, Mapping[str, float]]) -> None:
    """A table of metrics, one column per result."""
    from rich.table import Table

    from tripletkit.train.evaluation import metric_names

    columns = list(results.values())
    log.out.print(title, soft_wrap=True)
    table = Table("metric", *results)
    for name in metric_names(columns[-1]):
        if all(name in column for column in columns):  # top_k may have changed since
            table.add_row(name, *(f"{column[name]:.4f}" for column in columns))
    table.add_row("queries", *(f"{int(column['queries']):,}" for column in columns))
    log.out.print(table)
