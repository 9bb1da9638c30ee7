"""Optuna's journal file, safe against writers that die in the middle of a line."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from tripletkit.log import logger


def backend(path: Path) -> JournalFileBackend:
    """The journal in `path`; the file is made if there is none."""
    return JournalFileBackend(str(path), lock_obj=_MendingLock(path))


def cut_torn_line(path: Path) -> int:
    """Remove what stands behind the last newline; returns the bytes removed.

    The next record would be glued to it, and from then on nobody could read the journal. Call it
    under the journal's lock: a line without an end belongs to a writer that is no more.
    """
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep, step = end, 4096
        while keep > 0:
            start = max(0, keep - step)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)
            os.fsync(file.fileno())
    return end - keep


class _MendingLock(JournalFileSymlinkLock):
    """Mends the journal whenever a writer gets the lock.

    Optuna's lock file rather than flock: it also works where file locks do not reach other nodes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def acquire(self) -> bool:
        super().acquire()
        try:
            if cut := cut_torn_line(self._path):
                logger.warning("%s: cut %d bytes that a killed writer left", self._path, cut)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        # Gone if we stood still for more than 30 s and others took it; the record is written.
        with contextlib.suppress(RuntimeError):
            super().release()
