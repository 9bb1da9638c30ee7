"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tripletkit import fsio, provenance
from tripletkit.config import Logging
from tripletkit.errors import ConfigError, DataError, RunError
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
        """Write one record and sync it; returns the size of the file. Raises RunError."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"{self._file.name}: cannot be written: {error.strerror or error}",
                hint="make room; the same command goes on from the newest checkpoint",
            ) from None
        return self._file.tell()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # all that counts is synced
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none where there is no file.

    A last line that is being written, or that a kill has torn, is left out: the run writes it
    again. Raises DataError if another one is not a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = fsio.parse_json(line)
        except ValueError:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not JSON") from None
            break
        if not _is_record(record):
            raise DataError(f"{path}, line {number}: not a record of metrics")
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
        return False
    raw = record.get("raw", {})
    if not isinstance(raw, dict):
        return False
    numbers = [value for name, value in record.items() if name not in ("raw", "bands")]
    return all(each is None or isinstance(each, int | float) for each in (*numbers, *raw.values()))


@contextlib.contextmanager
def open_trackers(
    section: Logging, paths: RunPaths, config: Mapping[str, Any]
) -> Iterator[list[Tracker]]:
    """The optional trackers that the configuration asks for, closed at the end.

    From here on they do not raise: one that fails is dropped, with a warning.
    Raises ConfigError if one is not installed, and RunError if W&B does not let us in.
    """
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        if section.tensorboard:
            trackers.append(stack.enter_context(_tensorboard(paths)))
        if section.wandb_enabled:
            trackers.append(stack.enter_context(_wandb(section, paths, config)))
        yield trackers


class _Expendable:
    """A tracker that training goes on without as soon as it raises anything."""

    def __init__(
        self,
        name: str,
        log: Tracker,
        finish: Callable[[int], object],
        abandon: Callable[[], object] = lambda: None,
    ) -> None:
        """`finish(exit_code)` ends it well; `abandon()` clears away what is left of it."""
        self._name = name
        self._log = log
        self._finish = finish
        self._abandon = abandon
        self._lost = False

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._attempt(lambda: self._log(epoch, metrics))

    def __enter__(self) -> _Expendable:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._attempt(lambda: self._finish(0 if kind is None else 1))

    def _attempt(self, call: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever it is, no run is worth it
            self._lost = True
            logger.warning(
                "%s lost: %s; training goes on without it",
                self._name, str(error) or type(error).__name__,
            )  # fmt: skip
            with contextlib.suppress(Exception):
                self._abandon()


def _tensorboard(paths: RunPaths) -> _Expendable:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard is on but tensorboard is not installed",
            hint="pip install 'tripletkit[tensorboard]'",
        ) from None
    writer = SummaryWriter(str(paths.tensorboard))

    def log(epoch: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return _Expendable("TensorBoard", log, lambda _: writer.close())


def _wandb(section: Logging, paths: RunPaths, config: Mapping[str, Any]) -> _Expendable:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "logging.wandb_enabled is on but wandb is not installed",
            hint="pip install 'tripletkit[wandb]'",
        ) from None
    entity, _, project = section.wandb_project.rpartition("/")
    words = sys.argv
    sys.argv = provenance.without_secrets(words)  # the client sends what it finds there
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
    except Exception as error:  # no ConfigError, which would count as the fault of a trial
        raise RunError(
            f"Weights & Biases cannot be used: {str(error) or type(error).__name__}",
            hint="`wandb login` if it is the key; --set logging.wandb_mode=offline writes to disk "
            "for a later `wandb sync`; --set logging.wandb_enabled=false does without",
        ) from error
    finally:
        sys.argv = words
    return _Expendable(
        "W&B",
        lambda epoch, metrics: run.log({"epoch": epoch, **metrics}),
        lambda exit_code: run.finish(exit_code=exit_code),
        wandb.teardown,  # else the next run in this process would talk to the service that is gone
    )
