"""The error family. Each class owns its exit code; the command line is the one boundary."""

from __future__ import annotations

# Exit codes are part of the interface (docs/reference/cli.md): scripts and jobs test them.
DONE = 0
REQUEUE = 85  # of a job: stopped with its state saved, run me again


class TripletkitError(Exception):
    """A failure that we can explain: `message` says what and where, `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of this machine, not that of a GPU, did not do for what was asked of it."""
    if isinstance(error, MemoryError):
        return True
    # What torch raises is a mere RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class RunError(TripletkitError):
    """The run itself failed: no device, out of memory, a loss that is not a number."""

    exit_code = 1


class DivergedError(RunError):
    """The loss is no longer a number."""


class ConfigError(TripletkitError):
    """A flag, a key or a value that cannot be used."""

    exit_code = 2


class DataError(TripletkitError):
    """Input files that cannot be used: parquet, metadata, checkpoints."""

    exit_code = 3


class ClusterError(TripletkitError):
    """The scheduler refused or cannot be reached."""

    exit_code = 4


class StorageError(TripletkitError):
    """The study's storage cannot be reached or used."""

    exit_code = 5


class NoStudyError(StorageError):
    """The storage is there, or may be made; the study is not."""


class StorageAway(StorageError):  # noqa: N818 - an outage
    """The storage has been away for so long that we gave up; it may be back later.

    `progress` as of Interrupted.
    """

    progress = False


class Interrupted(TripletkitError):  # noqa: N818 - not an error
    """Stopped after the state was saved, by a signal or because the time limit is near.

    `progress` is false if the run did not get anywhere: starting it again would not help.
    """

    exit_code = 130

    def __init__(self, message: str, *, hint: str | None = None, progress: bool = True) -> None:
        super().__init__(message, hint=hint)
        self.progress = progress
