"""Signals become one flag that the trainer asks for between steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# INT: the user. TERM: scancel, preemption. USR1, USR2: asked for ahead of the time limit.
WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Called, says whether a signal asked to stop; `signals` are those that came."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def __call__(self) -> bool:
        """Has one come?"""
        return bool(self.signals)

    @property
    def wants_requeue(self) -> bool:
        """The time limit is near, or the site announces preemption by a signal of ours."""
        return signal.SIGUSR1 in self.signals or signal.SIGUSR2 in self.signals

    @property
    def terminated(self) -> bool:
        """Slurm ends the job: cancelled, preempted or at its time limit."""
        return signal.SIGTERM in self.signals


@contextlib.contextmanager
def watch() -> Iterator[Stop]:
    """Note signals instead of dying of them; a second Ctrl-C ends at once.

    Slurm repeats signals and wrappers forward them, so that coming twice means nothing.
    """
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in stop.signals:
            raise KeyboardInterrupt
        stop.signals.append(number)

    before = {number: signal.signal(number, note) for number in WATCHED}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
