"""A small file system for tests of disks that fill up: `pytest_plugins = ["tests.small_disk"]`."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filler = folder / "filler"

    def resize(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def leave(self, count: int) -> None:
        """Fill it up, but for so many bytes."""
        self.filler.unlink(missing_ok=True)
        disk = os.statvfs(self.folder)
        with self.filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - count))

    def fill(self) -> None:
        """Until not a byte more fits."""
        with self.filler.open("ab", buffering=0) as file:
            for size in (2**16, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    def make_room(self) -> None:
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """8 MB and 500 inodes, below `tmp_path`; skips where nothing can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=8m,nr_inodes=500,mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)
