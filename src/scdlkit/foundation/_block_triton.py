"""Loops between the matrix products of a block that trains on a CUDA device, each one pass over the memory.

Rows are tokens, in half precision; sums are float32. Dropout decides about an element by a hash of its place and of a number
on the device, so that the way back finds the same ones without having kept them. What is summed over all tokens is summed
by many programs, each over rows of its own and as many whatever the device, so that the result does not depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEPS = 1 << 24  # of a probability
_ROWS = 4  # of a program at a time
_PROGRAMS = 2048  # that sum
_WARPS, _SUMMING_WARPS, _WIDE_WARPS = 4, 2, 8
_STAGES = 3  # rows on their way while others are summed
_WIDE = 1024  # more would not fit where they wait


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """Bijective 32-bit mixing."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _stays(rows, columns, seed, dropped):  # type: ignore[no-untyped-def]
    keys = _mix(rows.to(tl.uint32) + _mix(seed.to(tl.uint32)))
    return (_mix(keys[:, None] ^ columns.to(tl.uint32)[None, :]) >> 8).to(tl.int32) >= dropped


@triton.jit
def _standard(values, inside, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows with mean 0 and variance 1, and what they were multiplied by."""
    values = tl.where(inside, values - (tl.sum(values, axis=1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    return values * scale[:, None], scale


@triton.jit(do_not_specialize=["n_rows", "seed", "dropped"])
def _add_and_norm(  # type: ignore[no-untyped-def]
    x, branch, branch_bias, weight, bias, total, out, n_rows, seed, dropped, rest, eps,
    BIASED: tl.constexpr, DROPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    inside = (rows < n_rows)[:, None] & there[None, :]
    at = rows[:, None] * WIDTH + columns[None, :]
    added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        added += tl.load(branch_bias + columns, mask=there, other=0.0)[None, :]
    if DROPS:
        added = tl.where(_stays(rows, columns, tl.load(seed), dropped), added * rest, 0.0)
    rounded = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    standard, _ = _standard(rounded.to(tl.float32), inside, eps, WIDTH)
    factor = tl.load(weight + columns, mask=there, other=0.0)
    shift = tl.load(bias + columns, mask=there, other=0.0)
    tl.store(out + at, standard * factor[None, :] + shift[None, :], mask=inside)


@triton.jit(do_not_specialize=["n_rows", "each", "seed", "dropped"])
def _add_and_norm_back(  # type: ignore[no-untyped-def]
    slope, total, weight, of_x, of_branch, sums, n_rows, each, seed, dropped, rest, eps,
    DROPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    factor = tl.load(weight + columns, mask=there, other=0.0)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    of_branch_bias = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(program * each, tl.minimum((program + 1) * each, n_rows), ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & there[None, :]
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        standard, scale = _standard(tl.load(total + at, mask=inside, other=0.0).to(tl.float32), inside, eps, WIDTH)
        of_out = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
        of_weight += tl.sum(of_out * standard, axis=0)
        of_bias += tl.sum(of_out, axis=0)
        of_standard = of_out * factor[None, :]
        mean = tl.sum(of_standard, axis=1) / WIDTH
        along = tl.sum(of_standard * standard, axis=1) / WIDTH
        of_total = (of_standard - mean[:, None] - standard * along[:, None]) * scale[:, None]
        tl.store(of_x + at, of_total, mask=inside)
        of_added = tl.where(inside, of_total, 0.0)
        if DROPS:
            of_added = tl.where(_stays(rows, columns, tl.load(seed), dropped), of_added * rest, 0.0)
        tl.store(of_branch + at, of_added, mask=inside)
        of_branch_bias += tl.sum(of_added, axis=0)
    tl.store(sums + (program * 3) * WIDTH + columns, of_weight, mask=there)
    tl.store(sums + (program * 3 + 1) * WIDTH + columns, of_bias, mask=there)
    tl.store(sums + (program * 3 + 2) * WIDTH + columns, of_branch_bias, mask=there)


@triton.jit(do_not_specialize=["n_rows", "seed", "dropped"])
def _relu_dropout(  # type: ignore[no-untyped-def]
    x, bias, out, n_rows, seed, dropped, rest,
    DROPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    at = rows[:, None] * WIDTH + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + columns, mask=columns < WIDTH, other=0.0)[None, :]
    stays = ~(values <= 0)  # a NaN is to be seen
    if DROPS:
        stays = stays & _stays(rows, columns, tl.load(seed), dropped)
    tl.store(out + at, tl.where(stays, values * rest, 0.0), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "each"])
def _relu_dropout_back(  # type: ignore[no-untyped-def]
    slope, out, of_x, sums, n_rows, each, rest,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(program * each, tl.minimum((program + 1) * each, n_rows), ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & there[None, :]
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        passed = tl.load(out + at, mask=inside, other=0.0).to(tl.float32) > 0
        of_values = tl.where(passed, tl.load(slope + at, mask=inside, other=0.0).to(tl.float32) * rest, 0.0)
        tl.store(of_x + at, of_values, mask=inside)
        of_bias += tl.sum(of_values, axis=0)
    tl.store(sums + program * WIDTH + columns, of_bias, mask=there)


@triton.jit(do_not_specialize=["n_rows", "seed", "dropped"])
def _dropped(  # type: ignore[no-untyped-def]
    x, out, n_rows, seed, dropped, rest,
    DROPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    at = rows[:, None] * WIDTH + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        values = tl.where(_stays(rows, columns, tl.load(seed), dropped), values * rest, 0.0)
    tl.store(out + at, values, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "each"])
def _side_by_side(  # type: ignore[no-untyped-def]
    first, second, third, together, sums, n_rows, each,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = first
    if part == 1:
        source = second
    elif part == 2:
        source = third
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(program * each, tl.minimum((program + 1) * each, n_rows), ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (rows < n_rows) & there[None, :]
        values = tl.load(source + rows * WIDTH + columns[None, :], mask=inside, other=0.0)
        tl.store(together + (rows * tl.num_programs(1) + part) * WIDTH + columns[None, :], values, mask=inside)
        total += tl.sum(values.to(tl.float32), axis=0)
    tl.store(sums + (program * tl.num_programs(1) + part) * WIDTH + columns, total, mask=there)


def add_and_norm(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor]:
    """Layer norm of ``x + dropout(branch + branch_bias)``, all ``[rows, width]``, and the sum itself.

    ``seed`` is one int32 there, of which dropout has need.
    """
    n_rows, width = x.shape
    total, out = torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton takes the current one
        _add_and_norm[(triton.cdiv(n_rows, _ROWS),)](
            x, branch, bias if branch_bias is None else branch_bias, weight, bias, total, out, n_rows,
            eps=eps, BIASED=branch_bias is not None, **_dropout(x, seed, p), **_columns(width),
        )  # fmt: skip
    return out, total


def add_and_norm_back(
    slope: Tensor, total: Tensor, weight: Tensor, eps: float, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x`` and ``branch``, and float32 ``[width]`` of ``weight``, ``bias`` and ``branch_bias``."""
    n_rows, width = slope.shape
    of_x, of_branch = torch.empty_like(slope), torch.empty_like(slope)
    programs, each = _programs(n_rows)
    sums = slope.new_empty((programs, 3, width), dtype=torch.float32)
    with torch.cuda.device_of(slope):
        _add_and_norm_back[(programs,)](
            slope, total, weight, of_x, of_branch, sums, n_rows, each,
            eps=eps, **_dropout(slope, seed, p), **_summing(width),
        )  # fmt: skip
    of_weight, of_bias, of_branch_bias = sums.sum(0)
    return of_x, of_branch, of_weight, of_bias, of_branch_bias


def relu_dropout(x: Tensor, bias: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """``dropout(relu(x + bias))`` of ``[rows, width]``."""
    n_rows, width = x.shape
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _relu_dropout[(triton.cdiv(n_rows, _ROWS),)](x, bias, out, n_rows, **_dropout(x, seed, p), **_columns(width))
    return out


def relu_dropout_back(slope: Tensor, out: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of ``bias``, float32 ``[width]``, from what :func:`relu_dropout` gave."""
    n_rows, width = slope.shape
    of_x = torch.empty_like(slope)
    programs, each = _programs(n_rows)
    sums = slope.new_empty((programs, width), dtype=torch.float32)
    with torch.cuda.device_of(slope):
        _relu_dropout_back[(programs,)](slope, out, of_x, sums, n_rows, each, _rest(p), **_summing(width))
    return of_x, sums.sum(0)


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """``dropout(x)`` of ``[rows, width]``; and the gradient of it from that of what it gave."""
    n_rows, width = x.shape
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _dropped[(triton.cdiv(n_rows, _ROWS),)](x, out, n_rows, **_dropout(x, seed, p), **_columns(width))
    return out


def side_by_side(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Up to three ``[rows, width]`` as ``[rows, parts x width]``, and the sum of its rows in float32."""
    (n_rows, width), n = parts[0].shape, len(parts)
    together = parts[0].new_empty((n_rows, n * width))
    programs, each = _programs(n_rows)
    sums = together.new_empty((programs, n * width), dtype=torch.float32)
    with torch.cuda.device_of(together):
        _side_by_side[(programs, n)](
            parts[0], parts[n // 2], parts[-1], together, sums, n_rows, each, **_summing(width)
        )
    return together, sums.sum(0)


def _dropout(x: Tensor, seed: Tensor | None, p: float) -> dict[str, Any]:
    """Where the seed is, how many of ``_STEPS`` are dropped, and what the others are multiplied by."""
    drops = p > 0
    return {"seed": seed if drops else x, "dropped": round(p * _STEPS), "rest": _rest(p), "DROPS": drops}


def _rest(p: float) -> float:
    return _STEPS / (_STEPS - round(p * _STEPS))


def _programs(n_rows: int) -> tuple[int, int]:
    """How many programs, and rows of each."""
    each = triton.cdiv(triton.cdiv(n_rows, _PROGRAMS), _ROWS) * _ROWS
    return triton.cdiv(n_rows, each), each


def _columns(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "ROWS": _ROWS, "num_warps": _WARPS}


def _summing(width: int) -> dict[str, int]:
    stages, warps = (_STAGES, _SUMMING_WARPS) if width <= _WIDE else (1, _WIDE_WARPS)
    return {**_columns(width), "STAGES": stages, "num_warps": warps}
