"""Signals become one flag that the trainer asks for between steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

# INT: the user. TERM: scancel, preemption. USR1, USR2: asked for ahead of the time limit.
WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Yield `stop_requested()`; the first signal only raises the flag, a second Ctrl-C ends at once."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in WATCHED}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
