"""The processes that train one head together: one per GPU, rank 0 first. Usually it is one alone."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tripletkit import log, processes
from tripletkit.errors import ConfigError, RunError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # one may write or read a cache while the others wait for it


class Group:
    """Who we are among them, and what we do together; alone, nothing of it costs anything.

    Every process must make the same calls in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        """Whether we are the one that writes, reports and talks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Our consecutive part of `count` items; it may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor, in place, by its sum over the processes, in one go."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def whole(self, part: Tensor, count: int) -> Tensor:
        """All [count, ...] rows, of which each process has its `share`, in order."""
        if self.size == 1:
            return part
        most = -(-count // self.size)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        whole = part.new_empty(self.size * most, *part.shape[1:])
        dist.all_gather_into_tensor(whole, padded)
        if count == len(whole):
            return whole
        shares = [Group(rank, self.size).share(count) for rank in range(self.size)]
        parts = zip(whole.split(most), shares, strict=True)
        return torch.cat([part[: share.stop - share.start] for part, share in parts])

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere."""
        if self.size == 1:
            return flag
        answer = torch.tensor([int(flag)])
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return bool(answer)

    def first(self, value: T) -> T:
        """The value of rank 0, for all. It must be picklable."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def all(self, value: T) -> Sequence[T]:
        """The values of all processes, by rank. They must be picklable."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Group()


@contextlib.contextmanager
def member(device: str = "auto", *, rendezvous: str | None = None) -> Iterator[Group]:
    """Be one of the processes that RANK and WORLD_SIZE tell of, as torchrun sets them.

    Each takes the GPU of its LOCAL_RANK, unless `device` is "cpu"; tensors on a GPU travel by NCCL,
    those on a CPU by gloo. With a `rendezvous` of our own all of them are on this machine.
    Raises ConfigError or RunError.
    """
    if not processes.launched():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:
        log.only_errors()
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        _take_gpu(device, rank, size, all_here=rendezvous is not None)
        backend = "cpu:gloo,cuda:nccl"
    if rendezvous is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    dist.init_process_group(
        backend, rendezvous or "env://", timeout=PATIENCE, rank=rank, world_size=size
    )
    yield Group(rank, size)
    # Only now: after an error it could wait for ever, as NCCL does for those who are not coming,
    # and for the end of captured graphs that use it.
    gc.collect()
    dist.destroy_process_group()


def _take_gpu(device: str, rank: int, size: int, *, all_here: bool) -> None:
    if ":" in device:
        raise ConfigError(
            f"training.device is {device!r}, one GPU, but {size} processes train",
            hint='set it to "cuda": each takes its own',
        )
    count = torch.cuda.device_count()
    here = size if all_here else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # A launcher may show each process its own GPU alone.
    if count < here and (all_here or count > 1):
        raise RunError(
            f"{here} processes on this machine, but {count} GPUs",
            hint="slurm.gpus, or torchrun's --nproc-per-node, is the number of GPUs",
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % count)
