"""One holder at a time of a folder that several machines share.

Within a machine a file lock decides: the kernel frees it when its holder dies, however it dies. From
one machine to the other locks may not reach, so the holder also touches its record, and only who has
seen the record untouched for STALE_AFTER, by its own clock, takes over. The former holder, if it was
frozen and comes back, finds the other's token in the record and must end what it does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tripletkit import fsio
from tripletkit.errors import StorageError
from tripletkit.log import logger

BEAT = 5.0  # seconds between two touches of the record
STALE_AFTER = 30.0  # seconds without a touch, after which the holder counts as dead
PAUSE = 0.1  # seconds between two looks at a condition

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # proc_sys_kernel(5)

State = Literal["starting", "up", "stopping", "stopped", "failed"]


@dataclass(frozen=True)
class Holder:
    """The record: who holds the folder, or held it last, and how it is. `since` is UTC."""

    token: str
    job: str
    host: str
    machine: str
    since: str
    state: State
    message: str = ""

    @property
    def over(self) -> bool:
        """It has said that it is gone."""
        return self.state in ("stopped", "failed")

    def __str__(self) -> str:
        return f"job {self.job} on {self.host}"


class LeaseLostError(StorageError):
    """Somebody else took the folder over: touch nothing in it."""


class Lease:
    """The folder is ours for as long as `beat` is called and returns."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path = path
        self.holder = holder
        self._beaten = time.monotonic()
        fsio.write_json(path, dataclasses.asdict(holder))

    def note(self, state: State, message: str = "") -> None:
        """Write into the record how we are. Raises LeaseLostError."""
        self._check()
        self.holder = dataclasses.replace(self.holder, state=state, message=message)
        fsio.write_json(self._path, dataclasses.asdict(self.holder))

    def beat(self) -> None:
        """Show that we live, if it is time to. Raises LeaseLostError, OSError."""
        silent = time.monotonic() - self._beaten
        if silent < BEAT:
            return
        try:
            self._check()
            os.utime(self._path)
        except OSError:  # a hiccup of the file system; in time the others think that we are dead
            if silent > STALE_AFTER / 2:
                raise
            return
        self._beaten = time.monotonic()

    def _check(self) -> None:
        holder = read(self._path)
        if holder is None or holder.token != self.holder.token:
            who = f"{holder} took it over" if holder else "its record is gone"
            raise LeaseLostError(
                f"{self._path.parent} is no longer ours: {who}",
                hint="one server at a time; did this machine or its file system hang?",
            )


class Hold(NamedTuple):
    """What `hold` got."""

    lease: Lease
    former_may_live: bool  # on another machine, frozen or cut off


class Beats:
    """Watches a holder from outside."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = self._look()
        self._since = time.monotonic()
        self.seen = 0

    def silent(self) -> float:
        """Seconds since we saw the record touched, or began to look."""
        if (now := self._look()) != self._last:
            self._last, self._since, self.seen = now, time.monotonic(), self.seen + 1
        return time.monotonic() - self._since

    def _look(self) -> int:
        try:
            with self._path.open() as file:  # only opening is sure to ask a network file system
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return 0


@contextlib.contextmanager
def hold(path: Path, job: str, tick: Callable[[], None]) -> Iterator[Hold]:
    """Hold the folder of the record `path`; writes how it ended.

    A holder that lives is respected (StorageError); `tick` is called while it is unclear whether it
    does, and may raise.
    """
    with fsio.exclusive_lock(path.with_name(".lock"), wait=False) as lock:
        former = read(path)
        if not lock.ours:
            raise _taken(path, former)
        died_here = former is not None and lock.sure and former.machine == machine()
        may_live = former is not None and not former.over and not died_here
        if former is not None and may_live:
            _outwait(path, former, tick)
        lease = Lease(path, new_holder(job))
        try:
            if not lock.sure:  # somebody else may have written the record with us
                _settle(lease, tick)
            yield Hold(lease, may_live)
        except LeaseLostError:
            raise
        except BaseException as error:
            message = error.message if isinstance(error, StorageError) else type(error).__name__
            lease.note("failed", message)
            raise
        lease.note("stopped", lease.holder.message)


def read(path: Path) -> Holder | None:
    """The record, or None where there is none. Raises StorageError for a damaged one."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        holder = Holder(**fsio.parse_json(content))
    except (ValueError, TypeError):
        raise damaged(path) from None
    if not all(isinstance(text, str) for text in dataclasses.astuple(holder)):
        raise damaged(path)
    return holder


def damaged(path: Path) -> StorageError:
    """For a file of ours that holds something else."""
    return StorageError(f"{path} is damaged", hint="delete it if no PostgreSQL runs in its folder")


def new_holder(job: str) -> Holder:
    """A holder that starts here and now."""
    return Holder(
        token=secrets.token_hex(16),
        job=job,
        host=socket.gethostname(),
        machine=machine(),
        since=fsio.timestamp(),
        state="starting",
    )


def machine() -> str:
    """What processes of one running kernel, and only they, have in common: locks reach that far."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()


def _outwait(path: Path, former: Holder, tick: Callable[[], None]) -> None:
    """Return once the former holder has been silent for long enough."""
    logger.warning(
        "%s did not say that it is gone: watching for %.0f s whether it lives", former, STALE_AFTER
    )
    beats = Beats(path)
    while beats.silent() < STALE_AFTER:
        if beats.seen > 1:  # the first may be older than our look, and late
            raise _taken(path, former)
        tick()
        time.sleep(PAUSE)


def _settle(lease: Lease, tick: Callable[[], None]) -> None:
    deadline = time.monotonic() + 2 * BEAT
    while time.monotonic() < deadline:
        lease.beat()
        tick()
        time.sleep(PAUSE)


def _taken(path: Path, holder: Holder | None) -> StorageError:
    word = shlex.quote(str(path.parent))
    return StorageError(
        f"{holder or 'another process'} serves {path.parent} already",
        hint=f"`tripletkit db status {word}` looks at it, `tripletkit db down {word}` ends it",
    )
