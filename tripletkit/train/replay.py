"""The same work on a GPU again and again, as one captured graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tripletkit.log import logger

# Before a graph is captured, PyTorch wants a few eager runs on a side stream.
EAGER_RUNS = 3


class Replay:
    """Runs the same work again and again: on CUDA a few times as it is, then as one captured graph.

    A graph knows addresses, so the work reads tensors that stay, and gives the same one each time.
    """

    def __init__(self, device: torch.device, work: Callable[[], Tensor]) -> None:
        self.device = device
        self.work = work
        self.allowed = device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._aside = torch.cuda.Stream(device) if self.allowed else None
        self._runs = 0

    def __call__(self) -> Tensor:
        """Do the work."""
        if not self.allowed:
            return self.work()
        if self.graph is None:
            self._runs += 1
            if self._runs <= EAGER_RUNS:
                return self._run_aside()
            if not self._captured():
                return self.work()
        assert self.graph is not None
        assert self._result is not None
        self.graph.replay()
        return self._result

    def _run_aside(self) -> Tensor:
        """On another stream than the default one, as captures want it before them."""
        assert self._aside is not None
        current = torch.cuda.current_stream(self.device)
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside):
            result = self.work()
        current.wait_stream(self._aside)
        return result

    def _captured(self) -> bool:
        """Capture the work; a driver that refuses leaves us with eager runs."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        try:
            # In this mode other threads may use the device meanwhile: ours, and NCCL's.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self.work()
        except RuntimeError as error:
            cause = str(error.__context__ or error).splitlines()[0]
            logger.warning("no CUDA graph (%s): going on step by step", cause)
            self.allowed = False
            torch.cuda.set_stream(stream)  # a capture that failed leaves its own behind
            return False
        self.graph = graph
        return True
