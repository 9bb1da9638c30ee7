"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tripletkit import fsio
from tripletkit.config import Logging
from tripletkit.errors import ConfigError
from tripletkit.log import logger
from tripletkit.paths import RunPaths

# (epoch, flat metrics) -> None
Tracker = Callable[[int, Mapping[str, float]], None]


class MetricsFile:
    """metrics.jsonl: one record per line, nothing in it that differs between equal runs."""

    def __init__(self, path: Path, size: int) -> None:
        """Continue at byte `size`, dropping what a killed process wrote behind its checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if (found := self._file.tell()) < size:
            logger.warning("%s has lost its first records: going on without them", path)
        self._file.truncate(min(size, found))

    def append(self, record: Mapping[str, Any]) -> int:
        """Write one record and sync it; returns the size of the file."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextlib.contextmanager
def open_trackers(
    section: Logging, paths: RunPaths, config: Mapping[str, Any]
) -> Iterator[list[Tracker]]:
    """The optional trackers that the configuration asks for, closed at the end."""
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        if section.tensorboard:
            trackers.append(stack.enter_context(_tensorboard(paths)))
        if section.wandb_enabled:
            trackers.append(stack.enter_context(_wandb(section, paths, config)))
        yield trackers


@contextlib.contextmanager
def _tensorboard(paths: RunPaths) -> Iterator[Tracker]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard is on but tensorboard is not installed",
            hint="pip install 'tripletkit[tensorboard]'",
        ) from None
    with SummaryWriter(str(paths.tensorboard)) as writer:

        def track(epoch: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

        yield track


@contextlib.contextmanager
def _wandb(section: Logging, paths: RunPaths, config: Mapping[str, Any]) -> Iterator[Tracker]:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "logging.wandb_enabled is on but wandb is not installed",
            hint="pip install 'tripletkit[wandb]'",
        ) from None
    entity, _, project = section.wandb_project.rpartition("/")
    try:
        run = wandb.init(
            entity=entity or None,
            project=project,
            name=section.wandb_run_name,
            mode=section.wandb_mode,
            dir=str(paths.root),
            config=dict(config),
            id=fsio.digest([str(paths.root.absolute())]),  # a continued run stays one run
            resume="allow" if section.wandb_mode == "online" else None,
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"Weights & Biases: {error}",
            hint='log in with `wandb login`, or set logging.wandb_mode = "offline"',
        ) from None
    try:
        yield lambda epoch, metrics: run.log({"epoch": epoch, **metrics})
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
