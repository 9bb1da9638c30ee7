"""A reader with every fault that we look for, to see that we see them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.fuzz.judge import CANARY, Target
from tripletkit.errors import DataError


def _faulty(data: bytes) -> None:
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"code":
        Path(CANARY).touch()
    if data == b"bug":
        raise KeyError("of a reader")
    if data == b"memory":
        bytearray(2**40)
    if data == b"slow":
        while time.process_time():
            pass
    if data == b"refused":
        raise DataError("no")


FAULTY = Target(_faulty, lambda: [b"taken", b"refused", b"code", b"bug", b"memory", b"crash"])
