"""The only place that knows the names of the files in a run folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The files of one training run. `checkpoints` may be `root` itself."""

    root: Path
    checkpoints: Path

    @property
    def config(self) -> Path:
        """The effective configuration."""
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object per validated epoch; no wall-clock times, so that runs compare."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the run said."""
        return self.root / "train.log"

    @property
    def lock(self) -> Path:
        """Held while a process trains in this folder."""
        return self.root / ".lock"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.root / "tensorboard"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation so far."""
        return self.checkpoints / "checkpoint_best.pt"

    @property
    def last(self) -> Path:
        """The newest state, also from within an epoch; gone once `final` is there."""
        return self.checkpoints / "checkpoint_last.pt"

    @property
    def final(self) -> Path:
        """The state after the last epoch."""
        return self.checkpoints / "checkpoint_final.pt"

    def epoch(self, number: int) -> Path:
        """The state after epoch `number`, counted from 1."""
        return self.checkpoints / f"checkpoint_epoch_{number}.pt"

    def saved(self) -> list[Path]:
        """Every checkpoint in the folder, whatever its state."""
        name = re.compile(r"checkpoint_(epoch_\d+|best|last|final)\.pt")
        return sorted(p for p in self.checkpoints.glob("checkpoint_*.pt") if name.fullmatch(p.name))


def run_paths(checkpoint_dir: Path) -> RunPaths:
    """The layout of `tripletkit train`: everything in one folder."""
    return RunPaths(root=checkpoint_dir, checkpoints=checkpoint_dir)
