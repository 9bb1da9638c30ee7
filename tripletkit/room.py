"""Whether the disks have room for what a run is going to write, said before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tripletkit import inputs, processes
from tripletkit.cluster import resources
from tripletkit.config import Choice, Config, TrainingModel
from tripletkit.config.sections import Range
from tripletkit.errors import TripletkitError
from tripletkit.log import logger
from tripletkit.monitor.facts import size
from tripletkit.paths import study_paths

ROOM = 2**30  # bytes that should be free in any case
# Of a run beside its checkpoints: configuration, metrics, log, attempts, provenance, lock, folder.
FILES, BYTES = 7, 200_000
OF_A_TRIAL = {"all": 3, "best": 1}  # checkpoints: the best, the last epoch and the final one
IN_FLIGHT = 2  # checkpoint_last.pt, and one that is being written
STEPS = 3  # a weight and the two moments of AdamW
NARROWEST = 16  # as in train/head.py
CACHE_FILES = 9


class Need(NamedTuple):
    """What will be written below a folder that `key` of the configuration names."""

    key: str
    folder: Path
    bytes: int
    files: int
    what: str


def warn(config: Config, *, trials: int | None = None) -> None:
    """Warn if a disk has too little room for the training, or for so many trials of the study.

    Quotas count where the file system shows them as its size. What is wrong with the data, the run
    itself says better, and a trial what is with its head: the largest of a space may be no head.
    """
    if processes.follows():
        return
    try:
        for problem in problems(list(needs(config, trials))):
            logger.warning("%s", problem)
    except (TripletkitError, OSError, ArithmeticError, TypeError, ValueError) as error:
        logger.debug("nobody knows how much room is needed: %s", error)


def needs(config: Config, trials: int | None = None) -> Iterator[Need]:
    """Caches that are not there yet, and the checkpoints."""
    from tripletkit.data import parquet, store

    width = config.training_model.input_dim
    for split in ("train", "val"):
        if getattr(config.paths, f"{split}_parquet_path") is None:
            continue
        files = parquet.find_files(inputs.parquet_path(config, split))
        table = parquet.open_table(files, [parquet.EMBEDDING])
        width, _ = parquet.embedding_width(table, None)
        if not (config.cache_dir / store.content_key(files)).exists():
            what = f"the cache of {table.name}"
            count = table.total * (2 * width + 64)
            yield Need("paths.cache_dir", config.cache_dir, count, CACHE_FILES, what)
    if width is not None:
        yield _of_trials(config, width, trials) if trials is not None else _of_run(config, width)


def _of_run(config: Config, width: int) -> Need:
    section = config.training
    each = checkpoint_bytes(config.training_model, width)
    kept = section.num_epochs // section.save_every_n_epochs + 2  # the best and the final one
    return Need(
        "paths.checkpoint_dir",
        config.checkpoint_dir,
        (kept + IN_FLIGHT) * each + BYTES,
        kept + IN_FLIGHT + FILES,
        f"{kept} checkpoints of {size(each)}",
    )


def _of_trials(config: Config, width: int, trials: int) -> Need:
    tuning = config.tuning
    each = checkpoint_bytes(largest(config.training_model, tuning.space), width)
    kept = OF_A_TRIAL[tuning.keep_checkpoints]
    at_once = tuning.workers * resources.slots(config)
    going = min(trials, at_once) * (OF_A_TRIAL["all"] - kept + IN_FLIGHT)
    return Need(
        "tuning.output_dir",
        study_paths(config).root,
        (trials * kept + going) * each + trials * BYTES,
        trials * (kept + FILES) + going,
        f"{trials:,} trials with {kept} checkpoint{'s' if kept > 1 else ''} of up to {size(each)}",
    )


def checkpoint_bytes(section: TrainingModel, width: int) -> int:
    """About the size of a checkpoint of a head for vectors of `width` numbers."""
    return 4 * STEPS * parameters(section, width) + 50_000


def parameters(section: TrainingModel, width: int) -> int:
    """Of the head; by arithmetic, as nothing else here needs torch."""
    dims = [section.hidden_dim]
    for _ in range(1, section.num_hidden_layers):
        dims.append(max(NARROWEST, round(dims[-1] * section.hidden_dim_multiplier)))
    layers = [width, *dims, section.output_dim]
    pairs = list(pairwise(layers))
    if section.use_residual:
        pairs.append((width, section.output_dim))
    norms = 2 * sum(layers[1:]) if section.use_layer_norm else 0
    return sum((wide + 1) * narrow for wide, narrow in pairs) + norms


def largest(section: TrainingModel, space: Mapping[str, Range]) -> TrainingModel:
    """The head with the most of everything that the space allows."""
    most: dict[str, Any] = {}
    for key, range_ in space.items():
        if key in TrainingModel.model_fields:
            numbers = range_.choices if isinstance(range_, Choice) else [range_.high]
            if all(isinstance(each, int | float) for each in numbers):
                most[key] = max(numbers)
    return section.model_copy(update=most)


def problems(found: list[Need]) -> Iterator[str]:
    """Per disk, what does not fit on it."""
    disks: dict[int, list[Need]] = {}
    for need in found:
        disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for wanted in disks.values():
        there = _existing(wanted[-1].folder)
        disk = os.statvfs(there)
        free, files = disk.f_bavail * disk.f_frsize, disk.f_favail
        room = max(ROOM, sum(need.bytes for need in wanted))
        many = sum(need.files for need in wanted)
        keys = " and ".join(dict.fromkeys(need.key for need in wanted))
        what = ", ".join(need.what for need in wanted)
        if free < room:
            yield (
                f"{size(free)} are free on the disk of {there}, and {size(room)} may be needed "
                f"({what}): make room, or choose another disk with {keys}"
            )
        if disk.f_files and files < many:
            yield (
                f"{files:,} more files fit on the disk of {there}, and {many:,} may be needed "
                f"({what}): delete files that nobody needs, or choose another disk with {keys}"
            )


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())
