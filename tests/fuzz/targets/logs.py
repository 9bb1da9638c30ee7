"""A log that grows, is cut off and replaced while it is followed."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.draw import Draw
from tests.fuzz.judge import Target
from tripletkit.cluster.jobs import LOCAL
from tripletkit.monitor import why
from tripletkit.monitor.logs import Tail

FILE = Path("x.err")
PIECES = (
    b"line\n", b"no end", b"\n", b"\r\n", b"50%\r", b"\x1b[31mred\x1b[0m\n", b"\xff\xfe\n", b"\xe2\x82", b"\xac\n", b"\0\n",
    b"x" * 100_000, b"\n" * 1000, b"2026-01-02 03:04:05 INFO [job 12] a\n", b"Traceback (most recent call last):\n",
)  # fmt: skip


def _log(data: bytes) -> None:
    draw = Draw(data)
    if draw.flag():
        FILE.write_bytes(draw.of(PIECES) * draw.below(50))
    before = FILE.read_bytes() if FILE.exists() else b""
    tail = Tail(FILE)
    lines = draw.of((0, 1, 2, 50, 10**9))
    tail.skip_to_last(lines)
    shown, replaced, written = "", False, before
    for _ in range(draw.below(12)):
        what = draw.below(5)
        if what == 0 and FILE.exists():
            with FILE.open("r+b") as file:
                file.truncate(draw.below(len(FILE.read_bytes()) + 1))
            replaced = True
        elif what == 1:
            FILE.unlink(missing_ok=True)
            replaced = True
        elif what == 2:
            shown += tail.read()
        else:
            piece = draw.of(PIECES) if draw.flag() else draw.bytes(20)
            with FILE.open("ab") as file:
                file.write(piece)
            written += piece
    shown += tail.read(to_the_end=True)
    if not replaced and lines == 10**9:  # then every line came whole and once
        assert shown == _decoded(written), (shown[:50], written[:50])
    for job in ("12", "12_3", f"{LOCAL}7"):
        why._end_of(FILE, job)


def _decoded(data: bytes) -> str:
    """As the follower does it: line by line, so a character that is cut by a line's end is replaced."""
    return b"".join(data.splitlines(keepends=True)).decode(errors="replace")


LOG = Target(
    _log,
    lambda: [bytes([i, j, 3, 4, i, j, 1, j, i, 2, i]) for i in range(14) for j in range(0, 14, 3)],
)
