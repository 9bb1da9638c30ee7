"""Checkpoints: whole or absent, loaded without running code, refused by name when unfit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tripletkit import fsio
from tripletkit.errors import DataError, is_out_of_memory
from tripletkit.log import logger

FORMAT = 1

Checkpoint = dict[str, Any]


class TornError(DataError):
    """A file under a checkpoint's name that is not a whole checkpoint."""


def save(checkpoint: Checkpoint, *paths: Path) -> None:
    """Write one state under several names, each atomically."""
    # Into memory first (megabytes): torch hides a full disk behind an error of its own.
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT, **checkpoint}, buffer)
    for path in paths:
        with fsio.atomic_write(path) as file:
            file.write(buffer.getbuffer())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises DataError for anything but a good one."""
    return load_with_sha256(path)[0]


def load_with_sha256(path: Path) -> tuple[Checkpoint, str]:
    """`load`, and the SHA-256 of the same bytes: a run may replace the file at any moment."""
    data = _read(path)
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if data.startswith(b"\0"):  # neither a pickle nor a zip: blocks that a power cut left empty
            raise _torn(path, "it begins with zeros") from None
        raise DataError(
            f"{path} holds more than tensors and plain values, or is no checkpoint at all",
            hint="it is not loaded, since that could run code",
        ) from None
    except Exception as error:  # noqa: BLE001 - what torn bytes make the reader raise is open
        if is_out_of_memory(error):  # it may be well
            raise DataError(
                f"{path} cannot be read: it asks for more memory than there is"
            ) from None
        raise _torn(path, _first_line(error)) from None
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise DataError(f"{path} has no model_state_dict: not a checkpoint of a projection head")
    version = checkpoint.get("format_version", 0)
    if not isinstance(version, int) or not isinstance(checkpoint.get("global_step", 0), int):
        raise _torn(path, "its version and step are no numbers")
    if version > FORMAT:
        raise DataError(
            f"{path} has format {version}, this tripletkit reads {FORMAT}",
            hint="upgrade tripletkit",
        )
    return checkpoint, hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no checkpoint {path}", hint=_offer(path.parent)) from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a checkpoint", hint=_offer(path)) from None
    except OSError as error:  # it may be well: a disk or a server is not
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Raise DataError when what is in a checkpoint is not of the kinds that we write."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        raise DataError(
            f"{path} holds something else than a checkpoint of ours does: "
            f"{type(error).__name__}: {_first_line(error)}",
            hint="it is damaged, or another program's: delete it, or name another one",
        ) from None


def _torn(path: Path, why: str) -> TornError:
    return TornError(
        f"{path} is torn or not a checkpoint: {why}",
        hint='delete it; resume_from_checkpoint = "auto" takes the newest good one',
    )


def is_torn(path: Path) -> bool:
    """Whether what is under a checkpoint's name is not whole; one that is unfit otherwise is."""
    try:
        load(path)
    except TornError:
        return True
    except DataError:
        return False
    return False


def newest(paths: Iterable[Path]) -> tuple[Path, Checkpoint] | None:
    """The good checkpoint that got furthest; torn ones are named and passed over.

    None if there are no paths at all; DataError if there are but none is good.
    """
    paths = list(paths)
    best: tuple[Path, Checkpoint] | None = None
    for path in paths:
        try:
            checkpoint = load(path)
        except TornError as error:
            logger.warning("%s", error.message)
            continue
        if best is None or _progress(checkpoint) > _progress(best[1]):
            best = path, checkpoint
    if paths and best is None:
        raise DataError(
            f"none of the {len(paths)} checkpoints in {paths[0].parent} can be used",
            hint="delete them to start over",
        )
    return best


def _offer(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.glob("checkpoint_*.pt"))
    return f"{folder} holds {', '.join(names)}" if names else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _progress(checkpoint: Checkpoint) -> tuple[int, bool]:
    return checkpoint.get("global_step", -1), bool(checkpoint.get("finished"))
