"""Where the embedding table lies: in the device's memory, or on disk behind the page cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tripletkit.data.store import Store
from tripletkit.device import type_on
from tripletkit.log import logger

# Share of free memory that a resident table may take; the rest is for the step and evaluation.
SHARE = 0.7


def choose_placement(
    wanted: str, store: Store, device: torch.device, precision: torch.dtype
) -> str:
    """ "device" or "host". On a CPU, "device" is the memory map itself, without prefetching."""
    if wanted != "auto":
        return wanted
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    size = store.embeddings.size * type_on(device, store.embeddings, precision).itemsize
    placement = "device" if size <= SHARE * free else "host"
    logger.info(
        "placement: %s (embeddings %.2f GB, free memory %.2f GB)", placement, size / 1e9, free / 1e9
    )
    return placement


def _available_memory() -> int:
    """Free memory in bytes, cut to the limits of our control groups (Slurm sets one per job)."""
    if not Path("/proc/meminfo").exists():  # not Linux: the machine's memory is all we know
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            root = Path("/sys/fs/cgroup", controllers)
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            inner = root / group.lstrip("/")
            for folder in (inner, *inner.parents):
                limit = folder / name
                if limit.exists() and (text := limit.read_text().strip()).isdigit():
                    available = min(available, int(text))
    return available
