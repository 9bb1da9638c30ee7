"""attempts.jsonl of a trial: which jobs worked on it, and how each attempt ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tripletkit import fsio
from tripletkit.log import logger

# What other processes and versions wrote is used only if it is of these types.
NUMBERS = ("from_step", "restart", "attempt", "gpus", "share", "seen", "saved", "slot")
TEXTS = ("host", "outcome", "cause", "message")


def read(path: Path) -> list[dict[str, Any]]:
    """Every attempt, oldest first. One without `outcome` was killed, or is going on.

    A line that cannot be read, as after a full disk, does not count.
    """
    return [attempt for attempt in _lines(path) if attempt is not None]


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """The attempt of each line, None and a warning where it cannot be read."""
    found: list[dict[str, Any] | None] = []
    if not path.exists():
        return found
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            found.append(_checked(fsio.parse_json(line)))
        except (ValueError, LookupError, TypeError):
            logger.warning("%s, line %d is no record of an attempt: left out", path, number)
            found.append(None)
    return found


def _checked(attempt: Any) -> dict[str, Any]:
    """The attempt, if the readers of it find what they need; raises what Python does if not."""
    over = "outcome" in attempt or "ended" in attempt
    for key in ("started", "ended") if over else ("started",):
        datetime.fromisoformat(attempt[key])
    if not isinstance(attempt["job"], str):
        raise TypeError
    numbers = [attempt["from_epoch"], *(attempt.get(key, 0) for key in NUMBERS)]
    if not all(isinstance(each, int | float) and abs(each) < 2**63 for each in numbers):
        raise TypeError
    texts = [attempt.get(key) or "" for key in TEXTS]
    if not isinstance(attempt, dict) or not all(isinstance(each, str) for each in texts):
        raise TypeError
    return attempt


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
    lines = _lines(path)
    last = lines.pop() if lines else None
    if last is None:
        logger.warning("%s: the newest record is damaged: how its attempt ended is not noted", path)
        return
    last |= {"ended": fsio.timestamp(at), "outcome": outcome}
    if cause:
        last |= {"cause": cause, "message": message}
    _write(path, [*filter(None, lines), last])


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
