"""What an output of `embed` is made of, and whether one that is there is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tripletkit import __version__, fsio, inputs
from tripletkit.apply import outputs as files
from tripletkit.apply import projection
from tripletkit.apply.projection import Projector
from tripletkit.config import Config
from tripletkit.data import parquet
from tripletkit.data.parquet import BUILDING, EMBEDDING
from tripletkit.device import choose_device, choose_precision, make_deterministic
from tripletkit.errors import ConfigError, DataError
from tripletkit.train.head import Head

FORMAT = 1

# What makes an output another one; and what the user calls it. Not the precision: it depends on the
# machine, and is no reason to make a finished file again.
IDENTITY = {
    "format": "tripletkit",
    "weights": "checkpoint",
    "dtype": "--dtype",
    "per_building": "--per-building",
    "columns": "--columns",
    "source_fingerprint": "source",
}
# What is said of the former one.
SHOWN = {
    "weights": "checkpoint",
    "dtype": "dtype",
    "columns": "columns",
    "source_fingerprint": "sources",
}


@dataclass(frozen=True)
class Request:
    """What to make of what."""

    source: Path
    destination: Path
    checkpoint: Path
    columns: tuple[str, ...] = ()  # beside ids and building; ("all",) is every one
    dtype: str = "float32"
    per_building: bool = False
    force: bool = False  # replace what was made otherwise, or is older than its source
    weights: str = ""  # of the checkpoint when it was asked for, as `Job.weights`


@dataclass(frozen=True)
class Output:
    """A file to be made, of one source file or, per building, of all."""

    sources: tuple[Path, ...]
    path: Path

    @property
    def lock(self) -> Path:
        """Held by the process that makes it; the empty file stays."""
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def work(self) -> Path:
        """What is done of it, in a folder for each way to make it."""
        return self.path.with_name(f".{self.path.name}.embed")


class Job:
    """A request with its head loaded; onto `device`, or that of the configuration."""

    def __init__(self, config: Config, request: Request, device: str | None = None) -> None:
        self.request = request
        head, self.epoch = inputs.load_head(config, request.checkpoint)
        home = choose_device(device or config.training.device)
        make_deterministic(home)
        self.weights = _weights_key(head)
        if request.weights not in ("", self.weights):
            raise DataError(
                f"{request.checkpoint} was replaced since this was asked for",
                hint="ask again, with --checkpoint FILE of one that stays as it is",
            )
        self.projector = Projector(
            head=head.to(home),
            device=home,
            precision=choose_precision(config.training.precision, home),
            dtype=np.dtype("float32" if request.per_building else request.dtype),
            origin=str(request.checkpoint),
        )
        self.precision = str(self.projector.precision).removeprefix("torch.")
        self.fingerprints: dict[tuple[Path, ...], str] = {}
        self.states: dict[Path, tuple[int, ...]] = {}  # of sources, when first read

    @property
    def needed(self) -> list[str]:
        """Columns that every source must have."""
        return [EMBEDDING, *([BUILDING] if self.request.per_building else [])]

    def fingerprint(self, *sources: Path) -> str:
        """Of the content of files, which is read once."""
        if sources not in self.fingerprints:
            for source in sources:
                self.states.setdefault(source, _state(source))
            self.fingerprints[sources] = parquet.fingerprint(sources)
        return self.fingerprints[sources]

    def check_unchanged(self, *sources: Path) -> None:
        """Raise DataError if a source is not the file that it was when we began."""
        for source in sources:
            if _state(source) != self.states[source]:
                raise DataError(
                    f"{source} was changed while it was read",
                    hint="the same command begins with it anew",
                )

    def provenance(self, output: Output) -> dict[str, Any]:
        """What an output is made of; no times and no folders, so that equal work is equal bytes."""
        request, columns = self.request, set[str]()
        if not request.per_building:
            columns = set(files.carried(output.sources[0], request.columns)) - {*files.IDS}
        return {
            "made_by": files.MADE_BY,
            "version": __version__,
            "format": FORMAT,
            "checkpoint": "/".join(request.checkpoint.absolute().parts[-2:]),
            "epoch": self.epoch,
            "weights": self.weights,
            "precision": self.precision,
            "dtype": request.dtype,
            "columns": sorted(columns),
            "per_building": request.per_building,
            "sources": [source.name for source in output.sources],
            "source_fingerprint": self.fingerprint(*output.sources),
        }

    def finished(self, output: Output) -> bool:
        """Whether an output is there. Raises ConfigError if it was made of something else."""
        if not output.path.exists() or (self.request.force and self.outdated(output)):
            return False
        found = files.provenance_of(output.path)
        other = [] if found is None else _differences(found, self.provenance(output))
        if found is not None and not other:
            return True
        if self.request.force:
            return False
        why = f"was made with {' and '.join(other)}" if other else f"is not from `{files.MADE_BY}`"
        raise ConfigError(
            f"{output.path} exists, and {why}", hint="--force replaces it; or choose another name"
        )

    def outdated(self, output: Output) -> bool:
        """Whether a source is newer than an output that is there.

        The fingerprint is of samples of a source: it does not know of every small correction.
        """
        newest = max(source.stat().st_mtime_ns for source in output.sources)
        return newest > output.path.stat().st_mtime_ns

    def folder(self, output: Output, source: Path) -> Path:
        """Where the vectors of a source of an output are kept; another one for other vectors."""
        parts = (
            str(FORMAT), self.weights, self.precision, str(self.projector.dtype),
            str(projection.BLOCK_BYTES), str(projection.SEGMENT_BYTES),
            self.fingerprint(source), str(self.states[source]),
        )  # fmt: skip
        return output.work / fsio.digest(parts)


def _state(source: Path) -> tuple[int, ...]:
    """Changes when a file is written or replaced. Raises DataError if it is gone."""
    try:
        found = source.stat()
    except FileNotFoundError:
        raise DataError(f"{source}: no such file") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In which of the things that make it another one, `found` is not what is wanted."""
    said = []
    for key, name in IDENTITY.items():
        if key in wanted and found.get(key) != wanted[key]:
            if key == "weights" and found.get("checkpoint") == wanted["checkpoint"]:
                said.append(_state_of_checkpoint(found, wanted))
                continue
            value = found.get(SHOWN.get(key, ""))
            value = ", ".join(value) if isinstance(value, list) else value
            said.append(f"another {name}" + (f" ({value})" if value else ""))
    return said


def _state_of_checkpoint(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Of a checkpoint whose file was replaced since, by its run most likely."""
    then, now = found.get("epoch"), wanted["epoch"]
    if not (isinstance(then, int) and isinstance(now, int)):
        return f"another state of {found['checkpoint']}"
    which = "an earlier" if then < now else "another"
    return f"{which} state of {found['checkpoint']} (epoch {then}; it is now of epoch {now})"


def _weights_key(head: Head) -> str:
    """A key of what a head computes, whatever file it came from."""
    parts: list[bytes | str] = [getattr(head.activation, "__name__", "")]
    for name, tensor in sorted(head.state_dict().items()):
        parts += [name, str(tuple(tensor.shape)), tensor.float().numpy().tobytes()]
    return fsio.digest(parts)
