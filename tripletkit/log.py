"""One logging set-up: rich on a terminal, plain lines in a job log, and a file if asked."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from rich.console import Console

logger = logging.getLogger("tripletkit")

# Results go to stdout, everything else to stderr, so that output can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def setup(log_file: Path | None = None, *, verbose: bool = False) -> None:
    """Send log records to stderr and, if given, append them to `log_file`. Safe to call again."""
    from rich.logging import RichHandler

    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handler: logging.Handler
    if err.is_terminal:
        handler = RichHandler(console=err, show_path=False, markup=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter(_prefix() + "%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_plain())
    logger.addHandler(handler)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(log_file)
        to_file.setFormatter(_plain())
        logger.addHandler(to_file)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def _plain() -> logging.Formatter:
    return logging.Formatter(
        "%(asctime)s %(levelname)s " + _prefix() + "%(message)s", "%Y-%m-%d %H:%M:%S"
    )


def _prefix() -> str:
    """`[job 12_3 rank 1] `, from what Slurm and torchrun put into the environment."""
    env = os.environ
    job = env.get("SLURM_ARRAY_JOB_ID", env.get("SLURM_JOB_ID"))
    parts = []
    if job:
        task = env.get("SLURM_ARRAY_TASK_ID")
        parts.append(f"job {job}_{task}" if task else f"job {job}")
    if int(env.get("WORLD_SIZE", "1")) > 1:
        parts.append(f"rank {env.get('RANK', '0')}")
    return f"[{' '.join(parts)}] " if parts else ""
