"""Linear layers in bf16 as autocast has them, with fewer kernels: at small batches it is the number
of kernels that takes time on a GPU, two microseconds each whatever they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LOW = torch.bfloat16


def lowered(layers: Sequence[nn.Linear]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A function (layer, x [B, in]) -> bf16 [B, out] for these layers, in training."""
    full = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    low = iter(_Lower.apply(*full))  # type: ignore[no-untyped-call]
    parameters: dict[nn.Module, tuple[Tensor, Tensor]] = {
        layer: (next(low), next(low)) for layer in layers
    }

    def of(layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x.to(LOW), *parameters[layer])  # type: ignore[no-untyped-call]
        return y

    return of


class _Lower(torch.autograd.Function):
    """All parameters in bf16, and their gradients in float32, by one kernel each way."""

    @staticmethod
    def forward(_ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        low = [torch.empty_like(p, dtype=LOW) for p in parameters]
        torch._foreach_copy_(low, parameters)
        return tuple(low)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        full = [torch.empty_like(g, dtype=torch.float32) for g in gradients]
        torch._foreach_copy_(full, gradients)
        return tuple(full)


class _Linear(torch.autograd.Function):
    """x W' + b; the gradient of b is a product too, which is faster than the sum of a column."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        ones = gradient.new_ones(1, len(gradient))
        return (
            gradient @ weight if ctx.needs_input_grad[0] else None,
            gradient.T @ x,
            (ones @ gradient)[0],
        )
