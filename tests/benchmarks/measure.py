"""How the benchmarks take time, and the rows that they report."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SLICES = 5
WARM_UP = {"cpu": 1, "cuda": 6}  # runs; on CUDA three eager steps, then the capture

Row = dict[str, Any]
Section = Callable[["Bench"], Iterator[Row]]


class UnavailableError(Exception):
    """What a section needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Bench:
    """What every section gets: room on the disk, the device, and seconds per measured rate."""

    folder: Path
    device: torch.device
    seconds: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def gpu(self) -> torch.device:
        """The device, for sections that need CUDA."""
        if not self.on_gpu:
            raise UnavailableError("needs a CUDA device")
        return self.device


def machine(device: torch.device) -> dict[str, str]:
    """The machine in words, for people and to tell machines apart."""
    found = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_model() -> str:
    """As Linux knows it; hypervisors leave some of it out."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in info.read_text().partition("\n\n")[0].splitlines()
            if ":" in line
        )
        numbers = f"(family {fields.get('cpu family')}, model {fields.get('model')})"
        return f"{fields.get('model name', platform.machine())} {numbers}"
    return platform.processor() or platform.machine()


# --- rates -----------------------------------------------------------------------------------


def rates(
    runs: Sequence[tuple[Callable[[], object], float]],
    seconds: float,
    device: torch.device,
    slices: int = SLICES,
) -> list[list[float]]:
    """Units per second of each of `runs`, pairs of a function and the units that a call makes.

    Slice by slice in turn, after a slice that finds how many calls make one: a shared machine's
    speed drifts, so only slices side by side compare. A slice ends when the device is through.
    `seconds` is what each of the runs may take, all its slices together.
    """
    part = seconds / (slices + 1)
    counts = [_calls(run, part, device) for run, _ in runs]
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(slices):
        for (run, units), count, into in zip(runs, counts, found, strict=True):
            into.append(count * units / _took(run, count, device))
    return found


def _calls(run: Callable[[], object], seconds: float, device: torch.device) -> int:
    """How many calls take about `seconds`."""
    _took(run, WARM_UP[device.type], device)
    count = 1
    while (took := _took(run, count, device)) < seconds / 2:
        count *= 2
    return max(1, round(count * seconds / took))


def _took(run: Callable[[], object], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# --- rows ------------------------------------------------------------------------------------


def ratio(
    what: str,
    values: Sequence[float],
    references: Sequence[float],
    *,
    unit: str,
    beside: str,
    target: float | None = None,
    at_most: bool = False,
) -> Row:
    """A row that compares: the median of the ratios side by side, against a target for it."""
    found = [v / r for v, r in zip(values, references, strict=True)]
    middle = statistics.median(found)
    return _row(what, values, unit, middle, found, target, at_most) | {
        "reference": statistics.median(references),
        "beside": beside,
        "ratio": middle,
    }


def absolute(
    what: str,
    values: Sequence[float],
    *,
    unit: str,
    target: float | None = None,
    at_most: bool = True,
) -> Row:
    """A row against a plain number."""
    return _row(what, values, unit, statistics.median(values), values, target, at_most)


def _row(
    what: str,
    values: Sequence[float],
    unit: str,
    judged: float,
    spread: Sequence[float],
    target: float | None,
    at_most: bool,
) -> Row:
    assert all(math.isfinite(v) for v in spread), f"{what}: {spread}"
    met = None if target is None else judged <= target if at_most else judged >= target
    return {
        "what": what,
        "value": statistics.median(values),
        "unit": unit,
        "spread": [min(spread), max(spread)],
        "target": None if target is None else f"{'<=' if at_most else '>='} {number(target)}",
        "met": met,
    }


# --- words -----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits that count, or all before the point."""
    if value == 0 or 1e-4 <= abs(value) < 999.5:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.2e}"


def line(row: Row) -> str:
    """One row for the terminal."""
    text = f"{row['what']}: {number(row['value'])} {row['unit']}"
    if "ratio" in row:
        text += f" / {number(row['reference'])} {row['beside']} = {row['ratio']:.2f}"
    if row["target"]:
        text += f" (target {row['target']}{'' if row['met'] else ', missed'})"
    return text


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| what | measured | beside it | ratio | lowest to highest | target | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = f"{number(row['reference'])}: {row['beside']}" if "ratio" in row else ""
        low, high = (f"{v:.2f}" if "ratio" in row else number(v) for v in row["spread"])
        cells = [
            row["what"],
            f"{number(row['value'])} {row['unit']}",
            beside,
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            "" if low == high else f"{low} to {high}",
            row["target"] or "",
            {True: "yes", False: "**no**", None: ""}[row["met"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
