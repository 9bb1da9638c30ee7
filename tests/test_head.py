"""The projection head."""

import pytest
import torch
from torch.nn import functional as F

from tripletkit.config import TrainingModel
from tripletkit.train.head import Head, hidden_dims
from tripletkit.train.init import LinearStart
from tripletkit.train.lowered import lowered


def test_parameter_names_are_the_interface():
    names = set(Head(TrainingModel(num_hidden_layers=3), 8).state_dict())
    layers = ["input_layer", "input_norm", "hidden_layers.0", "hidden_layers.1", "hidden_norms.0",
              "hidden_norms.1", "output_layer", "output_norm", "residual_proj"]  # fmt: skip
    assert names == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_without_norms_and_shortcut_their_parameters_are_gone():
    section = TrainingModel(use_layer_norm=False, use_residual=False)
    assert set(Head(section, 8).state_dict()) == {
        "input_layer.weight", "input_layer.bias", "output_layer.weight", "output_layer.bias"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "multiplier", "expected"),
    [(1, 0.5, [100]), (3, 0.5, [100, 50, 25]), (4, 0.3, [100, 30, 16, 16]), (2, 2.0, [100, 200])],
)
def test_hidden_widths_follow_the_multiplier_down_to_16(layers, multiplier, expected):
    section = TrainingModel(
        hidden_dim=100, num_hidden_layers=layers, hidden_dim_multiplier=multiplier
    )
    assert hidden_dims(section) == expected


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_output_is_the_formula_and_has_unit_length(activation):
    torch.manual_seed(0)
    section = TrainingModel(hidden_dim=20, num_hidden_layers=2, output_dim=4, activation=activation)
    head = Head(section, 5).eval()
    x = torch.randn(7, 5)
    act = getattr(F, activation)
    h = act(F.layer_norm(head.input_layer(x), (20,)))
    h = act(F.layer_norm(head.hidden_layers[0](h), (20,)))
    y = F.layer_norm(head.output_layer(h), (4,)) + head.residual_proj(x)
    assert torch.allclose(head(x), y / y.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(head(x).norm(dim=1), torch.ones(7))


def test_dropout_acts_in_training_only():
    head = Head(TrainingModel(dropout=0.5), 8)
    x = torch.randn(4, 8)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


@pytest.mark.parametrize("use_layer_norm", [True, False])
def test_linear_start_makes_the_head_that_linear_map_and_still_trainable(use_layer_norm):
    torch.manual_seed(0)
    head = Head(TrainingModel(output_dim=3, use_layer_norm=use_layer_norm), 8)
    start = LinearStart(weight=torch.randn(3, 8), bias=torch.randn(3))
    head.start_linear(start)
    x = torch.randn(50, 8)
    expected = F.normalize(x @ start.weight.T + start.bias, dim=1)
    assert torch.allclose(head(x), expected, atol=1e-6)
    before = {name: p.clone() for name, p in head.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (head(x)[:, 0]).mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in head.named_parameters())


def test_fewer_kernels_for_linear_layers_in_bf16_give_what_torch_gives():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(24, 16), torch.nn.Linear(16, 8)]
    x = torch.randn(60, 24).bfloat16()
    weight = torch.randn(60, 8)

    def gradients(of, dtype):
        for layer in layers:
            layer.zero_grad()
        y = of(layers[1], torch.tanh(of(layers[0], x.to(dtype)).float()))
        (y.float() * weight).sum().backward()
        return y.detach(), [p.grad for layer in layers for p in layer.parameters()]

    def plain(layer, x):
        return torch.nn.functional.linear(
            x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()
        )

    ours, found = gradients(lowered(layers), torch.bfloat16)
    theirs, expected = gradients(plain, torch.bfloat16)
    assert torch.equal(ours, theirs)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=2e-2, atol=2e-2)
