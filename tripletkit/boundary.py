"""The one place where errors become messages and exit codes; commands and jobs share it."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

from tripletkit import __version__, log
from tripletkit.errors import DONE, Interrupted, TripletkitError, is_out_of_memory

OUT_OF_HOST_MEMORY = (
    "lower training.batch_size or the width of the head (training_model.*_dim), evaluate on less with "
    "the val_sample_* keys, or ask for more (slurm.mem)"
)
OUT_OF_MEMORY = (
    'lower training.batch_size, set training.placement = "host", or evaluate on less with the '
    "val_sample_* keys"
)


class Ending(NamedTuple):
    """How a command ended: its exit code, and what went wrong if anything did."""

    exit_code: int
    error: BaseException | None = None
    message: str | None = None


def prepare_process(*, verbose: bool = False, plain: bool = False) -> None:
    """What every process of ours does first, before torch is loaded."""
    # Torch's threads spin while they wait for each other, by default so long that another program
    # on one of the cores slows training by an order of magnitude. A short spin costs little.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    log.setup(verbose=verbose, plain=plain)


def run(command: Callable[[], int | None]) -> Ending:
    """Call `command`; say on stderr what went wrong."""
    try:
        return Ending(command() or DONE)
    except TripletkitError as error:
        return _ended(error.exit_code, error, error.message, error.hint)
    except KeyboardInterrupt as error:
        return _ended(Interrupted.exit_code, error, "interrupted")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _ended(TripletkitError.exit_code, error, f"{where}{error.strerror or error}")
    except Exception as error:  # noqa: BLE001 - the boundary: a bug shows its traceback, and says so
        if is_out_of_memory(error):
            asked = re.search(r"allocate [\d.]+ ?\w+", str(error))
            message = f"out of memory{f': could not {asked[0]}' if asked else ''}"
            return _ended(TripletkitError.exit_code, error, message, OUT_OF_HOST_MEMORY)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            message = f"the GPU ran out of memory: {str(error).splitlines()[0]}"
            return _ended(TripletkitError.exit_code, error, message, OUT_OF_MEMORY)
        traceback.print_exc()
        return _ended(
            TripletkitError.exit_code,
            error,
            f"this is a bug in tripletkit {__version__}",
            "please report it with the lines above",
        )


def say(message: str, hint: str | None = None) -> None:
    """An error and what to do about it, on stderr."""
    log.err.print("error: ", style="bold red", end="")
    log.err.print(message, markup=False, soft_wrap=True)
    if hint:
        log.err.print(f"hint: {hint}", markup=False, soft_wrap=True)


def _ended(code: int, error: BaseException, message: str, hint: str | None = None) -> Ending:
    say(message, hint)
    return Ending(code, error, message)
