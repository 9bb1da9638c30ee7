"""Files that are whole or absent: atomic writes, advisory locks, digests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from tripletkit.errors import RunError
from tripletkit.log import logger

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for a file


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
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            error.filename = str(path)  # the system does not say which file it was
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def parse_json(content: str | bytes) -> Any:
    """What a file of ours holds, which others may have damaged. Raises ValueError if it is no JSON."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_writable(folder: Path, hint: str) -> None:
    """That files can be made in a folder, which may have to be made itself.

    Raises RunError with `hint`, which says how to choose another.
    """
    there = folder
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    except OSError as error:
        if error.errno in FULL:
            hint = f"make room there, or {hint}"
        raise RunError(f"{folder}: cannot write to {there}: {error.strerror}", hint=hint) from None


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


@contextlib.contextmanager
def tidied(path: Path) -> Iterator[None]:
    """For who writes `path`, one after the other: what killed ones left is removed first."""
    with passing_lock(path.with_name(f".{path.name}.lock"), wait=True) as lock:
        if lock.sure:
            remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.tmp")
        yield


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
    with _opened(path) as file:
        yield _lock(file, path, wait=wait)


@contextlib.contextmanager
def passing_lock(path: Path, *, wait: bool = False) -> Iterator[Lock]:
    """`exclusive_lock`, whose file is gone when the block ends.

    Who locks a file that its former holder has just removed tries again with the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+") as file:
            lock = _lock(file, path, wait=wait)
            if lock.ours and not _is_at(path, file):
                continue
            try:
                yield lock
            finally:
                if lock.ours:
                    path.unlink(missing_ok=True)
            return


def _opened(path: Path) -> IO[Any]:
    """The file of a lock. One that is there can be held, or seen held, where nobody may write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not path.exists():
            raise
        return path.open()


def _lock(file: IO[Any], path: Path, *, wait: bool) -> Lock:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # EBADF: NFS locks no file that is open for reading only.
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            logger.warning("no file locks on the file system of %s: going on without", path)
            return Lock(ours=True, sure=False)
        if not wait:
            return Lock(ours=False, sure=True)
        logger.info("another process holds %s: waiting for it", path)
        fcntl.flock(file, fcntl.LOCK_EX)
    return Lock(ours=True, sure=True)


def _is_at(path: Path, file: IO[Any]) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


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
