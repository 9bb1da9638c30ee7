"""Files that are whole or absent: atomic writes, advisory locks, digests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from tripletkit.log import logger


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an error.

    The bytes are synced before the rename and the folder after it, so a crash leaves the old
    file or the new one. The temporary name starts with a dot and ends in `.tmp`; no other
    process has it, not even one of the same number on another machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with aside.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def publish_folder(aside: Path, final: Path) -> None:
    """Sync every file of `aside`, then rename the folder to `final`, which must not exist."""
    for file in sorted(aside.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    sync_folder(aside)
    aside.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete what a killed process left aside. Call it under a lock that is sure."""
    for leftover in folder.glob(pattern):
        logger.info("removing %s, left behind by a process that was killed", leftover)
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


class Lock(NamedTuple):
    """What `exclusive_lock` got."""

    ours: bool  # false when another process holds it and we did not wait
    sure: bool  # false where the file system has no locks, so others may be at work too


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[Lock]:
    """Hold `path` as a lock; the kernel frees it when its holder dies, however it dies.

    A file system without locks gets a warning: callers publish by rename, so the worst case
    there is work done twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                logger.warning("no file locks on the file system of %s: going on without", path)
                yield Lock(ours=True, sure=False)
                return
            if not wait:
                yield Lock(ours=False, sure=True)
                return
            logger.info("another process holds %s: waiting for it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield Lock(ours=True, sure=True)


def timestamp(at: float | None = None) -> str:
    """Now, or `at` these Unix seconds, for records in files: UTC, to the second, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def digest(parts: Iterable[bytes | str]) -> str:
    """A short content key (96 bits of SHA-256) of `parts`, whose borders count."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:24]
