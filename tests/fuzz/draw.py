"""Values and texts out of bytes: the same bytes give the same values, shorter bytes simpler ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

TEXTS = (
    "", " ", "0", "-1", "1", "nan", "inf", "-inf", "1e999", "true", "null", "[]", "{}", "auto", "~",
    "~nobody-here/x", "$HOME", "$NOWHERE/x", "../..", "/", "a\0b", "a\nb", "a\tb", "\x1b[31mred",
    "\ud800", "é", "٣", "😀", "x" * 300, "9" * 30, "9" * 5000, "0x" + "f" * 4000, "[" * 2000, "{a=" * 500,
    "*", "**", "[", "$(touch canary)", "`touch canary`", "; touch canary", "'", '"', "%s%n", "a,b",
    "postgresql://u@h/d", "file:///etc/passwd", "train.parquet", "1-00:00:00", "gpu:a100:2", "12_[0-3]",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 255, 256, 65_535, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53, 2**63 - 1, 2**63,
    -(2**63) - 1, 2**64, 10**30, 10**400,
)  # fmt: skip
FLOATS = (
    0.0, -0.0, 1.0, 0.5, -1.0, 1e-5, 1e30, -1e30, 1e38, 1e300, 1e-320, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip


class Draw:
    """A reader of `data` that never ends: behind it there are zeros."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1] if self.place <= len(self.data) else 0

    def below(self, n: int) -> int:
        value = self.byte()
        if n > 256:
            value += 256 * self.byte() + 65536 * self.byte()
        return value % n

    def of(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def flag(self) -> bool:
        return self.byte() % 2 == 1

    def bytes(self, most: int) -> bytes:
        return bytes(self.byte() for _ in range(self.below(most + 1)))

    def rest(self) -> bytes:
        found = self.data[self.place :]
        self.place = len(self.data)
        return found

    def text(self) -> str:
        kind = self.below(4)
        if kind == 0:
            return self.of(TEXTS)
        if kind == 1:
            return self.bytes(12).decode(errors="surrogateescape")
        if kind == 2:
            return str(self.of(NUMBERS[:-1]))
        return self.of(TEXTS) + self.bytes(4).decode("latin-1") + self.of(TEXTS)

    def value(self, depth: int = 3) -> Any:
        """As JSON has them, and beyond."""
        kind = self.below(9 if depth else 6)
        if kind == 0:
            return self.text()
        if kind == 1:
            return self.of(NUMBERS)
        if kind == 2:
            return self.of(FLOATS)
        if kind == 3:
            return self.flag()
        if kind == 4:
            return None
        if kind == 5:
            return self.below(100)
        if kind == 6:
            return [self.value(depth - 1) for _ in range(self.below(4))]
        return {self.text(): self.value(depth - 1) for _ in range(self.below(4))}

    def changed(self, value: Any) -> Any:
        """`value`, with one thing in it replaced, left out, or put where another belongs."""
        if isinstance(value, dict) and value and self.below(4):
            key = self.of(sorted(value))
            if self.below(5) == 0:
                return {k: v for k, v in value.items() if k != key}
            return {**value, key: self.changed(value[key])}
        if isinstance(value, list) and value and self.below(4):
            place = self.below(len(value))
            return [*value[:place], self.changed(value[place]), *value[place + 1 :]]
        return self.value()

    def torn(self, data: bytes) -> bytes:
        """`data`, cut off, with bytes changed, put in or taken out."""
        return mutated(data, random.Random(self.place), draw=self)


def mutated(
    data: bytes, source: random.Random, words: Sequence[bytes] = (), draw: Draw | None = None
) -> bytes:
    """A few changes, as a broken disk or a broken program makes them."""
    below = draw.below if draw is not None else source.randrange
    for _ in range(1 + below(4)):
        place = below(len(data) + 1)
        if below(2) and len(data) > 512:  # footers are at the end
            place = len(data) - below(512)
        kind = below(8)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + bytes([below(256)]) + data[place + 1 :]
        elif kind == 2 and data:
            data = (
                data[:place]
                + bytes(b ^ 1 << below(8) for b in data[place : place + 1])
                + data[place + 1 :]
            )
        elif kind == 3:
            data = data[:place] + bytes(below(256) for _ in range(below(9))) + data[place:]
        elif kind == 4:
            data = data[:place] + data[place + below(17) :]
        elif kind == 5:
            data = data[:place] + (b"\0", b"\xff")[below(2)] * below(17) + data[place + 8 :]
        elif kind == 6:
            other = below(len(data) + 1)
            data = data[:place] + data[other : other + below(65)] + data[place:]
        elif words:
            data = data[:place] + words[below(len(words))] + data[place:]
    return data
