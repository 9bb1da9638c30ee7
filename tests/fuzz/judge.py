"""The verdict on one input: taken, refused by an error of ours, or a surprise."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 20  # for one input, however busy the machine is
CANARY = "canary"  # a file that nobody but an input that runs as code makes


class Target(NamedTuple):
    """Something that reads what others wrote. `run` works in the current folder, which is empty."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[bytes] = ()  # that inputs may be made of


class TooSlow(BaseException):
    """Not an Exception, so that nobody takes it for something that an input does."""


class Surprise(Exception):  # noqa: N818 - not an error of ours
    """An input did what none may do."""

    @property
    def place(self) -> str:
        """The kind of error and the innermost line of ours, to tell one surprise from another."""
        cause = self.__cause__
        if cause is None:
            return str(self)
        ours = [f for f in traceback.extract_tb(cause.__traceback__) if "tripletkit" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
        return f"{type(cause).__name__} at {where}"


def judge(target: Target, data: bytes) -> str:
    """`taken`, or the name of the error that refused it. Raises Surprise."""
    from tripletkit.errors import TripletkitError

    try:
        with _limited(), _nowhere():
            try:
                target.run(data)
                verdict = "taken"
            except TripletkitError as error:
                verdict = type(error).__name__
                if "Traceback" in error.message or not error.message.strip():
                    raise Surprise(f"{verdict} says {error.message!r}") from error
            except OSError as error:  # the boundary says it in one line
                verdict = type(error).__name__
            if Path(CANARY).exists():
                raise Surprise("the input ran as code")
    except Surprise:
        raise
    except (Exception, TooSlow) as error:
        raise Surprise(f"{type(error).__name__}: {str(error)[:300]}") from error
    return verdict


@contextlib.contextmanager
def _nowhere() -> Iterator[None]:
    """In a new, empty folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz.") as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    began = time.monotonic()

    def ring(*_: object) -> None:
        raise TooSlow(f"over {SECONDS} s of work")

    # Of our own processor time: another process must not make an input slow.
    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if time.monotonic() - began > 20 * SECONDS:
        print("an input took long", file=sys.stderr)
