"""The programs of PostgreSQL: where they are, which ones fit, and how we start them."""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from tripletkit import repository
from tripletkit.errors import StorageError
from tripletkit.tune.database.lease import PAUSE

NEEDED = ("initdb", "postgres", "pg_dump", "pg_restore")
PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")  # Debian; Red Hat

Tick = Callable[[], None]  # called while we wait; raises to give up

_SECRET = re.compile(repository.SECRETS, re.IGNORECASE)
_LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # prctl(2)


class Programs(NamedTuple):
    """PostgreSQL's programs, and the user that the server runs as if we are root."""

    folder: Path
    owner: str | None

    def start(
        self,
        *command: object,
        killed_by: int = signal.SIGKILL,
        as_owner: bool = False,
        **popen: Any,
    ) -> subprocess.Popen[bytes]:
        """Start a program; if this process dies, however it dies, the program gets `killed_by`.

        Without us nobody would say that the server lives, and another could start on its files.
        """
        name, *arguments = map(str, command)
        if as_owner and self.owner:
            account = pwd.getpwnam(self.owner)
            popen |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        # The user's PG* variables are about other servers; and it may run as another user, whose
        # other processes can read what is in its environment.
        kept = {
            key: value
            for key, value in os.environ.items()
            if not (key.startswith("PG") or _SECRET.search(key))
        }
        return subprocess.Popen(  # noqa: S603 - a list of words, no shell
            [str(self.folder / name), *arguments],
            env=kept | {"LC_ALL": "C"} | popen.pop("variables", {}),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
            preexec_fn=lambda: _LIBC.prctl(PR_SET_PDEATHSIG, killed_by),  # noqa: PLW1509 - no threads
            **popen,
        )

    def run(
        self,
        *command: object,
        tick: Tick,
        stdout: IO[bytes] | int = subprocess.DEVNULL,
        **options: Any,
    ) -> None:
        """Run a program to its end. Raises StorageError with the end of what it said."""
        with tempfile.TemporaryFile() as said:
            process = self.start(*command, stdout=stdout, stderr=said, **options)
            try:
                while process.poll() is None:
                    tick()
                    time.sleep(PAUSE)
            except BaseException:
                process.kill()
                process.wait()
                raise
            if process.returncode:
                said.seek(0)
                text = tail(said.read().decode(errors="replace"))
                raise StorageError(f"{command[0]} failed, exit code {process.returncode}:\n{text}")


def find(data: Path) -> Programs:
    """The programs that fit `data`, which need not exist. Raises StorageError."""
    owner = _owner()
    version_file = data / "PG_VERSION"
    made_by = version_file.read_text().strip() if version_file.exists() else None
    others = set()
    for folder in _candidates():
        if all(os.access(folder / name, os.X_OK) for name in NEEDED):
            version = _version(folder)
            if made_by in (None, version):
                return Programs(folder, owner)
            others.add(version)
    if others:
        raise StorageError(
            f"{data} was made by PostgreSQL {made_by}, and here is only {', '.join(sorted(others))}",
            hint=f"load version {made_by}, or move {data} away: it is then made from the dump",
        )
    raise StorageError(
        f"PostgreSQL's programs ({', '.join(NEEDED)}) are not on PATH and not in {' or '.join(PLACES)}",
        hint="`module load postgresql`, `conda install -c conda-forge postgresql`, or Debian's package "
        "postgresql; also on the node that the job runs on",
    )


def _owner() -> str | None:
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise StorageError(
            "PostgreSQL refuses to run as root, and there is no user postgres to run it as",
            hint="start it as another user",
        ) from None


def _candidates() -> Iterator[Path]:
    if found := shutil.which("postgres"):  # what the user has loaded comes first
        yield Path(found).resolve().parent
    for place in PLACES:
        yield from sorted(Path("/").glob(place[1:]), key=lambda p: _numbers(str(p)), reverse=True)
    if found := shutil.which("pg_config"):
        done = subprocess.run([found, "--bindir"], capture_output=True, text=True, check=False)  # noqa: S603
        yield Path(done.stdout.strip())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _version(folder: Path) -> str:
    """The number before the first point: data folders fit within it."""
    command = [str(folder / "postgres"), "--version"]  # postgres (PostgreSQL) 15.18 (Debian ...)
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return str(next(iter(_numbers(text)), 0))


def tail(text: str) -> str:
    """The last lines."""
    return "\n".join(text.strip().splitlines()[-12:])
