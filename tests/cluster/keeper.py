"""The parent of every process of one host of the test cluster.

As a "child subreaper" it inherits each process that loses its own parent, so the descendants of a
keeper are exactly what runs on its host: daemons, job steps, and whatever a job left behind. It
takes one JSON line at a time from standard input and answers with one line:

- `{"run": [program, ...], "log": file}` starts a daemon and answers its process id
- `{"kill": true}` ends the host as a power cut would and answers 0 once nothing of it is left
- `{"stop": true}` does the same, removes the folder and exits

So does the end of standard input, however its owner died.
Only the standard library, and nothing of this package: it must start in no time.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


def parents() -> dict[int, int]:
    """The parent of every process of this machine."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                status = Path(entry.path, "stat").read_text(errors="replace")
            except OSError:  # gone in between
                continue
            found[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
    return found


def descendants(root: int) -> list[int]:
    """All processes below `root`, parents first."""
    children: dict[int, list[int]] = {}
    for process, parent in parents().items():
        children.setdefault(parent, []).append(process)
    found = list(children.get(root, []))
    for process in found:
        found += children.get(process, [])
    return found


def kill() -> int:
    """End all processes of this host; those that fork meanwhile are met in the next round."""
    while processes := descendants(os.getpid()):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return 0


def run(program: list[str], log: str) -> int:
    """Start a daemon in a session of its own, its output appended to `log`."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        program[0],
        program,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigdef=IGNORED,
    )


def main(folder: str) -> None:
    """Serve the owner's requests until its end of the pipe is closed."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit("cannot become a child subreaper")
    for number in IGNORED:  # the owner decides; an ignored SIGCHLD leaves no zombies
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if "stop" in request:
            break
        print(kill() if "kill" in request else run(request["run"], request["log"]), flush=True)
    kill()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
