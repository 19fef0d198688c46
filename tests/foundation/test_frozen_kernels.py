from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation import _frozen_kernels as kernels
from scdlkit.foundation._attention_kernels import softmax
from scdlkit.foundation._packed_linear import FloatLinear, Int8Linear

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy()


@pytest.mark.parametrize("spread", [0.1, 3, 300])
@pytest.mark.parametrize("length", [1, 15, 16, 233])
def test_softmax(length, spread):
    scores, rest = numbers(9, length) * spread, np.empty(9, np.float32)
    expected = torch.softmax(torch.from_numpy(scores).double() * np.log(2), 1).numpy()
    short = torch.from_numpy(scores).bfloat16()
    rounded = torch.softmax(short.double() * np.log(2), 1).numpy()
    logsum, plain = np.empty((1, 9), np.float32), (0, np.zeros(1, np.uint32))
    levels = torch.from_numpy(scores).double().mul(np.log(2)).logsumexp(1).div(np.log(2)).numpy()
    softmax(scores[None], np.float32(1), logsum, rest[None], *plain)
    np.testing.assert_allclose(logsum[0], levels, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scores * rest[:, None], expected, atol=3e-7)
    softmax(bits(short)[None], np.float32(1), logsum, rest[None], *plain)
    np.testing.assert_allclose(short.float().numpy() * rest[:, None], rounded, rtol=2**-8, atol=1e-6)


def test_residual_and_norm():
    x, delta, scale, shift = numbers(7, 96), numbers(7, 96), numbers(96), numbers(96)
    short = torch.from_numpy(delta).bfloat16()

    def expected(delta: torch.Tensor) -> np.ndarray:
        total = torch.from_numpy(x).double() + delta.double()
        weights = (torch.from_numpy(scale).double(), torch.from_numpy(shift).double())
        return torch.nn.functional.layer_norm(total, (96,), *weights, eps=1e-5).numpy()

    found = x.copy()
    kernels.add_and_norm(found, delta, scale, shift)
    np.testing.assert_allclose(found, expected(torch.from_numpy(delta)), atol=3e-6)
    found, rounded = x.copy(), torch.empty(7, 96, dtype=torch.bfloat16)
    kernels.add_and_norm_bf16(found, bits(short), scale, shift, bits(rounded))
    np.testing.assert_allclose(found, expected(short), atol=3e-6)
    assert torch.equal(rounded, torch.from_numpy(found).bfloat16())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda x: x % 1e30), min_size=1))
def test_bfloat16_rounds_as_pytorch(values):
    x = np.array([values], np.float32)
    rounded = torch.empty(x.shape, dtype=torch.bfloat16)
    kernels.round_bf16(x, bits(rounded))
    assert torch.equal(rounded, torch.from_numpy(x).bfloat16())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("n", [1, 5, 300])
def test_linear(n, relu):
    x, weight, bias = (torch.from_numpy(part) for part in (numbers(n, 96), numbers(64, 96), numbers(64)))
    expected = x @ weight.t() + bias
    expected = expected.relu() if relu else expected
    assert (FloatLinear(weight, bias, torch.float32, relu=relu)(x) - expected).abs().max() <= 1e-4
    short = FloatLinear(weight, bias, torch.bfloat16, relu=relu)(x.bfloat16())
    assert short.dtype is torch.bfloat16 and (short.float() - expected).abs().max() <= 0.3
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):  # as on machines without what oneDNN needs
        packed = FloatLinear(weight, bias, dtype, relu=relu)
        packed.packed, packed.weight = False, weight.to(dtype)
        assert (packed(x.to(dtype)).float() - expected).abs().max() <= most
    whole = Int8Linear(weight, bias, relu=relu)(x.bfloat16()).float()
    assert (whole - expected).abs().max() <= 0.7  # of values up to 40
    assert torch.corrcoef(torch.stack([whole.flatten(), expected.flatten()]))[0, 1] > 0.999


def test_int8_rows_are_scaled_one_by_one():
    x, weight, bias = (torch.from_numpy(part) for part in (numbers(4, 96), numbers(64, 96), numbers(64)))
    linear, x = Int8Linear(weight, bias), x.bfloat16()
    alone = linear(x[:1])
    assert torch.equal(linear(torch.cat([x[:1], 1000 * x[1:]]))[:1], alone)
    assert torch.equal(linear(torch.zeros_like(x))[0], bias.bfloat16())
