"""The first step of a job that submitit packaged: `python -m tripletkit.cluster.entry FOLDER`.

submitit pickles the call of a job into FOLDER, and who could write there would have our jobs run code
of his. So a job looks whose folder it is before it reads anything, and holds on to the one that it has
looked at: in a folder for logs that a group shares, others can rename it and put theirs in its place.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from tripletkit import boundary
from tripletkit.errors import ConfigError

HELD = Path("/proc/self/fd")


def hold(folder: Path) -> int:
    """Open a folder that is ours alone to write in; the handle leads to it whatever its name does.

    Raises ConfigError if it is another user's, a link, or open to others.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise _refused(folder, f"cannot be used: {error.strerror}") from None
    found = os.fstat(handle)
    if found.st_uid != os.geteuid():
        problem = f"belongs to another user (uid {found.st_uid})"
    elif stat.S_IMODE(found.st_mode) & 0o022:
        problem = f"can be written to by others (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return handle
    os.close(handle)
    raise _refused(folder, problem)


def _refused(folder: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"{folder} {problem}: whoever writes there could have your jobs run code",
        hint="set global.log_dir to a folder of your own, and leave its submitit/ to tripletkit",
    )


def main() -> None:
    """Run the job whose call lies in the folder; ends the process."""
    folder = Path(sys.argv[1])
    boundary.prepare_process(plain=True)
    held: list[int] = []
    ending = boundary.run(lambda: held.append(hold(folder)))
    if not held:
        sys.exit(ending.exit_code)
    from submitit.core.submission import process_job

    process_job(HELD / str(held[0]) if HELD.exists() else folder)


if __name__ == "__main__":
    main()
