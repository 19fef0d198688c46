"""Attention of training on a CPU, against PyTorch's in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation import _attention, _cell_attention
from scdlkit.foundation._attention import _Attention, _How, attention
from scdlkit.foundation._random import seeded


def inputs(n_cells, n_heads, n_queries, n_keys, width, *, dtype=torch.float32, seed=0):
    """Queries, keys and values as linear layers leave them, heads side by side, and what is asked of the output."""
    draws = torch.Generator().manual_seed(seed)
    shapes = [(n_cells, length, n_heads * width) for length in (n_queries, n_keys, n_keys, n_queries)]
    parts = [torch.randn(shape, generator=draws).to(dtype).unflatten(2, (n_heads, width)) for shape in shapes]
    return [part.transpose(1, 2).requires_grad_(at < 3) for at, part in enumerate(parts)]


def mask(lengths, n_keys):
    return (torch.arange(n_keys) < torch.tensor(lengths)[:, None])[:, None, None]


def results(compute, query, key, value, slope):
    """Output and gradients, in float64, rows at padding left out by a slope of 0."""
    out = compute(query, key, value)
    return [
        part.detach().double() for part in (out * (slope != 0), *torch.autograd.grad(out, (query, key, value), slope))
    ]


def own(how):
    return lambda query, key, value: _Attention.apply(query, key, value, how)


def expected(query, key, value, slope, keep):
    wide = [part.detach().double().requires_grad_() for part in (query, key, value)]
    return results(lambda *parts: F.scaled_dot_product_attention(*parts, attn_mask=keep), *wide, slope.double())


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_is_that_of_pytorch(data):
    n_cells, n_heads, width = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 8, 20])),
    )
    more = data.draw(st.integers(0, 5))  # keys in front, as prefix tuning has them
    n_queries = data.draw(st.integers(2, 70))
    lengths = data.draw(st.lists(st.integers(1, n_queries), min_size=n_cells, max_size=n_cells))
    half = data.draw(st.booleans())
    query, key, value, slope = inputs(
        n_cells, n_heads, n_queries, n_queries + more, width, dtype=torch.bfloat16 if half else torch.float32
    )
    slope = slope * mask(lengths, n_queries).transpose(2, 3)
    keep = mask([length + more for length in lengths], n_queries + more)
    found = results(own(_How([length + more for length in lengths], 0, 0)), query, key, value, slope)
    for one, other in zip(found, expected(query, key, value, slope, keep), strict=True):
        np.testing.assert_allclose(one, other, atol=(0.02 if half else 1e-5) * (float(other.abs().max()) + 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_pieces(dtype, monkeypatch):
    """More scores than fit into the cache are computed some queries at a time."""
    query, key, value, slope = inputs(2, 3, 150, 150, 16, dtype=dtype)
    keep = mask([150, 101], 150)
    slope = slope * keep.transpose(2, 3)
    whole = results(own(_How([150, 101], 0, 0)), query, key, value, slope)
    monkeypatch.setattr(_cell_attention, "_SCORES", 4 * 150 * 40)
    assert len(_cell_attention.pieces(3, 150, 150, 4)) == 12
    pieces = results(own(_How([150, 101], 0, 0)), query, key, value, slope)
    atol = 0.02 if dtype is torch.bfloat16 else 1e-5
    for one, other in zip(pieces, expected(query, key, value, slope, keep), strict=True):
        np.testing.assert_allclose(one, other, atol=atol * float(other.abs().max()))
    assert torch.equal(pieces[0], whole[0]) or dtype is torch.float32  # products are summed in another order


@pytest.mark.parametrize(("dtype", "cut"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_dropout_is_the_same_on_the_way_back(dtype, cut, monkeypatch):
    """With the identity as values the output is the weights, so what was dropped can be seen, and the gradients follow."""
    n, dropped = 48, 64
    query, key, _, slope = inputs(2, 2, n, n, n, dtype=dtype)
    if cut:
        monkeypatch.setattr(_cell_attention, "_SCORES", 4 * n * 32)
    value = torch.eye(n, dtype=dtype).expand(2, 2, n, n).clone().requires_grad_()
    found = results(own(_How([n, n], dropped, 12345)), query, key, value, slope)
    stays = (found[0] != 0).double()
    assert stays.mean() == pytest.approx(1 - dropped / 256, abs=0.02)
    assert len({tuple(row.tolist()) for row in stays.flatten(0, 2).int()}) > 100  # each row has its own

    def formula(query, key, value):
        return ((query @ key.mT / math.sqrt(n)).softmax(3) * stays / (1 - dropped / 256)) @ value

    wide = [part.detach().double().requires_grad_() for part in (query, key, value)]
    atol = 0.02 if dtype is torch.bfloat16 else 1e-5
    for one, other in zip(found, results(formula, *wide, slope.double()), strict=True):
        np.testing.assert_allclose(one, other, atol=atol * float(other.abs().max()))
    again = results(own(_How([n, n], dropped, 12345)), query, key, value, slope)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert not torch.equal(found[0], results(own(_How([n, n], dropped, 12346)), query, key, value, slope)[0])


def test_dropped_weights_are_spread_evenly():
    """Over keys, over queries and over neighbours, as chance has it."""
    n = 256
    query, key, _, slope = inputs(1, 4, n, n, n)
    value = torch.eye(n).expand(1, 4, n, n)
    with torch.enable_grad():
        out = _Attention.apply(query, key, value, _How([n], 51, 7))
    gone = (out == 0).double()[0]
    p = 51 / 256
    for share, count in ((gone.mean((0, 1)), 4 * n), (gone.mean((0, 2)), 4 * n), (gone.mean((1, 2)), n * n)):
        assert float((share - p).abs().max()) < 4.5 * math.sqrt(p * (1 - p) / count)
    both = (gone[:, :, 1:] * gone[:, :, :-1]).mean(), (gone[:, 1:] * gone[:, :-1]).mean(), (gone[1:] * gone[:-1]).mean()
    assert np.allclose(both, p * p, atol=4.5 * math.sqrt(p * p / gone.numel()))


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(_attention, "_WORTH_A_THREAD", 1)
    query, key, value, slope = inputs(5, 2, 40, 40, 8, dtype=torch.bfloat16)
    keep = mask([40, 39, 20, 7, 1], 40)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            with seeded(5):
                found.append(results(lambda *parts: attention(*parts, keep, 0.2), query, key, value, slope))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_seeds_come_from_the_generator_of_dropout():
    query, key, value, slope = inputs(2, 2, 20, 20, 8)

    def drawn(seed):
        with seeded(seed):
            return [results(lambda *parts: attention(*parts, None, 0.5), query, key, value, slope)[0] for _ in range(2)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("dtype", "dropout", "keep", "grad", "who"),
    [
        (torch.bfloat16, 0.0, None, True, "own"),
        (torch.bfloat16, 0.2, [9, 4], True, "own"),
        (torch.float32, 0.2, None, True, "own"),
        (torch.float32, 0.0, None, True, "PyTorch"),
        (torch.float32, 0.0, [9, 9], True, "PyTorch"),
        (torch.float32, 0.0, [9, 7], True, "own"),
        (torch.float64, 0.2, None, True, "PyTorch"),
        (torch.bfloat16, 0.0, None, False, "PyTorch"),
        (torch.bfloat16, 1.0, None, True, "PyTorch"),
        (torch.bfloat16, 0.0, "in front", True, "PyTorch"),
        (torch.bfloat16, 0.0, [9, 0], True, "PyTorch"),
    ],
)
def test_who_computes(dtype, dropout, keep, grad, who, monkeypatch):
    called = []
    monkeypatch.setattr(_Attention, "apply", lambda *_: called.append("own"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: called.append("PyTorch"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(_attention, "has_onednn", lambda dtype: True)
    query, key, value, _ = inputs(2, 2, 9, 9, 8, dtype=dtype)
    keep = mask([9, 4], 9).flip(3) if keep == "in front" else None if keep is None else mask(keep, 9)
    with torch.set_grad_enabled(grad):
        attention(query, key, value, keep, dropout)
    assert called == [who]


@pytest.mark.parametrize(("n_threads", "who"), [(1, "own"), (2, "own"), (3, "PyTorch")])
def test_threads_need_enough_to_do(n_threads, who, monkeypatch):
    called = []
    monkeypatch.setattr(_Attention, "apply", lambda *_: called.append("own"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: called.append("PyTorch"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(_attention, "_WORTH_A_THREAD", 200)
    monkeypatch.setattr(_attention, "has_onednn", lambda dtype: True)
    query, key, value, _ = inputs(2, 2, 12, 12, 8, dtype=torch.bfloat16)
    attention(query, key, value, mask([12, 9], 12), 0.0)  # 2 heads x (144 + 81) scores
    assert called == [who]


@pytest.mark.parametrize("keep", [None, mask([9, 4], 9)])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_instructions_for_bfloat16_it_is_computed_in_float32(keep, autocast, monkeypatch):
    monkeypatch.setattr(_attention, "has_onednn", lambda dtype: dtype is not torch.bfloat16)
    query, key, value, slope = inputs(2, 2, 9, 9, 8, dtype=torch.bfloat16)
    if keep is not None:
        slope = slope * keep.transpose(2, 3)
    exact = [part.detach().float().requires_grad_() for part in (query, key, value)]
    expected = results(lambda *parts: attention(*parts, keep, 0.0), *exact, slope.float())
    seen = []
    compute = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda query, *rest, **how: seen.append(query.dtype) or compute(query, *rest, **how),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = results(lambda *parts: attention(*parts, keep, 0.0), query, key, value, slope)
    assert set(seen) <= {torch.float32}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.bfloat16().double(), rtol=2**-7, atol=1e-3)
