"""Where a run computes and in which precision; numpy arrays as tensors."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tripletkit.errors import RunError

CPU_INFO = Path("/proc/cpuinfo")
CHUNK_BYTES = 64 * 2**20  # of a table on its way to a device


def choose_device(wanted: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N". Raises RunError if it is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        raise RunError(
            f"device is {wanted!r} but PyTorch sees no GPU "
            f"(torch {torch.__version__} is {built}; "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            hint="ask for a GPU in the job, install a CUDA build of torch, or set "
            'training.device = "cpu"',
        )
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise RunError(f"device is {wanted!r} but there are {torch.cuda.device_count()} GPUs")
        if wanted == "cuda":  # that of our rank, if there are several
            return torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # graphs and streams go to the current one
    return device


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; "auto" is the latter where the hardware multiplies it faster."""
    if wanted == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # other processors compute with it, but no faster than with float32
            fast = CPU_INFO.exists() and " amx_bf16 " in CPU_INFO.read_text()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def autocast(
    device: torch.device, precision: torch.dtype
) -> contextlib.AbstractContextManager[Any]:
    """bf16 for the matrix products if so chosen; parameters stay float32."""
    if precision is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in real float32, whatever the trainer or the environment chose for its own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_deterministic(device: torch.device) -> None:
    """The same inputs give the same bits: needed for exact resume, free in our step."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As torch.use_deterministic_algorithms(True), which would import torch's compiler: a second.
    torch.set_deterministic_debug_mode("error")
    # Filling fresh memory with NaN costs bandwidth and catches nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_dropout(device: torch.device, key: int) -> None:
    """Seed torch's own generator, which only dropout uses, for the coming step."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(key)
    else:
        torch.default_generator.manual_seed(key)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over the same memory, which may be a read-only map: never write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(np.asarray(array))


def type_on(device: torch.device, table: NDArray[Any], precision: torch.dtype) -> torch.dtype:
    """The type of a table on `device`: on a GPU that of the products."""
    own = as_tensor(table[:0]).dtype
    half = device.type == "cuda" and precision is torch.bfloat16
    return torch.bfloat16 if half else own


def put(table: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A table [N, D] on `device`, in its own type or `dtype`; on a CPU the memory itself, no copy."""
    source = as_tensor(table)
    if device.type == "cpu":
        return source
    there = torch.empty(source.shape, dtype=dtype or source.dtype, device=device)
    rows = max(1, CHUNK_BYTES // (source.shape[1] * source.element_size()))
    for into, chunk in zip(there.split(rows), source.split(rows), strict=True):
        into.copy_(chunk)
    return there
