"""What an output of `embed` is made of, and whether one that is there, or was begun, is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
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
from tripletkit.errors import DataError
from tripletkit.train.head import Head

FORMAT = 1
RECIPE = "recipe.json"

# What makes an output, or the beginning of one, another one; and what the user calls it.
IDENTITY = {
    "format": "tripletkit",
    "weights": "checkpoint",
    "dtype": "--dtype",
    "per_building": "--per-building",
    "columns": "--columns",
    "source_fingerprint": "source",
    "precision": "training.precision",
    "block_bytes": "tripletkit",
}
# What is said of the former one.
SHOWN = {
    "weights": "checkpoint", "dtype": "dtype", "columns": "columns", "precision": "precision",
    "source_fingerprint": "sources",
}  # fmt: skip
# How it was computed: not to be mixed in one file, but no reason to make a finished one again.
OF_WORK = ("precision", "block_bytes")


@dataclass(frozen=True)
class Request:
    """What to make of what."""

    source: Path
    destination: Path
    checkpoint: Path
    columns: tuple[str, ...] = ()  # beside ids and building; ("all",) is every one
    dtype: str = "float32"
    per_building: bool = False
    force: bool = False  # replace what was made otherwise


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
        """What is done of it."""
        return self.path.with_name(f".{self.path.name}.embed")


class Job:
    """A request with its head loaded; onto `device`, or that of the configuration."""

    def __init__(self, config: Config, request: Request, device: str | None = None) -> None:
        self.request = request
        head, self.epoch = inputs.load_head(config, request.checkpoint)
        home = choose_device(device or config.training.device)
        make_deterministic(home)
        self.weights = _weights_key(head)
        self.projector = Projector(
            head=head.to(home),
            device=home,
            precision=choose_precision(config.training.precision, home),
            dtype=np.dtype("float32" if request.per_building else request.dtype),
            origin=str(request.checkpoint),
        )
        self.precision = str(self.projector.precision).removeprefix("torch.")
        self.fingerprints: dict[tuple[Path, ...], str] = {}

    @property
    def needed(self) -> list[str]:
        """Columns that every source must have."""
        return [EMBEDDING, *([BUILDING] if self.request.per_building else [])]

    def fingerprint(self, *sources: Path) -> str:
        """Of the content of files, which is read once."""
        if sources not in self.fingerprints:
            self.fingerprints[sources] = parquet.fingerprint(sources)
        return self.fingerprints[sources]

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

    def recipe(self, source: Path) -> dict[str, Any]:
        """What the vectors of a source are made of."""
        return {
            "format": FORMAT,
            "weights": self.weights,
            "precision": self.precision,
            "dtype": str(self.projector.dtype),
            "block_bytes": projection.BLOCK_BYTES,
            "source_fingerprint": self.fingerprint(source),
        }

    def finished(self, output: Output) -> bool:
        """Whether an output is there. Raises DataError if it was made of something else."""
        if not output.path.exists():
            return False
        found = files.provenance_of(output.path)
        other = [] if found is None else _differences(found, self.provenance(output), but=OF_WORK)
        if found is not None and not other:
            return True
        if self.request.force:
            return False
        why = f"was made with {' and '.join(other)}" if other else f"is not from `{files.MADE_BY}`"
        raise DataError(
            f"{output.path} exists, and {why}", hint="--force replaces it; or choose another name"
        )

    def folder(self, output: Output, source: Path) -> Path:
        """Where the vectors of a source of an output are kept."""
        many = len(output.sources) > 1
        return output.work / (self.fingerprint(source) if many else "rows")

    def begin(self, output: Output, source: Path) -> Path:
        """That folder, made, or left as a former process left it. Call it under the lock.

        Raises DataError if that was at something else.
        """
        folder, recipe = self.folder(output, source), self.recipe(source)
        if _begun(folder) != recipe:
            self.check_begun(output, source)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            fsio.write_json(folder / RECIPE, recipe)
        return folder

    def check_begun(self, output: Output, source: Path, but: Sequence[str] = ()) -> None:
        """Raise DataError if an output was begun of something else, and that is not to be dropped."""
        found = _begun(self.folder(output, source))
        if found is None or self.request.force:
            return
        if other := _differences(found, self.recipe(source), but):
            raise DataError(
                f"{output.path} was begun with {' and '.join(other)}", hint="--force begins anew"
            )


def _begun(folder: Path) -> dict[str, Any] | None:
    try:
        recipe: dict[str, Any] = json.loads((folder / RECIPE).read_text())
    except FileNotFoundError:
        return None
    return recipe


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], but: Sequence[str] = ()
) -> list[str]:
    """In which of the things that make it another one, `found` is not what is wanted."""
    said = []
    for key, name in IDENTITY.items():
        if key in wanted and key not in but and found.get(key) != wanted[key]:
            value = found.get(SHOWN.get(key, ""))
            value = ", ".join(value) if isinstance(value, list) else value
            said.append(f"another {name}" + (f" ({value})" if value else ""))
    return said


def _weights_key(head: Head) -> str:
    """A key of what a head computes, whatever file it came from."""
    parts: list[bytes | str] = [getattr(head.activation, "__name__", "")]
    for name, tensor in sorted(head.state_dict().items()):
        parts += [name, str(tuple(tensor.shape)), tensor.float().numpy().tobytes()]
    return fsio.digest(parts)
