"""attempts.jsonl of a trial: which jobs worked on it, and how each attempt ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tripletkit import fsio
from tripletkit.log import logger


def read(path: Path) -> list[dict[str, Any]]:
    """Every attempt, oldest first. One without `outcome` was killed, or is going on.

    A line that cannot be read, as after a full disk, does not count.
    """
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s, line %d is no JSON: left out", path, number)
    return found


def begin(
    path: Path,
    mark: Mapping[str, Any],
    *,
    from_epoch: int,
    from_step: int = 0,
    facts: Mapping[str, float] | None = None,
) -> None:
    """Note that an attempt starts; `mark` says whose it is, `from_step` what is on file.

    `facts`: what it holds of its job (`gpus`, `share`), and when the one before it last gave a sign
    of life (`seen`) and saved its state (`saved`), in Unix seconds. See tune/cost.py.
    """
    places = {"from_epoch": from_epoch, "from_step": from_step}
    _write(path, [*read(path), {**mark, "started": fsio.timestamp(), **places, **(facts or {})}])


def end(
    path: Path,
    outcome: str,
    *,
    cause: str | None = None,
    message: str | None = None,
    at: float | None = None,
) -> None:
    """Note how the newest attempt ended, now or `at` these Unix seconds."""
    *before, last = read(path)
    last |= {"ended": fsio.timestamp(at), "outcome": outcome}
    if cause:
        last |= {"cause": cause, "message": message}
    _write(path, [*before, last])


def killed_in_a_row(path: Path) -> int:
    """How many attempts in a row were killed without getting further: an epoch, or a checkpoint."""
    count = 0
    following: tuple[int, int] | None = None
    for attempt in reversed(read(path)):
        place = (attempt["from_epoch"], attempt.get("from_step", 0))
        if "outcome" in attempt or following not in (None, place):
            break
        following = place
        count += 1
    return count


def _write(path: Path, attempts: list[dict[str, Any]]) -> None:
    fsio.write_text(path, "".join(json.dumps(attempt) + "\n" for attempt in attempts))
