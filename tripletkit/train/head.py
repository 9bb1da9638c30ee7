"""The projection head: an MLP with a linear shortcut and a unit-length output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tripletkit.config import TrainingModel
from tripletkit.errors import DataError
from tripletkit.train.init import LinearStart
from tripletkit.train.lowered import lowered

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
NARROWEST = 16  # hidden_dim_multiplier never makes a layer narrower than this


def hidden_dims(section: TrainingModel) -> list[int]:
    """Widths of the hidden layers."""
    dims = [section.hidden_dim]
    for _ in range(1, section.num_hidden_layers):
        dims.append(max(NARROWEST, round(dims[-1] * section.hidden_dim_multiplier)))
    return dims


class Head(nn.Module):
    """[B, input_dim] -> [B, output_dim], float32, unit length.

    The parameter names are an interface: checkpoints of earlier trainers carry them.
    """

    def __init__(self, section: TrainingModel, input_dim: int) -> None:
        super().__init__()
        dims = hidden_dims(section)
        norm = nn.LayerNorm if section.use_layer_norm else nn.Identity
        self.activation = ACTIVATIONS[section.activation]
        self.dropout = section.dropout
        self.input_layer = nn.Linear(input_dim, dims[0])
        self.input_norm = norm(dims[0])
        self.hidden_layers = nn.ModuleList(
            nn.Linear(wide, narrow) for wide, narrow in pairwise(dims)
        )
        self.hidden_norms = nn.ModuleList(norm(dim) for dim in dims[1:])
        self.output_layer = nn.Linear(dims[-1], section.output_dim)
        self.output_norm = norm(section.output_dim)
        self.residual_proj = (
            nn.Linear(input_dim, section.output_dim) if section.use_residual else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project rows of embeddings."""
        of: Callable[[nn.Module, Tensor], Tensor] = _linear
        if x.is_cuda and x.dtype is torch.bfloat16 and torch.is_grad_enabled():
            of = lowered([module for module in self.modules() if isinstance(module, nn.Linear)])
        h = self._block(self.input_norm(of(self.input_layer, x)))
        for layer, norm in zip(self.hidden_layers, self.hidden_norms, strict=True):
            h = self._block(norm(of(layer, h)))
        y = F.dropout(self.output_norm(of(self.output_layer, h)), self.dropout, self.training)
        if self.residual_proj is not None:
            y = y + of(self.residual_proj, x)
        return F.normalize(y.float(), dim=-1)

    def _block(self, h: Tensor) -> Tensor:
        return F.dropout(self.activation(h), self.dropout, self.training)

    @torch.no_grad()
    def start_linear(self, start: LinearStart) -> None:
        """Start as a linear map of the input: the shortcut holds it, the MLP adds nothing."""
        assert self.residual_proj is not None
        self.residual_proj.weight.copy_(start.weight)
        self.residual_proj.bias.copy_(start.bias)
        silent = (
            self.output_layer if isinstance(self.output_norm, nn.Identity) else self.output_norm
        )
        for parameter in silent.parameters():
            parameter.zero_()


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def load_weights(head: Head, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put the weights of the checkpoint `path` into `head`. Raises DataError if they do not fit."""
    check_weights(head, weights, path)
    if odd := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise DataError(
            f"{path} has weights that are NaN or infinite: {', '.join(odd)}",
            hint="its run had diverged, or the file is damaged: use an earlier checkpoint",
        )
    head.load_state_dict(dict(weights))


def check_weights(head: Head, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise DataError unless the weights of `path` have the shapes of `head`, which may be "meta"."""
    wanted = head.state_dict()
    problems = [
        f"  {key}: not a dense tensor of real numbers"
        for key, value in weights.items()
        if not isinstance(value, Tensor)
        or value.layout != torch.strided
        or not value.is_floating_point()
        or value.untyped_storage().nbytes() < value.nbytes  # one number, said to be many
    ]
    if problems:
        raise _unfit(path, problems)
    problems = [f"  {key}: missing in the checkpoint" for key in wanted.keys() - weights.keys()]
    problems += [f"  {key}: not in the configured head" for key in weights.keys() - wanted.keys()]
    problems += [
        f"  {key}: {list(weights[key].shape)} in the checkpoint, {list(wanted[key].shape)} configured"
        for key in wanted.keys() & weights.keys()
        if wanted[key].shape != weights[key].shape
    ]
    if problems:
        raise _unfit(path, problems)


def _unfit(path: Path, problems: list[str]) -> DataError:
    return DataError(
        f"{path} does not fit the configured head:\n" + "\n".join(sorted(problems)),
        hint="make [training_model] what the checkpoint was trained with",
    )
