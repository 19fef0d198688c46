from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation import _lanes
from scdlkit.foundation._cell_attention import Scratch
from scdlkit.foundation._fused_attention import attend_packed, can_fuse

WORST = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of averages of numbers of size 1


def attended(qkv: torch.Tensor, n_heads: int, starts: np.ndarray) -> torch.Tensor:
    out = torch.full((len(qkv), qkv.shape[1] // 3), 7.0, dtype=qkv.dtype)
    attend_packed(qkv, n_heads, starts, out, Scratch())
    return out


def exact(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    """One cell, in float64."""
    query, key, value = qkv.double().view(len(qkv), 3, n_heads, -1).permute(1, 2, 0, 3)
    weights = (query @ key.mT * math.log(2)).softmax(-1)
    return (weights @ value).transpose(0, 1).flatten(1)


def random_cells(lengths: list[int], n_heads: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    numbers = np.random.default_rng(len(lengths)).standard_normal((sum(lengths) + 3, 3 * n_heads * width))
    qkv = torch.from_numpy(numbers).float()
    qkv[:, : n_heads * width] /= math.sqrt(width)
    return qkv.to(dtype), np.cumsum([0, *lengths])


def need(dtype: torch.dtype, width: int) -> None:
    if not can_fuse(dtype, width):
        pytest.skip(f"This machine has no instructions for heads of {width} in {dtype}.")


@pytest.mark.parametrize("dtype", WORST, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    n_heads=st.integers(1, 3),
    width=st.sampled_from([32, 64, 96, 192]),
)
def test_equals_the_definition(dtype, lengths, n_heads, width):
    need(dtype, width)
    qkv, starts = random_cells(lengths, n_heads, width, dtype)
    found = attended(qkv, n_heads, starts)
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        assert (found[start:stop] - exact(qkv[start:stop], n_heads)).abs().max() <= WORST[dtype]
    assert (found[starts[-1] :] == 7).all()  # left alone


@pytest.mark.parametrize("dtype", WORST, ids=str)
@pytest.mark.parametrize("n", [1024, 1201])
def test_long_cells(dtype, n):
    need(dtype, 64)
    qkv, starts = random_cells([n], 2, 64, dtype)
    assert (attended(qkv, 2, starts)[:n] - exact(qkv[:n], 2)).abs().max() <= WORST[dtype]


@pytest.mark.parametrize("dtype", WORST, ids=str)
def test_a_cell_is_the_same_wherever_it_stands(dtype):
    need(dtype, 64)
    lengths = [50, 7, 300, 1]
    qkv, starts = random_cells(lengths, 2, 64, dtype)
    together = attended(qkv, 2, starts)
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        alone = attended(qkv[start:stop].contiguous(), 2, np.array([0, stop - start]))
        assert torch.equal(alone, together[start:stop])


@pytest.mark.parametrize("dtype", WORST, ids=str)
def test_scores_of_any_size(dtype):
    need(dtype, 32)
    qkv, starts = random_cells([40], 1, 32, dtype)
    qkv[:, :32] *= 1e6  # all the weight on one key
    found, expected = attended(qkv, 1, starts)[:40], exact(qkv[:40], 1)
    assert torch.isfinite(found).all() and (found - expected).abs().max() <= WORST[dtype]


def test_what_is_not_fused():
    assert not can_fuse(torch.float32, 12) and not can_fuse(torch.bfloat16, 8)
    assert not can_fuse(torch.float16, 64)


AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt,+popcnt"}


@pytest.mark.skipif(not {"avx2", "fma"} <= _lanes._HAS, reason="The processor has no AVX2.")
def test_half_as_long_vectors(tmp_path):
    """What a processor without AVX-512 computes."""
    qkv, starts = random_cells([61, 5], 2, 32, torch.float32)
    np.save(tmp_path / "qkv.npy", qkv.numpy())
    program = """
import sys, numpy as np, torch
from scdlkit.foundation import _lanes
from scdlkit.foundation._cell_attention import Scratch
from scdlkit.foundation._fused_attention import attend_packed, can_fuse
if _lanes.LANES != 8 or can_fuse(torch.bfloat16, 32) or not can_fuse(torch.float32, 8):
    sys.exit(f"{_lanes.LANES} lanes")
qkv = torch.from_numpy(np.load(sys.argv[1]))
out = torch.zeros(len(qkv), 64)
attend_packed(qkv, 2, np.array([0, 61, 66]), out, Scratch())
np.save(sys.argv[2], out.numpy())
"""
    paths = [str(tmp_path / name) for name in ("qkv.npy", "out.npy")]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], env=os.environ | AVX2, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    for start, stop in ((0, 61), (61, 66)):
        assert (found[start:stop] - exact(qkv[start:stop], 2)).abs().max() <= 1e-5
