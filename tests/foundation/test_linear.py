"""Linear layers by oneDNN, against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scdlkit.foundation import _linear
from scdlkit.foundation._linear import Linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def layer() -> Linear:
    draws = torch.Generator().manual_seed(0)
    layer = Linear(24, 10)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws)
    return layer


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def multiplied(monkeypatch) -> list[torch.Size]:
    """What oneDNN was asked for, however small."""
    shapes, multiply = [], _linear.multiply
    monkeypatch.setattr(_linear, "_WORTH_IT", 1)
    monkeypatch.setattr(_linear, "multiply", lambda x, *rest: (shapes.append(x.shape), multiply(x, *rest))[1])
    return shapes


@needs_onednn
@pytest.mark.parametrize("trained", [("x", "weight", "bias"), ("x",), ("weight", "bias"), ("bias",)])
@pytest.mark.parametrize("strided", [False, True])
def test_output_and_gradients(layer, x, multiplied, trained, strided):
    slope = torch.randn(3, 50, 10, generator=torch.Generator().manual_seed(2))
    slope = slope.transpose(0, 1).contiguous().transpose(0, 1) if strided else slope
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if strided else x
    parts = {"x": x, **dict(layer.named_parameters())}
    for name, part in parts.items():
        part.requires_grad_(name in trained)
    wide = {name: part.detach().double().requires_grad_(name in trained) for name, part in parts.items()}
    expected = nn.functional.linear(wide["x"], wide["weight"], wide["bias"])
    found = layer(x)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    of_expected = torch.autograd.grad(expected, [wide[name] for name in trained], slope.double())
    for one, other in zip(
        torch.autograd.grad(found, [parts[name] for name in trained], slope), of_expected, strict=True
    ):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-5)
    assert len(multiplied) == 1 + ("x" in trained)


@needs_onednn
def test_without_gradients(layer, x, multiplied):
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    assert multiplied


def test_pytorch_does_the_rest(layer, x, monkeypatch):
    monkeypatch.setattr(_linear, "multiply", None)  # whoever asks for it fails
    layer(x)  # small
    monkeypatch.setattr(_linear, "_WORTH_IT", 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    layer.double()(x.double())
    Linear(24, 10, bias=False)(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer.float()(x)
